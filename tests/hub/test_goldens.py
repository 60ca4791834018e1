"""What transformers computed (see goldens/make_goldens.py), against what we compute from the same
files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import compress, tree
from jaxmodel.errors import InputError
from jaxmodel.evaluate.perplexity import perplexity, token_nll
from jaxmodel.generation.beam import beam_search
from jaxmodel.hub import Bundle, from_pretrained
from jaxmodel.hub.bundle import read_config
from jaxmodel.hub.families import families, family_of
from jaxmodel.hub.keys import defaults
from jaxmodel.hub.names import Tensors, find, read_leaf
from jaxmodel.losses import next_token
from jaxmodel.models import Model, gpt_oss, llama
from jaxmodel.ops import rope

GOLDENS = Path(__file__).parent / "goldens"
# decoders; other families have goldens and tests of their own
DECODERS = ("gpt2", "gpt_oss", "llama")
KINDS = {
    kind: family
    for family in families().values()
    if family.architecture in DECODERS
    for kind in family.kinds
}
NAMES = sorted(path.parent.name for kind in KINDS for path in GOLDENS.glob(f"{kind}-*/config.json"))
DIFFERENTIATED = set({name.split("-")[0]: name for name in reversed(NAMES)}.values())
"""The first golden of each kind. The others have the same operations, whose gradients these show,
with other options; logits and losses are compared for all.
"""

type Golden = tuple[Bundle, dict[str, Any]]


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def logits_of(bundle: Bundle, params: tree.Params | None = None, **inputs: np.ndarray) -> jax.Array:
    inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
    return jax.jit(bundle.model.apply)(bundle.params if params is None else params, inputs).logits


def drawn(model: Model) -> tree.Params:
    """Random parameters without a compiled program."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(a.dtype),
        jax.eval_shape(model.init, jax.random.key(0)),
    )


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return from_pretrained(GOLDENS / request.param), read(request.param) | {"name": request.param}


class Gradients(Tensors):
    """Stored gradients as the tensors of a file."""

    def __init__(self, stored: dict[str, np.ndarray]):
        self.stored = stored

    def read(self, name: str, index: tuple[Any, ...]) -> np.ndarray:
        return self.stored[f"grad:{name}"][index]


def near(found: Any, stored: np.ndarray, limit: float) -> None:
    """Goldens are of size 5; float32 in another order of sums gives some 1e-6."""
    found = np.asarray(found)
    assert found.shape == stored.shape and found.dtype == np.float32
    assert np.abs(found - stored).max() < limit


def test_every_kind_has_goldens() -> None:
    kinds = [
        json.loads((GOLDENS / name / "config.json").read_text())["model_type"] for name in NAMES
    ]
    assert kinds == [name.split("-")[0] for name in NAMES] and set(kinds) == set(KINDS)
    assert (
        GOLDENS / "llama-tied" / "model.safetensors.index.json"
    ).exists()  # one is in several files
    files = [
        path for name in NAMES for path in (*(GOLDENS / name).iterdir(), GOLDENS / f"{name}.npz")
    ]
    assert sum(path.stat().st_size for path in files) < 1_500_000


def test_the_goldens_between_them_have_every_part() -> None:
    """Configs that differ from the plain Llama in every field that any kind sets."""
    configs = [read_config(GOLDENS / name)[1] for name in NAMES if not name.startswith("gpt")]
    plain = llama.SIZES["tiny"]
    for field in dataclasses.fields(llama.Config):
        assert (
            len({getattr(config, field.name) for config in configs} | {getattr(plain, field.name)})
            > 1
        ), field.name
    assert {config.rope_scaling.kind for config in configs if config.rope_scaling} == set(
        rope.KINDS
    )


@pytest.fixture(scope="module")
def program(golden: Golden) -> Callable[[dict[str, np.ndarray]], Any]:
    """Inputs -> loss of the next tokens, logits, gradients: one program for three tests.

    The loss is spelled out here; `next_token` has a test of its own below.
    """
    bundle, want = golden

    def loss(params: tree.Params, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = bundle.model.apply(params, inputs).logits
        targets = inputs["tokens"][:, 1:, None]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), targets, axis=-1)[..., 0]
        weights = inputs["mask"][:, 1:].astype(jnp.float32)
        return jnp.sum(nll * weights) / jnp.sum(weights), logits

    differentiated = str(want["name"]) in DIFFERENTIATED
    run = jax.jit(
        jax.value_and_grad(loss, has_aux=True)
        if differentiated
        else lambda *args: (loss(*args), None)
    )
    return lambda inputs: run(bundle.params, jax.tree.map(jnp.asarray, inputs))


@pytest.fixture(scope="module")
def computed(golden: Golden, program: Callable[[dict[str, np.ndarray]], Any]) -> Any:
    """(loss, logits), gradients of the golden's own inputs."""
    _, want = golden
    mask = want["mask"]
    positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)
    return program({"tokens": want["tokens"], "mask": mask, "positions": positions})


def test_logits(golden: Golden, computed: Any) -> None:
    _, want = golden
    mask = want["mask"]
    assert mask[0].all() and not mask[1].all()
    near(np.asarray(computed[0][1])[mask], want["logits"][mask], 2e-5)


def test_positions_with_gaps_up_to_the_last(
    golden: Golden, program: Callable[[dict[str, np.ndarray]], Any]
) -> None:
    """In two equal rows with padding, so that one program does for this and the test before."""
    bundle, want = golden
    assert want["positions"][0, -1] == bundle.model.config.context - 1
    rows, length = want["mask"].shape
    count = want["apart"].shape[1]
    given = {
        "tokens": want["apart"],
        "mask": np.ones_like(want["apart"], bool),
        "positions": want["positions"],
    }
    padded = {
        name: np.pad(a.repeat(rows, 0), ((0, 0), (0, length - count))) for name, a in given.items()
    }
    logits = np.asarray(program(padded)[0][1])
    near(logits[:, :count], want["apart_logits"].repeat(rows, 0), 1e-4)


def test_loss_and_gradients(golden: Golden, computed: Any) -> None:
    bundle, want = golden
    (value, _), grads = computed
    near(value, want["loss"], 1e-5)
    if want["name"] not in DIFFERENTIATED:
        return
    family, _ = family_of(bundle.model)
    names = tuple(family.names(bundle.model.config))
    seen = set()
    for path, leaf in tree.flatten(tree.unstack(grads)).items():
        name, layer = find(names, path)
        keys = {f"grad:{tensor}" for tensor in name.tensors(layer)}
        if keys <= set(want):
            seen |= keys
            whole = tuple(slice(0, n) for n in leaf.shape)
            stored = read_leaf(Gradients(want), name, layer, leaf.shape, whole)
            # of q, k, v together: the gradient of k's bias is zero by the softmax
            size = max(
                np.abs(want[key.replace("k_proj.bias", "q_proj.bias")]).max() for key in keys
            )
            near(leaf / size, stored / size, 1e-4)
    assert seen == {key for key in want if key.startswith("grad:")} and len(seen) >= 3


@pytest.mark.parametrize("name", ["gpt2-a", "gemma2-a", "gpt_oss-a", "llama-tied"])
def test_next_token_is_their_loss(name: str) -> None:
    """One golden of each way to the logits: tied or not, capped, of a mixture; its gradient is
    tested in tests/train and tests/losses.
    """
    bundle = from_pretrained(GOLDENS / name)
    want = read(name)
    batch = {
        "tokens": want["tokens"][:, :-1],
        "targets": want["tokens"][:, 1:],
        "weights": want["mask"][:, 1:].astype(np.float32),
    }
    loss = jax.jit(lambda params, batch: next_token(bundle.model, params, batch, train=False)[0])
    near(loss(bundle.params, jax.tree.map(jnp.asarray, batch)), want["loss"], 1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "mixtral" in name or "moe" in name])
def test_load_balance(name: str) -> None:
    """The loss without padding, by the mask or by segments, and without gradients to what is not
    the router.
    """
    bundle = from_pretrained(GOLDENS / name)
    want = read(name)
    mask = jnp.asarray(want["mask"])
    tokens = jnp.asarray(want["tokens"])
    balance = jax.jit(
        lambda params, inputs: bundle.model.hidden(params, inputs).aux["load_balance"]
    )
    near(balance(bundle.params, {"tokens": tokens, "mask": mask}), want["load_balance"], 1e-5)
    of_all = balance(bundle.params, {"tokens": tokens, "mask": jnp.ones_like(mask)})
    assert abs(float(of_all) - float(want["load_balance"])) > 1e-3
    segments = mask.astype(jnp.int32)
    near(
        balance(bundle.params, {"tokens": tokens, "segments": segments}), want["load_balance"], 1e-5
    )


def first_of_each_scaling() -> list[str]:
    """The first golden of each kind with each form of rotary positions."""
    found: dict[tuple[str, Any], str] = {}
    for name in NAMES:
        scaling = getattr(read_config(GOLDENS / name)[1], "rope_scaling", None)
        found.setdefault((name.split("-")[0], scaling and scaling.kind), name)
    return list(found.values())


@pytest.mark.parametrize("name", first_of_each_scaling())
def test_decoding_with_a_cache(name: str) -> None:
    """Rows of unequal length are prefilled together, and the rest of the longer one is fed a token
    at a time.

    In the running form, as texts are generated. That a cache changes nothing is tested of every
    tiny size (contracts/test_decoders.py); here each kind of file, and each scaling of positions,
    which may depend on the length.
    """
    bundle = from_pretrained(GOLDENS / name)
    want = read(name)
    tokens = want["tokens"]
    mask = want["mask"]
    params = bundle.for_inference()
    start = int(mask[1].sum())
    apply = jax.jit(bundle.model.apply)
    head = mask[:, :start] & np.array(
        [[True] * start, [True] * (start - 3) + [False] * 3]
    )  # the second row three behind
    out = apply(
        params,
        {"tokens": tokens[:, :start], "mask": head},
        bundle.model.init_cache(2, mask.shape[1]),
    )
    near(out.logits[head], want["logits"][:, :start][head], 2e-5)
    assert np.isfinite(
        out.logits
    ).all()  # of padding too: it is read as token 0 at position 0, as it may lie outside of a table
    for step in range(mask.shape[1] - start):
        at = np.array([start + step, min(start - 3 + step, start - 1)])
        live = np.array([[True], [step < 3]])
        out = apply(params, {"tokens": tokens[[0, 1], at][:, None], "mask": live}, out.cache)
        near(out.logits[:, 0][live[:, 0]], want["logits"][[0, 1], at][live[:, 0]], 2e-5)
    assert out.cache.length.tolist() == [mask.shape[1], start]


def test_a_text_that_grows_beyond_the_context_of_the_training() -> None:
    """Keys stay as they were turned; later ones go by the length that the text then has."""
    bundle = from_pretrained(GOLDENS / "llama-dynamic")
    want = read("llama-dynamic")
    prompt = jnp.asarray(want["prompt"])
    count = want["continued"].shape[1]
    found = beam_search(bundle.model, bundle.params, prompt, beams=1, max_new_tokens=count)
    assert bundle.model.config.rope_scaling.context == prompt.shape[1] + 3 < prompt.shape[1] + count
    assert np.asarray(found.tokens[:, 0]).tolist() == want["continued"].tolist()
    assert len(set(want["continued"][0].tolist())) > 3


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("gpt2")])
def test_saving_it_again_changes_nothing(name: str, tmp_path: Path) -> None:
    """The same kind, the same config, the same tensors under the same names; so `--check` of ours
    is a check of theirs.
    """
    bundle = from_pretrained(GOLDENS / name)
    stored = jnp.bfloat16 if name not in ("llama-tied", "llama-untied") else jnp.float32
    params = jax.tree.map(lambda a: np.asarray(a).astype(stored), bundle.params)
    folder = dataclasses.replace(bundle, params=params).save_pretrained(tmp_path / "out")
    kind = (
        name.split("-")[0].replace("gemma3", "gemma3_text")
        if "gemma3-" in name
        else name.split("-")[0]
    )  # without the images
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    assert from_pretrained(folder).model is bundle.model
    theirs = [load_file(path) for path in (GOLDENS / name).glob("*.safetensors")]
    given = {
        key.removeprefix("language_model."): value for file in theirs for key, value in file.items()
    }
    given = {
        key: value
        for key, value in given.items()
        if not key.startswith(("vision_tower", "multi_modal_projector"))
    }
    ours = load_file(folder / "model.safetensors")
    assert set(ours) == set(given) and all(np.array_equal(ours[key], given[key]) for key in given)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"gpt2", "gemma3"}))
def test_what_config_json_leaves_out_means_what_it_means_to_transformers(kind: str) -> None:
    full = defaults()[kind]
    sizes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    family = KINDS[kind]
    assert family.config_from_hf(
        {key: full[key] for key in ("model_type", *sizes)}
    ) == family.config_from_hf(full)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0]}},
            "long_factor of the rope scaling is None; allowed: a list",
        ),
        ("phi3", {"attention_bias": True}, "attention_bias is True"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'linear' has no factor"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (
            "gemma2",
            {"hidden_activation": "mish"},
            "hidden_activation: 'mish' is not known; allowed: gelu, ",
        ),
        ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token: 9 given; allowed: 1 to 8"),
        (
            "qwen2",
            {"layer_types": ["linear_attention"], "use_sliding_window": True},
            "layer_types has 'linear_attention'",
        ),
        ("qwen3_moe", {"hidden_act": "relu2"}, "hidden_act: 'relu2' is not known"),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 129},
            "experts_per_token: 129 given; allowed: 1 to 128",
        ),
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            r"no_rope_layers is \[1, 0\]; allowed: a list with 1 or 0 for each of 36 layers",
        ),
        ("gpt_oss", {"attention_bias": False}, "attention_bias is False"),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention"] * 16},
            "allowed: 'sliding_attention' alone, because 'mistral'",
        ),
        (
            "llama",
            {"layer_types": ["sliding_attention"] * 32, "sliding_window": 9},
            "allowed: 'full_attention' alone, because 'llama'",
        ),
        (
            "olmo2",
            {"rope_parameters": {"rope_type": "axial", "factor": 2.0}},
            "the rope type: 'axial' is not known; allowed: ",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "rope type 'llama3' is not supported",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": 3}},
            "long_factor .* is 3; allowed: a list",
        ),
    ],
)
def test_what_is_not_read_is_named(kind: str, change: dict[str, Any], message: str) -> None:
    full = defaults()[kind]
    with pytest.raises(InputError, match=message):
        KINDS[kind].config_from_hf({**full, **change})


def test_the_first_phi_3_files_mean_the_same() -> None:
    """They call it "su" or "yarn" and keep the context of the training outside of the scaling;
    newer ones beside its lists.
    """
    new = json.loads((GOLDENS / "phi3-b" / "config.json").read_text())
    rope = new["rope_parameters"]
    lists = {key: rope[key] for key in ("short_factor", "long_factor")}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 100.0, "partial_rotary_factor": 0.75}
    want = KINDS["phi3"].config_from_hf(new)
    assert want.rotary_width == 6 and want.rope_scaling.factor == 2
    for kind in ("su", "yarn", "longrope"):
        assert (
            KINDS["phi3"].config_from_hf({**old, "rope_scaling": {"type": kind, **lists}}) == want
        )


def test_an_olmo_3_without_windows_is_an_olmo_2() -> None:
    """Which is what it is saved as."""
    hf = {**defaults()["olmo3"], "layer_types": ["full_attention"] * 32, "num_attention_heads": 32}
    config = KINDS["olmo3"].config_from_hf(hf)
    assert config == KINDS["olmo2"].config_from_hf(
        {**hf, "model_type": "olmo2", "rope_parameters": {"rope_theta": config.rope_base}}
    )
    assert config.rope_base == 500000.0


def test_the_gain_of_yarn_from_two_factors() -> None:
    """DeepSeek's files have `mscale` and `mscale_all_dim`, which count where both are there."""
    rope = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.3}
    said = lambda rope: KINDS["llama"].config_from_hf({**defaults()["llama"], "rope_scaling": rope})
    want = (0.1 * 0.7 * np.log(40) + 1) / (0.1 * 0.3 * np.log(40) + 1)
    assert abs(said(rope).rope_scaling.gain - want) < 1e-12
    assert said(rope | {"attention_factor": 1.5}).rope_scaling.gain == 1.5
    assert said(rope | {"mscale": 0.0}).rope_scaling.gain == 0.1 * np.log(40) + 1


def fp4(code: int) -> float:
    """E2M1 by its definition: a sign, two bits of exponent (bias 1), one of mantissa; exponent 0
    has no hidden one.
    """
    sign = -1 if code & 8 else 1
    exponent = code >> 1 & 3
    mantissa = code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def test_mxfp4_is_decoded(tmp_path: Path) -> None:
    """gpt-oss as it is published: blocks of 32 codes with a shared exponent in place of the
    experts' matrices.
    """
    hf = json.loads((GOLDENS / "gpt_oss-a" / "config.json").read_text())
    hf |= {
        "hidden_size": 64,
        "intermediate_size": 32,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = KINDS["gpt_oss"].config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    rng = np.random.default_rng(0)
    want = {}
    params = drawn(gpt_oss.model(config))
    Bundle(gpt_oss.model(config), params).save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
        experts, inner, out = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, out, inner // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 130, (experts, out, inner // 32), dtype=np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = np.array([[fp4(byte & 15), fp4(byte >> 4)] for byte in range(256)], np.float32)[
            blocks
        ]
        values *= 2.0 ** (scales.astype(np.float32) - 127)[..., None, None]
        want[name] = values.reshape(experts, out, inner).swapaxes(
            1, 2
        )  # by group, byte and half of a byte
    save_file(tensors, tmp_path / "model.safetensors")
    got = load_file(
        from_pretrained(tmp_path).save_pretrained(tmp_path / "out") / "model.safetensors"
    )
    assert len(want) == 4 and all(
        np.array_equal(got[name], decoded) for name, decoded in want.items()
    )
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="'model.layers.0.mlp.experts.down_proj' is missing"):
        from_pretrained(tmp_path)


def test_other_spellings_of_gemma_3(tmp_path: Path) -> None:
    """Files of transformers 5 in memory's names, `lm_head` with or without the prefix; what is left
    out is said.
    """
    given = load_file(GOLDENS / "gemma3-a" / "model.safetensors")
    want = from_pretrained(GOLDENS / "gemma3-a")
    said = {"left_out": "vision_tower, multi_modal_projector", "image_tokens": [60]}
    assert want.card == said | {"special_ids": {"bos_token_id": 0, "eos_token_id": 0}}
    embed = given["language_model.model.embed_tokens.weight"]
    new = {
        re.sub(r"^language_model\.model\.", "model.language_model.", key): value
        for key, value in given.items()
    }
    new = {f"model.{key}" if key.startswith("vision") else key: value for key, value in new.items()}
    for tensors in (
        new | {"lm_head.weight": embed.copy()},
        given | {"language_model.lm_head.weight": embed.copy()},
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((GOLDENS / "gemma3-a" / "config.json").read_bytes())
        assert tree.fingerprint(from_pretrained(tmp_path).params) == tree.fingerprint(want.params)
    save_file(
        given | {"language_model.model.layers.0.mlp.bias": embed.copy()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(InputError, match="1 tensors have no place"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("size", "change"),
    [
        ("tiny-gemma", {}),  # biases
        (
            "tiny-gemma",
            {"qkv_bias": False, "query_scale": 0.3, "attn_softcap": None},
        ),  # no whole number is its inverse square
        (
            "tiny-gemma",
            {"qkv_bias": False, "query_scale": 20**-0.5},
        ),  # a soft cap and norms of q and k
        ("tiny", {"qk_norm": True, "qkv_bias": True}),
        ("tiny", {"logit_softcap": 3.0}),
        (
            "tiny",
            {"experts_per_token": 3, "balance": 0.5},
        ),  # of which a model without experts has no use, and config.json no key
        ("tiny-moe", {"qk_norm": True}),
        ("tiny-moe", {"windows": (5, 0)}),
    ],
)
def test_what_no_kind_has_is_stored_under_our_own_names(
    size: str, change: dict[str, Any], tmp_path: Path
) -> None:
    model = llama.model(dataclasses.replace(llama.SIZES[size], **change))
    params = drawn(model)
    folder = Bundle(model, params).save_pretrained(tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "jaxmodel-llama"
    back = from_pretrained(folder)
    assert back.model is model and tree.fingerprint(back.params) == tree.fingerprint(params)


def test_compressed_experts_are_one_leaf_on_disk(tmp_path: Path) -> None:
    """Plain ones are a tensor each, as transformers has them; the experts of a compressed leaf
    share its fields.
    """
    bundle = from_pretrained(GOLDENS / "mixtral-b")
    recipe = [
        ("blocks/0/moe/(gate|down)", "rtn(bits=4)"),
        ("blocks/1/moe/up", "magnitude(0.5) | rtn(bits=8)"),
        (".*", ()),
    ]
    params, _ = compress.apply(recipe, bundle.params, axes=bundle.model.axes)
    folder = dataclasses.replace(bundle, params=params).save_pretrained(tmp_path / "out")
    back = from_pretrained(folder)
    assert tree.fingerprint(back.params) == tree.fingerprint(params) and back.model is bundle.model
    names = {key for key in load_file(folder / "model.safetensors") if "experts" in key}
    stem = "model.layers.{}.block_sparse_moe.experts.{}.weight"
    plain = {
        stem.format(layer, f"{e}.{w}")
        for layer, w in ((0, "w3"), (1, "w1"), (1, "w2"))
        for e in range(5)
    }
    packed = {f"{stem.format(0, w)}_{part}" for w in ("w1", "w2") for part in ("packed", "scale")}
    assert names == plain | packed | {
        f"{stem.format(1, 'w3')}_{part}" for part in ("mask", "values_packed", "values_scale")
    }


def test_dtype_of_a_foreign_folder() -> None:
    """float32 unless said otherwise; bfloat16 stays within its rounding."""
    bundle = from_pretrained(GOLDENS / "gpt2-a", dtype="bfloat16")
    want = read("gpt2-a")
    assert {leaf.dtype for leaf in jax.tree.leaves(bundle.params)} == {jnp.dtype("bfloat16")}
    assert bundle.model.policy.compute_dtype == "bfloat16"
    near(logits_of(bundle, tokens=want["tokens"][:1]), want["logits"][:1], 0.1)


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """Older GPT-2 files say `wte.weight`, and carry masks and a copy of the embedding."""
    tensors = load_file(GOLDENS / "gpt2-a" / "model.safetensors")
    renamed = {re.sub(r"^transformer\.", "", key): value for key, value in tensors.items()}
    renamed |= {
        "h.0.attn.bias": np.ones((1, 1, 24, 24), np.float32),
        "lm_head.weight": renamed["wte.weight"].copy(),
    }
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDENS / "gpt2-a" / "config.json").read_bytes())
    assert tree.fingerprint(from_pretrained(tmp_path).params) == tree.fingerprint(
        from_pretrained(GOLDENS / "gpt2-a").params
    )


# ------------------------------------------------------------------------------------------ SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Golden:
    return from_pretrained("smollm2-135m"), read("smollm2")


def test_smollm2_tokens(smollm2: Golden) -> None:
    """The ids are those of transformers' tokenizer."""
    bundle, want = smollm2
    assert bundle.processor is not None
    ids = bundle.processor.encode((GOLDENS / "text.txt").read_text(encoding="utf-8"))
    assert ids[: want["windows"].size] == want["windows"].ravel().tolist()


def test_smollm2_nll(smollm2: Golden) -> None:
    bundle, want = smollm2
    assert float(want["nll"]) == pytest.approx(3.92870, abs=1e-5)  # the number, for a reader
    nll = token_nll(bundle.model, bundle.params, want["windows"])
    near(nll, want["token_nll"], 2e-4)
    assert abs(nll.mean(dtype=np.float64) - want["nll"]) < 2e-5
    score = perplexity(bundle.model, bundle.for_inference(), want["windows"][:1])
    assert score.nll == pytest.approx(want["token_nll"][0].mean(dtype=np.float64), abs=5e-4)
    assert (
        score.predictions == want["token_nll"].shape[1]
        and score.interval[0] < score.nll < score.interval[1]
    )
