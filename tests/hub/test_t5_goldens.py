"""What transformers computed with T5 (see goldens/make_t5.py), against what we compute from the
same files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.generation import GREEDY, GenerationRequest, beam_search, decode, generate_ids
from jaxmodel.hub import Bundle, from_pretrained, train_bpe
from jaxmodel.hub.families import families, family_of
from jaxmodel.hub.keys import defaults
from jaxmodel.hub.names import find
from jaxmodel.models import t5

GOLDENS = Path(__file__).parent / "goldens" / "seq2seq"
NAMES = ("t5-tied", "t5-gated")
# of logits of size 5; in float64 transformers gives numbers up to 5.5e-5 from its own, and 4.1e-5
# from ours
LIMIT = 1e-4

type Golden = tuple[Bundle, dict[str, np.ndarray]]


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return from_pretrained(GOLDENS / request.param), read(request.param)


def near(found, stored: np.ndarray, limit: float) -> None:
    found = np.asarray(found)
    assert found.shape == stored.shape and found.dtype == np.float32
    assert np.abs(found - stored).max() < limit


def inputs_of(want: dict[str, np.ndarray], *names: str) -> dict[str, jax.Array]:
    return {name: jnp.asarray(want[name]) for name in names}


def test_the_goldens_mean_something(golden: Golden) -> None:
    bundle, want = golden
    config = bundle.model.config
    assert (
        want["source"].shape[1] > config.distance < want["tokens"].shape[1]
    )  # behind the largest bucket, on both sides
    assert want["source_mask"][0].all() and not want["source_mask"][1].all() and config.vocab % 2
    assert np.abs(want["logits"]).max() > 3
    assert config.tied == (config.mlp == "relu") == ("head" not in bundle.params)


def test_logits(golden: Golden) -> None:
    bundle, want = golden
    run = jax.jit(bundle.model.apply)
    inputs = inputs_of(want, "source", "source_mask", "tokens", "mask")
    logits = run(bundle.params, inputs).logits
    near(logits, want["logits"], LIMIT)
    near(run(bundle.for_inference(), inputs).logits, want["logits"], LIMIT)
    short = want["source_mask"][1].sum()
    length = want["mask"][1].sum()
    alone = {"source": want["source"][1:, :short], "tokens": want["tokens"][1:, :length]}
    near(
        run(bundle.params, jax.tree.map(jnp.asarray, alone)).logits,
        want["logits"][1:, :length],
        LIMIT,
    )


# scale_decoder_outputs, tie_word_embeddings, of which transformers 5 writes the second as true
# whatever the file holds
SAID = {
    "scaled": {"scale_decoder_outputs": True, "tie_word_embeddings": True},
    "plain": {"scale_decoder_outputs": False, "tie_word_embeddings": True},
    "first": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("said", SAID)
def test_the_file_tells_whether_the_head_is_tied(said: str, own: bool, tmp_path: Path) -> None:
    """And config.json how what it reads is scaled; each as transformers 5.24 computes it, also when
    saved again.
    """
    heads = read("heads")
    want = read("t5-tied")
    hf = json.loads((GOLDENS / "t5-tied" / "config.json").read_text())
    hf = {key: value for key, value in hf.items() if key not in SAID["scaled"]} | SAID[said]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    tensors = load_file(GOLDENS / "t5-tied" / "model.safetensors")
    save_file(
        tensors | ({"lm_head.weight": heads["head"]} if own else {}), tmp_path / "model.safetensors"
    )
    bundle = from_pretrained(tmp_path)
    assert ("head" in bundle.params) == own
    inputs = {name: jnp.asarray(want[name][:1, :9]) for name in ("source", "tokens")}
    stored = heads[f"{said}-{'own' if own else 'tied'}"]
    near(
        jax.jit(bundle.model.apply)(bundle.params, inputs).logits,
        stored,
        1e-4 * np.abs(stored).max(),
    )
    again = from_pretrained(bundle.save_pretrained(tmp_path / "again"))
    assert again.model is bundle.model and tree.fingerprint(again.params) == tree.fingerprint(
        bundle.params
    )
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (saved["model_type"], saved["scale_decoder_outputs"]) == ("t5", said == "scaled")


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ({"feed_forward_proj": "relu"}, "relu"),
        ({"feed_forward_proj": "gated-gelu"}, "gated-gelu"),
        (
            {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True},
            "gated-gelu",
        ),
        ({"feed_forward_proj": "gated-gelu_fast"}, "gated-gelu"),
        ({"feed_forward_proj": "gated-swish"}, "gated-silu"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "silu", "is_gated_act": True}, "gated-silu"),
        ({"feed_forward_proj": "gelu"}, None),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, None),
        ({"feed_forward_proj": "relu", "dense_act_fn": "gelu_new"}, None),
        ({"feed_forward_proj": "gated-relu"}, None),
    ],
)
def test_feed_forward_parts_by_their_names(said: dict[str, object], form: str | None) -> None:
    hf = {
        key: value
        for key, value in defaults()["t5"].items()
        if key not in ("dense_act_fn", "is_gated_act")
    } | said
    if form is None:
        with pytest.raises(
            InputError, match="feed_forward_proj .or dense_act_fn.: .* is not known"
        ):
            families()["t5"].config_from_hf(hf)
    else:
        assert families()["t5"].config_from_hf(hf).mlp == form


def test_gradients(golden: Golden) -> None:
    bundle, want = golden
    weights = jnp.asarray(want["mask"][:, 1:], jnp.float32)

    def loss(params: tree.Params) -> jax.Array:
        logits = bundle.model.apply(
            params, inputs_of(want, "source", "source_mask", "tokens", "mask")
        ).logits[:, :-1]
        chosen = jnp.take_along_axis(logits, jnp.asarray(want["tokens"])[:, 1:, None], axis=-1)[
            ..., 0
        ]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weights) / jnp.sum(weights)

    value, grads = jax.jit(jax.value_and_grad(loss))(bundle.params)
    near(value, want["loss"], 1e-5)
    family, _ = family_of(bundle.model)
    names = tuple(family.names(bundle.model.config))
    seen = set()
    for path, leaf in tree.flatten(tree.unstack(grads)).items():
        name, layer = find(names, path)
        key = f"grad:{name.at(layer)}"
        if key in want:
            seen.add(key)
            size = np.abs(want[key]).max()
            near(leaf / size, want[key] / size, 1e-4)
    assert seen == {key for key in want if key.startswith("grad:")} and len(seen) >= 7


def test_decoding_with_a_cache(golden: Golden) -> None:
    """Rows of unequal length are read together, and each is fed on a token at a time; sources are
    padded too.
    """
    bundle, want = golden
    tokens = jnp.asarray(want["tokens"])
    mask = want["mask"]
    run = jax.jit(bundle.model.apply)
    lengths = np.array([9, 4])
    head = np.arange(9) < lengths[:, None]
    first = {
        **inputs_of(want, "source", "source_mask"),
        "tokens": tokens[:, :9],
        "mask": jnp.asarray(head),
    }
    out = run(bundle.params, first, bundle.model.init_cache(2, 25))
    near(np.asarray(out.logits)[head], want["logits"][:, :9][head], LIMIT)
    for step in range(16):
        at = lengths + step
        live = mask[[0, 1], at]
        out = run(
            bundle.params,
            {"tokens": tokens[jnp.arange(2), at][:, None], "mask": jnp.asarray(live[:, None])},
            out.cache,
        )
        near(np.asarray(out.logits)[:, 0][live], want["logits"][[0, 1], at][live], LIMIT)
    assert out.cache.length.tolist() == [25, 13]


def up_to(text: list[int], end: int) -> list[int]:
    return text[: text.index(end) + 1] if end in text else text


def test_greedy_and_beams_give_the_texts_of_transformers(golden: Golden) -> None:
    bundle, want = golden
    end = int(want["end"])
    rows = [
        row[mask].tolist() for row, mask in zip(want["source"], want["source_mask"], strict=True)
    ]
    run = decode.run(
        bundle.model,
        bundle.params,
        rows,
        np.zeros(2, bool),
        sampling=GREEDY,
        max_new_tokens=9,
        eos_ids=[end],
    )
    texts = np.concatenate(list(run), axis=1).tolist()
    assert [up_to(text, end) for text in texts] == [
        up_to(text, end) for text in want["greedy"].tolist()
    ]
    given = inputs_of(want, "source", "source_mask")
    found = beam_search(
        bundle.model, bundle.params, given, beams=3, max_new_tokens=9, eos_ids=[end]
    )
    ours = [
        [text[:n] for text, n in zip(*pair, strict=True)]
        for pair in zip(found.tokens.tolist(), found.lengths, strict=True)
    ]
    assert ours == [[up_to(text, end) for text in row] for row in want["beams"].tolist()]
    assert any(len(text) < 9 for row in ours for text in row)  # some end early
    near(found.scores, want["beam_scores"], 1e-4)


def test_buckets_of_relative_positions() -> None:
    gaps = jnp.arange(-600, 601, dtype=jnp.int32)
    stored = read("buckets")
    for key, want in stored.items():
        buckets, distance, both = map(int, key.split(","))
        config = t5.Config(8, 8, 1, 1, 1, 8, 8, buckets=buckets, distance=distance)
        table = jnp.arange(buckets, dtype=jnp.float32)[
            :, None
        ]  # the bias of a bucket is its number
        bias = t5.position_bias(table, jnp.zeros((1, 1), jnp.int32), gaps[None], bool(both), config)
        np.testing.assert_array_equal(bias[0, 0, 0], want, err_msg=key)
    assert len(stored) == 12


# -------------------------------------------------------------------------------------------- files


def test_what_is_written_is_what_transformers_writes(golden: Golden, tmp_path: Path) -> None:
    bundle, _ = golden
    source = GOLDENS / ("t5-tied" if bundle.model.config.tied else "t5-gated")
    bundle.save_pretrained(tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(source / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", source)
    )
    shared = set(ours) & set(theirs) - {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    }
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared} and len(
        shared
    ) >= 14
    assert (
        ours["tie_word_embeddings"] == theirs["scale_decoder_outputs"]
    )  # theirs says true whatever it is
    again = from_pretrained(tmp_path / "out")
    assert again.model.config == bundle.model.config
    assert tree.fingerprint(again.params) == tree.fingerprint(bundle.params)


def test_older_files(tmp_path: Path) -> None:
    """They hold copies of the embedding and a table that no T5 uses; an untied one says so in
    another key.
    """
    tensors = load_file(GOLDENS / "t5-tied" / "model.safetensors")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    extra = {name: tensors["shared.weight"].copy() for name in copies}
    extra["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones(
        (8, 3), np.float32
    )
    hf = json.loads((GOLDENS / "t5-tied" / "config.json").read_text())
    old = {
        key: value
        for key, value in hf.items()
        if key not in ("scale_decoder_outputs", "num_decoder_layers", "is_gated_act")
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    found = from_pretrained(tmp_path)
    want = from_pretrained(GOLDENS / "t5-tied")
    assert found.model.config == want.model.config
    assert tree.fingerprint(found.params) == tree.fingerprint(want.params)
    save_file(
        {**tensors, **extra, "lm_head.weight": extra["lm_head.weight"] + 1},
        tmp_path / "model.safetensors",
    )
    found = from_pretrained(tmp_path)  # both are kept, as transformers 5 keeps them
    assert "head" in found.params and found.model.config.scale == 0.25
    (tmp_path / "config.json").write_text(json.dumps({**old, "tie_word_embeddings": False}))
    assert "head" in from_pretrained(tmp_path).params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dense_act_fn": "gelu"},
            "feed_forward_proj .or dense_act_fn.: 'gelu' is not known; allowed: gated-gelu, "
            "gated-silu",
        ),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False"),
        ({"relative_attention_num_buckets": 2}, "buckets, distance: 2, 20 given"),
        ({"num_layers": 0}, "num_layers is 0; allowed: a whole number of 1 to 2147483647"),
    ],
)
def test_configs_that_are_not_read(change: dict, message: str, tmp_path: Path) -> None:
    hf = json.loads((GOLDENS / "t5-tied" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**hf, **change}))
    with pytest.raises(InputError, match=message):
        from_pretrained(tmp_path)


def test_sources_longer_than_the_positions_of_the_training() -> None:
    """Positions are relative, so `n_positions` is no limit: the same ids as from the config that
    says more.
    """
    bundle = from_pretrained(GOLDENS / NAMES[0])
    tokenizer = train_bpe([], vocab_size=257)
    config = dataclasses.replace(bundle.model.config, vocab=257, context=16)
    texts = []
    for context in (16, 512):
        model = t5.model(dataclasses.replace(config, context=context))
        made = Bundle(model, jax.jit(model.init)(jax.random.key(0)), tokenizer)
        texts.append(
            generate_ids(
                made, ["once upon a time there was a river"], GenerationRequest(max_new_tokens=4)
            )[0].ids
        )
    assert texts[0] == texts[1]
