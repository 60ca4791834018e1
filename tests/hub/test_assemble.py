"""Reading no more than is needed: parts of leaves, slices on a mesh, and the memory that loading
takes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import schema, tree
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle, bundle, from_pretrained
from jaxmodel.hub.names import Name, Tensors, layer_shapes, read_leaf, to_file
from jaxmodel.models import bert, families, gpt2, lenet, llama, t5, vit
from jaxmodel.ops import RopeScaling


class Arrays(Tensors):
    """Tensors in memory that note how many elements were asked for."""

    def __init__(self, stored: dict[str, np.ndarray]):
        self.where = "memory"
        self.stored = stored
        self.count = 0

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        found = self.stored[name][index]
        self.count += found.size
        return found


LEAVES = {
    "plain": (Name("w", "w"), (6, 8)),
    "transposed": (Name("w", "w", transposed=True), (6, 8)),
    "part": (Name("w", "w", transposed=True, part=(1, (1, 1, 1))), (6, 8)),
    "bias part": (Name("w", "w", part=(2, (1, 1, 1))), (6,)),
    "unequal part": (Name("w", "w", part=(1, (2, 3, 3))), (6, 8)),
    "pairs": (Name("w", "w", pairs=2), (8, 4)),
    "kernel": (Name("w", "w", trailing=(2, 2, 2)), (6, 8)),
    "lead": (Name("w", "w", lead=2), (6,)),
    "lead of a table": (Name("w", "w", lead=1), (5, 4)),
    "experts": (Name("w", "w.{expert}.x", experts=3), (3, 4, 5)),
}


@pytest.mark.parametrize("kind", LEAVES)
def test_every_part_of_a_leaf(kind: str) -> None:
    name, shape = LEAVES[kind]
    rng = np.random.default_rng(0)
    stored = {tensor: rng.normal(size=name.file_shape(shape)) for tensor in name.tensors("")}
    whole = read_leaf(Arrays(stored), name, "", shape, tuple(slice(0, n) for n in shape))
    assert whole.shape == shape
    for first in range(shape[0]):
        for last in range(shape[-1]):
            index = [slice(0, n) for n in shape]
            index[0] = slice(first, shape[0])
            index[-1] = slice(last, shape[-1]) if len(shape) > 1 else index[0]
            source = Arrays(stored)
            got = read_leaf(source, name, "", shape, tuple(index))
            np.testing.assert_array_equal(got, whole[tuple(index)])
            assert source.count == got.size or name.trailing  # a kernel is read whole
    if not (name.part or name.pairs):
        pieces = whole if name.experts else whole[None]
        for tensor, piece in zip(name.tensors(""), pieces, strict=True):
            np.testing.assert_array_equal(to_file(name, piece), stored[tensor])
    elif kind == "part":
        np.testing.assert_array_equal(to_file(name, whole), stored["w"][:, 6:12])
    elif kind == "unequal part":
        np.testing.assert_array_equal(to_file(name, whole), stored["w"][4:10])


def test_rows_of_rotary_pairs() -> None:
    """GGUF has the two members of a pair next to each other, we have the first members of all pairs
    in front.
    """
    rows = np.arange(8.0)[:, None]
    got = read_leaf(
        Arrays({"w": rows}), Name("w", "w", pairs=2), "", (8, 1), (slice(0, 8), slice(0, 1))
    )
    np.testing.assert_array_equal(got[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


ON_A_MESH = """
import sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from jaxmodel import hub, sharding, tree


def anonymous():
    return next(
        int(line.split()[1]) / 1e3
        for line in open("/proc/self/status")
        if line.startswith("RssAnon")
    )


for folder in sys.argv[1:]:
    whole = hub.from_pretrained(folder)
    print(tree.fingerprint(whole.params))
    for shape in ("fsdp=4,tensor=2", "tensor=2"):
        mesh = sharding.make_mesh(shape)
        placed = hub.from_pretrained(folder, mesh=mesh)
        print(tree.fingerprint(placed.params))
        got, want = (
            jax.tree.leaves(placed.params),
            jax.tree.leaves(sharding.place(placed.model.rules, whole.params, mesh)),
        )
        assert all(
            a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in zip(got, want, strict=True)
        )
        assert any(not a.is_fully_replicated for a in want)
"""


def test_loading_onto_meshes(devices8, tmp_path: Path) -> None:
    """Plain and compressed leaves, of both families; every leaf lies as its rule says and is
    bit-equal.
    """
    from jaxmodel import compress

    saved = {}
    for kind, module in (("gpt2", gpt2), ("llama", llama)):
        model = module.model(module.SIZES["tiny"])
        params = jax.tree.map(lambda a: a + 0.1, jax.jit(model.init)(jax.random.key(0)))
        whole = Bundle(model, params)
        rules = [
            ("blocks/0/mlp/(gate|up|down)", "rtn(bits=8)"),
            ("embed", "rtn(bits=8)"),
            (".*", ()),
        ]
        mixed, _ = compress.compress_bundle(whole, rules)
        for name, one in (("plain", whole), ("mixed", mixed)):
            saved[one.save_pretrained(tmp_path / f"{kind}-{name}")] = tree.fingerprint(one.params)
    assert devices8(ON_A_MESH, *saved).split() == [
        fingerprint for fingerprint in saved.values() for _ in range(3)
    ]


MEMORY = """
import os, sys, threading
import jax
from jaxmodel import hub, sharding, tree


def anonymous():
    return next(
        int(line.split()[1]) * 1e3
        for line in open("/proc/self/status")
        if line.startswith("RssAnon")
    )


mesh, kept = sharding.make_mesh("fsdp=8"), []
for folder in sys.argv[1:]:
    hub.from_pretrained(
        f"{folder}-small", mesh=mesh
    )  # what is loaded once: libraries, compiled programs
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    bundle = hub.from_pretrained(folder, mesh=mesh)
    done.set()
    thread.join()
    held = sum(s.data.nbytes for a in jax.tree.leaves(bundle.params) for s in a.addressable_shards)
    print(peak[0] - before, held, tree.nbytes(bundle.params))
    kept.append(bundle)  # so that the next one cannot take its memory over
"""

LARGEST = 4096 * 512  # elements of the largest tensor of each
BIG = {
    "llama": (
        llama.Config(4096, 512, 6, 8, 8, 64, 2048, 128),
        {"vocab": 256, "width": 64, "depth": 1, "mlp_width": 64},
    ),
    "gpt2": (gpt2.Config(4096, 512, 3, 8, 128), {"vocab": 256, "width": 64, "depth": 1}),
    "bert": (
        bert.Config(4096, 512, 3, 8, 2048, 128),
        {"vocab": 256, "width": 64, "depth": 1, "mlp_width": 64},
    ),
    "vit": (vit.Config(64, 16, 512, 3, 8, 4096), {"width": 64, "depth": 1, "mlp_width": 64}),
    "t5": (
        t5.Config(4096, 512, 2, 2, 8, 64, 2048),
        {"vocab": 256, "width": 64, "depth": 1, "encoder_depth": 1, "mlp_width": 64},
    ),
}


def test_loading_takes_the_memory_of_what_is_held_and_of_one_tensor(
    devices8, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for kind, (big, change) in BIG.items():
        for name, config in ((kind, big), (f"{kind}-small", dataclasses.replace(big, **change))):
            model = families()[kind].model(config)
            shapes = jax.eval_shape(model.init, jax.random.key(0))
            params = jax.tree.map(
                lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32)), shapes
            )
            folder = Bundle(model, params).save_pretrained(tmp_path / name)
            assert json.loads((folder / "config.json").read_text())["model_type"] == kind
            assert (
                name != kind
                or max(leaf.size for leaf in jax.tree.leaves(layer_shapes(model))) == LARGEST
            )
    lines = devices8(MEMORY, *(tmp_path / kind for kind in BIG), fresh=True).splitlines()
    for kind, line in zip(BIG, lines, strict=True):
        peak, held, size = map(float, line.split())
        assert held < 1.05 * size, kind  # each weight once, norms and biases on every device
        assert peak < held + 1.25 * 4 * LARGEST + 4e6, kind


def test_several_files_and_their_index(tmp_path: Path) -> None:
    model = gpt2.model(gpt2.SIZES["tiny"])
    one = Bundle(model, jax.jit(model.init)(jax.random.key(0)))
    bundle.save(one, tmp_path / "out", shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards and len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == tree.nbytes(one.params)
    assert all((tmp_path / "out" / shard).stat().st_size < 50_000 for shard in shards)
    assert tree.fingerprint(from_pretrained(tmp_path / "out").params) == tree.fingerprint(
        one.params
    )
    one.save_pretrained(tmp_path / "out")  # one file takes the place of several
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_a_config_that_no_hf_family_has_is_stored_under_our_own_names(tmp_path: Path) -> None:
    config = dataclasses.replace(llama.SIZES["tiny-gemma"], rope_scaling=RopeScaling("linear", 2.0))
    model = llama.model(config)
    one = Bundle(model, jax.jit(model.init)(jax.random.key(0)))
    folder = one.save_pretrained(tmp_path / "out")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["model_type"] == "jaxmodel-llama" and stored["config"]["windows"] == [3, 0]
    back = from_pretrained(folder)
    assert back.model is model
    assert tree.fingerprint(back.params) == tree.fingerprint(one.params)
    stored["config"]["widht"] = 3
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"'widht' is not known.*nearest: width"):
        from_pretrained(folder)


def test_a_config_of_json_is_the_config() -> None:
    for module in (gpt2, llama):
        for config in module.SIZES.values():
            plain = json.loads(json.dumps(dataclasses.asdict(config)))
            assert schema.make(plain, module.Config, "config.json") == config
    with pytest.raises(InputError, match="missing"):
        schema.make({"vocab": 3}, gpt2.Config, "config.json")
    assert math.isclose(llama.SIZES["gemma-2-2b"].embed_scale, 48)


def test_names_of_classes() -> None:
    """Of the config, or, where that has only their number, of the card."""
    model = lenet.model(lenet.SIZES["tiny"])
    params = jax.jit(model.init)(jax.random.key(0))
    assert Bundle(model, params).labels == ()
    assert Bundle(model, params, card={"labels": ["a", "b", "c", 4]}).labels == ("a", "b", "c", "4")
    with pytest.raises(InputError, match="card: labels names 3 classes; the model has 4"):
        _ = Bundle(model, params, card={"labels": "abc"}).labels
