"""Adapters on disk: those of PEFT compute here what they compute there; ours are read back bit for
bit, alone and whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import adapt, compress, generation, hub, ops, tree
from jaxmodel.errors import InputError
from jaxmodel.evaluate import perplexity
from jaxmodel.leaves import Adapted
from jaxmodel.models import from_linen, gpt2, llama, mlp

GOLDENS = Path(__file__).parent / "goldens"
PEFT = sorted(path.parent.name for path in (GOLDENS / "adapters").glob("*/logits.npz"))
KEY = jax.random.key(1)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 200, (2, 8)), jnp.int32)


def of_peft(name: str) -> tuple[hub.Bundle, dict[str, np.ndarray]]:
    """The bundle with adapters that PEFT wrote, and what it computed."""
    folder = GOLDENS / "adapters" / name
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    with np.load(folder / "logits.npz") as file:
        return hub.from_pretrained(GOLDENS / base, adapters=folder), dict(file)


def computed(bundle: hub.Bundle, golden: dict[str, np.ndarray], name: str) -> np.ndarray:
    inputs = {
        key: jnp.asarray(a, jnp.float32 if key == "pixels" else jnp.int32)
        for key, a in golden.items()
        if key != "logits"
    }
    out = jax.jit(bundle.model.apply)(bundle.params, inputs)
    return np.asarray(
        out.hidden if name == "bert" else out.logits
    )  # there without the head of masked tokens


@pytest.fixture(scope="module")
def tokenizer():
    return hub.train_bpe(["hello world " * 20], 257)


def adapted(family=llama, rules: str = ".*/(q|v|down)", **config) -> hub.Bundle:
    """A tiny model with adapters that do something."""
    model = family.model(
        dataclasses.replace(
            family.SIZES["tiny"], **({"vocab": 257} if family is not mlp else {}), **config
        )
    )
    base = jax.jit(model.init)(jax.random.key(0))
    model, params = adapt.lora(
        model, base, [(rules, adapt.LoRA(3, 5.0)), (".*", None)], jax.random.key(1)
    )
    return hub.Bundle(model, stirred(params))


def stirred(params: tree.Params) -> tree.Params:
    rng = np.random.default_rng(1)
    return tree.map_leaves(
        lambda path, a: (
            jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype) if path.endswith("_lora/up") else a
        ),
        params,
    )


def plain(bundle: hub.Bundle) -> hub.Bundle:
    """The model without its adapters."""
    base = {path: a for path, a in tree.flatten(bundle.params).items() if "_lora/" not in path}
    return dataclasses.replace(bundle, params=tree.unflatten(base))


def same(one: tree.Params, other: tree.Params) -> None:
    assert list(tree.flatten(one)) == list(tree.flatten(other))
    chex.assert_trees_all_equal(one, other)


# --------------------------------------------------------------------------------------------- PEFT


def test_the_goldens_have_every_kind():
    found: set[str] = set()
    for name in PEFT:
        config = json.loads((GOLDENS / "adapters" / name / "adapter_config.json").read_text())
        found |= {key for key, value in config.items() if value}
        found |= {
            key.rpartition(".lora_")[2]
            for key in load_file(GOLDENS / "adapters" / name / "adapter_model.safetensors")
        }
    wanted = {
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "modules_to_save",
        "fan_in_fan_out",
        "A.weight",
        "embedding_B",
    }
    assert wanted <= found


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_compute_what_they_compute_there(name):
    bundle, golden = of_peft(name)
    assert np.abs(computed(bundle, golden, name) - golden["logits"]).max() < 2e-5
    without = computed(plain(bundle), golden, name)
    assert np.abs(without - golden["logits"]).max() > 0.05  # they do something
    merged, how = adapt.merge_adapters(bundle.params)
    assert set(how.values()) == {"exact"}
    assert (
        np.abs(
            computed(dataclasses.replace(bundle, params=merged), golden, name) - golden["logits"]
        ).max()
        < 5e-5
    )


@pytest.mark.parametrize("name", PEFT)
def test_what_peft_wrote_is_written_as_it_was(name, tmp_path):
    bundle, _ = of_peft(name)
    also = {"patterns": "(.*/attn_|.*/mlp_)?norm/weight", "vit": "head/.*"}.get(name)
    hub.save_adapters(bundle, tmp_path / "again", also=also, base="somewhere/base")
    before, after = (
        load_file(f / "adapter_model.safetensors")
        for f in (GOLDENS / "adapters" / name, tmp_path / "again")
    )
    stem = lambda key: (
        "base_model.model." + key.removeprefix("base_model.model.").removeprefix("bert.")
    )  # left out there
    before = {
        stem(key): a for key, a in before.items() if ".base_layer." not in key
    }  # tables as they are in the model
    chex.assert_trees_all_equal(before, {stem(key): a for key, a in after.items()})
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    theirs = json.loads((GOLDENS / "adapters" / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base" and config["bias"] == "none"
    assert config["fan_in_fan_out"] == theirs["fan_in_fan_out"]
    if name in ("llama", "gpt2"):
        assert config["target_modules"] == sorted(theirs["target_modules"])
        assert (config["r"], config["lora_alpha"]) == (theirs["r"], theirs["lora_alpha"])
    base = plain(bundle)
    again = hub.add_adapters(base, tmp_path / "again")
    chex.assert_trees_all_close(again.params, bundle.params, rtol=1e-6)


def change(folder: Path, tmp_path: Path, **values) -> Path:
    """A copy of a folder with other values in its config."""
    copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return copy


def test_what_is_not_read_is_refused_by_name(tmp_path):
    folder = GOLDENS / "adapters" / "llama"
    base = hub.from_pretrained(GOLDENS / "llama-untied")
    refused = {
        "use_dora": True,
        "bias": "all",
        "peft_type": "IA3",
        "init_lora_weights": "pissa",
        "target_parameters": ["experts.up"],
        "layer_replication": [[0, 2]],
        "lora_bias": True,
        "trainable_token_indices": [1],
        "something_new": 3,
        "r": 0,
        "lora_alpha": "8",
        "rank_pattern": {"q_proj": 0},
    }
    for key, value in refused.items():
        with pytest.raises(InputError, match=f"adapter_config.json: {key}"):
            hub.add_adapters(base, change(folder, tmp_path, **{key: value}))
    for pattern in ("(a+)+b", "(", "(a*)*"):
        with pytest.raises(InputError, match="the pattern .* is not supported"):
            hub.add_adapters(base, change(folder, tmp_path, alpha_pattern={pattern: 3}))
    with pytest.raises(InputError, match="an alpha is 0"):
        hub.add_adapters(base, change(folder, tmp_path, lora_alpha=0))
    for key, value in {
        "lora_dropout": 0.1,
        "revision": "main",
        "init_lora_weights": "gaussian",
        "something_new": None,
    }.items():
        hub.add_adapters(base, change(folder, tmp_path, **{key: value}))
    with pytest.raises(
        InputError,
        match=r"down_proj has shapes \[4, 24\] and \[16, 4\]; allowed: \[5, 24\] and \[16, 5\]",
    ):
        hub.add_adapters(base, change(folder, tmp_path, r=5))
    with pytest.raises(
        InputError, match="'transformer.h.0.attn.c_attn' has no place in this model; nearest: "
    ):
        hub.add_adapters(base, GOLDENS / "adapters" / "gpt2")
    for weight in (0, float("nan")):
        with pytest.raises(InputError, match="weight: "):
            hub.add_adapters(base, folder, weight=weight)


def test_damaged_folders_are_refused(tmp_path):
    base = hub.from_pretrained(GOLDENS / "llama-untied")
    good = GOLDENS / "adapters" / "llama"
    with pytest.raises(InputError, match="'adapter_config.json' is missing"):
        hub.add_adapters(base, tmp_path)
    folder = change(good, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    file = folder / "adapter_model.safetensors"
    for wrong, message in (
        ({}, "it contains no adapters"),
        (
            {key: a for key, a in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in key},
            "has lora_A; allowed: a pair",
        ),
        ({**tensors, "odd": np.ones(2, np.float32)}, "'odd' is not in PEFT's layout"),
        (
            {**tensors, "base_model.model.model.odd.weight": np.ones(2, np.float32)},
            "'model.odd.weight' has no place",
        ),
        (
            {**tensors, "base_model.model.model.norm.weight": np.ones(2, np.float32)},
            "does not fit; allowed:",
        ),
    ):
        save_file(wrong, file)
        with pytest.raises(InputError, match=message):
            hub.add_adapters(base, folder)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        hub.add_adapters(base, folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(
        InputError, match=r"adapter_model.safetensors' is missing; adapter_model.bin is pickled"
    ):
        hub.add_adapters(base, folder)


def test_a_table_that_is_the_head_too_takes_no_adapter_of_the_lookup_alone(tmp_path):
    bundle = adapted(gpt2, "embed")
    with pytest.raises(InputError, match="'embed' also applies to the head"):
        hub.save_adapters(bundle, tmp_path / "alone")
    bundle.save_pretrained(tmp_path / "whole")  # for us it is one
    same(hub.from_pretrained(tmp_path / "whole").params, bundle.params)
    file = tmp_path / "whole" / "adapter_model.safetensors"
    save_file(load_file(file), file)  # as others write it
    with pytest.raises(InputError, match="has an adapter for the lookup alone"):
        hub.from_pretrained(tmp_path / "whole")


# --------------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param(lambda: adapted(), id="llama"),
        pytest.param(lambda: adapted(gpt2, ".*/(q|v|up)"), id="parts"),
        pytest.param(lambda: adapted(rules="blocks/1/.*/(q|k)"), id="some-layers"),
        pytest.param(lambda: adapted(mlp, "blocks/.*/dense"), id="own-names"),
    ],
)
def test_alone_and_whole_are_read_back_bit_for_bit(bundle, tmp_path):
    bundle = bundle()
    hub.save_adapters(bundle, tmp_path / "alone")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    same(hub.add_adapters(plain(bundle), tmp_path / "alone").params, bundle.params)
    bundle.save_pretrained(tmp_path / "whole")
    again = hub.from_pretrained(tmp_path / "whole")
    same(again.params, bundle.params)
    assert again.model is bundle.model
    if "adapter_model.safetensors" not in {path.name for path in (tmp_path / "whole").iterdir()}:
        raise AssertionError
    (tmp_path / "whole" / "adapter_config.json").unlink()  # without it, it would be another model
    with pytest.raises(InputError, match="'adapter_config.json' is missing"):
        hub.from_pretrained(tmp_path / "whole")


def test_fresh_adapters_of_parts_are_not_lost(tmp_path):
    model = gpt2.model(gpt2.SIZES["tiny"])
    rules = [(".*/q", adapt.LoRA(2, 3.0)), (".*/v", adapt.LoRA(3, 7.0)), (".*", None)]
    model, params = adapt.lora(
        model, jax.jit(model.init)(jax.random.key(0)), rules, jax.random.key(1)
    )
    hub.Bundle(model, params).save_pretrained(tmp_path / "whole")
    again = hub.from_pretrained(tmp_path / "whole").params
    assert tree.flatten(again)["blocks/0-2/attn/v_lora/down"].shape == (3, 3, 32)
    run = jax.jit(model.apply)
    chex.assert_trees_all_close(run(again, TOKENS).logits, run(params, TOKENS).logits)


def test_a_quantised_base_with_adapters_is_saved_whole(tmp_path):
    bundle = adapted()
    small, _ = compress.compress_bundle(
        bundle, [("blocks/.*/(attn|mlp)/[a-z]+", "rtn(bits=4, group=32)"), (".*", ())]
    )
    assert {type(leaf).__name__ for leaf in tree.flatten(small.params).values()} > {"QTensor"}
    small.save_pretrained(tmp_path / "small")
    again = hub.from_pretrained(tmp_path / "small")
    same(again.params, small.params)
    hub.save_adapters(bundle, tmp_path / "alone")
    same(hub.add_adapters(plain(small), tmp_path / "alone").params, small.params)


def test_named_recipes_leave_adapters_as_they_are(tmp_path):
    bundle = adapted()
    for name, recipe in compress.RECIPES.items():
        given = [TOKENS] if recipe.needs else None
        small, _ = compress.compress_bundle(bundle, recipe, batches=given)
        kinds = {
            type(leaf).__name__
            for path, leaf in tree.flatten(small.params).items()
            if "_lora/" in path
        }
        assert kinds == {"ArrayImpl"}, name
        jax.eval_shape(small.model.apply, small.params, TOKENS)


def test_several_add_up(tmp_path):
    one = adapted()
    other = adapted(rules=".*/(k|q)")
    for name, bundle in (("one", one), ("other", other)):
        hub.save_adapters(bundle, tmp_path / name)
    both = hub.from_pretrained  # of a saved base, by one call
    plain(one).save_pretrained(tmp_path / "base")
    got = both(tmp_path / "base", adapters=[tmp_path / "one", tmp_path / "other"])
    weights = tree.flatten(plain(one).params)
    for bundle in (one, other):
        for path in tree.flatten(bundle.params):
            if path.endswith("_lora/up"):
                at = path.removesuffix("_lora/up")
                part = {
                    name: tree.flatten(bundle.params)[f"{at}_lora/{name}"]
                    for name in ("down", "up", "scale")
                }
                weights[at] = Adapted(weights[at], **part).decode()
    want = jax.jit(llama.model(one.model.config).apply)(tree.unflatten(weights), TOKENS).logits
    chex.assert_trees_all_close(
        jax.jit(got.model.apply)(got.params, TOKENS).logits, want, atol=2e-5
    )
    half = hub.add_adapters(plain(one), tmp_path / "one", weight=-0.5)
    up, scale = (
        tree.flatten(half.params)[f"blocks/0-2/attn/q_lora/{name}"] for name in ("up", "scale")
    )
    np.testing.assert_array_equal(up, tree.flatten(one.params)["blocks/0-2/attn/q_lora/up"])
    np.testing.assert_allclose(scale, -0.5 * 5 / 3, rtol=1e-6)


def test_dropout_goes_with_them(tmp_path):
    """As PEFT's `lora_dropout`, which its own folders bring along; of two that add up the higher is
    left.
    """
    model = llama.model(dataclasses.replace(llama.SIZES["tiny"], vocab=257))
    base = hub.Bundle(model, jax.jit(model.init)(jax.random.key(0)))
    rules = [(".*/(q|v)", adapt.LoRA(3, 5.0, dropout=0.1)), (".*", None)]
    adapted_model, params = adapt.lora(base.model, base.params, rules, KEY)
    with_dropout = dataclasses.replace(base, model=adapted_model, params=params)
    hub.save_adapters(with_dropout, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.1
    again = hub.add_adapters(base, tmp_path / "a")
    chex.assert_trees_all_equal(again.params, with_dropout.params)
    run = jax.jit(
        lambda key, train: (
            again.model.apply(stirred(again.params), TOKENS, rng=key, train=train).logits
        ),
        static_argnums=1,
    )
    assert np.abs(run(KEY, True) - run(KEY, False)).max() > 1e-3
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.4}))
    both = hub.add_adapters(again, tmp_path / "a")
    hub.save_adapters(both, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_dropout"] == 0.4


def test_what_was_trained_besides_goes_with_them(tmp_path):
    bundle = adapted()
    moved = ("norm/weight", "blocks/0-2/attn_norm/weight")
    params = tree.map_leaves(lambda path, a: a + 1 if path in moved else a, bundle.params)
    changed = dataclasses.replace(bundle, params=params)
    hub.save_adapters(changed, tmp_path / "alone", also="norm/weight|blocks/1/attn_norm/weight")
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.layers.1.input_layernorm", "model.norm"]
    got = tree.flatten(hub.add_adapters(plain(bundle), tmp_path / "alone").params)
    np.testing.assert_array_equal(got["norm/weight"], params["norm"]["weight"])
    np.testing.assert_array_equal(
        got["blocks/0-2/attn_norm/weight"][1], params["blocks"]["0-2"]["attn_norm"]["weight"][1]
    )
    np.testing.assert_array_equal(
        got["blocks/0-2/attn_norm/weight"][0], 1 + 0 * got["blocks/0-2/attn_norm/weight"][0]
    )
    with pytest.raises(
        InputError, match="also: 'nom/weight' matches no leaf; nearest: norm/weight"
    ):
        hub.save_adapters(changed, tmp_path / "alone", also="nom/weight")


def test_folders_of_something_else_are_left_alone(tmp_path):
    bundle = adapted()
    bundle.save_pretrained(tmp_path / "whole")
    with pytest.raises(
        InputError, match="holds 'config.json', which is not a file of adapters alone"
    ):
        hub.save_adapters(bundle, tmp_path / "whole")
    hub.save_adapters(bundle, tmp_path / "alone")
    hub.save_adapters(bundle, tmp_path / "alone")  # its own kind is replaced
    with pytest.raises(InputError, match="holds no config.json, so no bundle"):
        bundle.save_pretrained(tmp_path / "alone")
    with pytest.raises(InputError, match="it has no adapters"):
        hub.save_adapters(plain(bundle), tmp_path / "new")


# ------------------------------------------------------------------------------ what runs with them


def test_generation_and_perplexity_are_those_of_the_model_and_of_the_merged_one(tokenizer):
    bundle = dataclasses.replace(adapted(), processor=tokenizer)
    ids = tokenizer.encode("hello")
    begun = len(ids)
    for _ in range(6):
        padded = np.array([ids + [0] * (begun + 6 - len(ids))], np.int32)
        ids.append(
            int(
                np.argmax(
                    jax.jit(bundle.model.apply)(bundle.params, padded).logits[0, len(ids) - 1]
                )
            )
        )
    (got,) = generation.generate_ids(
        bundle, ["hello"], generation.GenerationRequest(max_new_tokens=6)
    )
    assert got.ids == ids[begun:]
    merged = dataclasses.replace(bundle, params=adapt.merge_adapters(bundle.params)[0])
    assert (
        generation.generate_ids(merged, ["hello"], generation.GenerationRequest(max_new_tokens=6))[
            0
        ].ids
        == got.ids
    )
    text = [tokenizer.encode("hello world hello worl")]
    scores = [
        perplexity(one.model, one.params, np.asarray(text, np.int32)).nll
        for one in (bundle, merged, plain(bundle))
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    assert abs(scores[0] - scores[2]) > 1e-3


def test_only_maps_without_adapters_are_joined_for_running():
    running = hub.Bundle(
        *[getattr(adapted(rules=".*/q"), name) for name in ("model", "params")]
    ).for_inference()
    attention = running["blocks"]["0-2"]["attn"]
    feed = running["blocks"]["0-2"]["mlp"]
    assert {"q", "k", "v", "q_lora"} <= set(attention) and "gate+up" in feed


def test_adapters_of_a_foreign_module_are_read_where_the_module_runs():
    import flax.linen as nn

    model = from_linen(nn.Dense(3), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    base = jax.jit(model.init)(jax.random.key(0))
    wrapped, params = adapt.lora(
        model, base, [("kernel", adapt.LoRA(2)), (".*", None)], jax.random.key(1)
    )
    params = stirred(params)
    x = jnp.ones((2, 4))
    merged, _ = adapt.merge_adapters(params)
    for one in (wrapped, model):
        chex.assert_trees_all_close(
            one.apply(params, x).logits, model.apply(merged, x).logits, rtol=1e-5
        )
    assert (
        float(jnp.abs(wrapped.apply(params, x).logits - model.apply(base, x).logits).max()) > 0.01
    )


def test_a_mesh_of_one_holds_them():
    from jaxmodel import sharding

    mesh = sharding.make_mesh("fsdp=1")
    bundle = hub.from_pretrained(
        GOLDENS / "llama-untied", mesh=mesh, adapters=GOLDENS / "adapters" / "llama"
    )
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(bundle.params)} == {mesh}
    half = bundle.model.with_policy(ops.Policy(compute_dtype="bfloat16"))
    assert jax.eval_shape(half.apply, bundle.params, TOKENS % 40).logits.dtype == jnp.float32
