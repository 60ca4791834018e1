"""Compressed leaves in an orbax checkpoint: stored on one device or eight, restored on the other,
equal to the bit.

This file runs itself in a process with eight simulated devices:
`JAX_NUM_CPU_DEVICES=8 python FILE FOLDER`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmodel import sharding, tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.leaves.fields import check_fields, static_fields

RULES = [(".*/sparse.*|norm", jax.P("tensor")), (".*", jax.P("tensor", "fsdp"))]


def build() -> tree.Params:
    """A leaf of each kind in two stacked layers and in one alone."""
    rng = np.random.default_rng(0)

    def qtensor(
        lead: tuple[int, ...], bits: int, group: int | None, affine: bool = False, n: int = 64
    ) -> QTensor:
        low, high = (0, 2**bits) if affine else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        codes = jnp.asarray(rng.integers(low, high, (*lead, 16, n)), jnp.int32)
        scale = jnp.asarray(
            rng.uniform(0.5, 2, (*lead, 16, n // group if group else 1)), jnp.float32
        )
        return QTensor.from_codes(codes, scale, -scale if affine else None, bits=bits, group=group)

    def sparse(lead: tuple[int, ...], pattern: tuple[int, int] | None = None) -> Sparse:
        m = pattern[1] if pattern else 64
        keep = np.argsort(rng.random((*lead, 16, 64 // m, m)), axis=-1) < m // 2
        weight = jnp.asarray(rng.normal(size=(*lead, 16, 64)), jnp.float32)
        return Sparse.from_dense(weight, jnp.asarray(keep.reshape(*lead, 16, 64)), pattern=pattern)

    def layers(*lead: int) -> tree.Params:
        return {
            "int8": qtensor(lead, 8, None),
            "int4": dataclasses.replace(qtensor(lead, 4, 8), activations="int8"),
            "affine": qtensor(lead, 3, 16, affine=True),
            "sparse": sparse(lead),
            "sparse_pattern": sparse(lead, (2, 4)),
            "sparse_int8": dataclasses.replace(sparse(lead), values=qtensor(lead, 8, None, n=32)),
        }

    plain = jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16)
    return {
        "blocks": {"0-1": layers(2), "2": layers()},
        "embed": plain,
        "norm": jnp.arange(16, dtype=jnp.int32),
    }


def save(folder: Path, params: tree.Params) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "arrays", params)
    (folder / "fields.json").write_text(json.dumps(static_fields(params)))


def restore(folder: Path, target: tree.Params) -> tree.Params:
    """As a checkpoint does it: the fields first, since orbax does not look at them."""
    check_fields(target, json.loads((folder / "fields.json").read_text()))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "arrays", target)


def on(places: tree.Params, params: tree.Params) -> tree.Params:
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), params, places
    )


def alone(params: tree.Params) -> tree.Params:
    return on(
        jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), params), params
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    save(folder, build())
    return folder


def equal(got: tree.Params, want: tree.Params) -> None:
    """In static fields, shapes, dtypes and bits; and a leaf that broke its invariants would
    say so.
    """
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want), strict=True)
    for leaf in tree.flatten(got).values():
        if isinstance(leaf, QTensor | Sparse):
            leaf.check()
    assert tree.fingerprint(got) == tree.fingerprint(want)


def test_on_one_device(folder):
    params = build()
    equal(restore(folder, alone(params)), params)


def test_from_one_device_to_eight_and_back(folder, devices8, tmp_path):
    assert devices8(Path(__file__), folder, tmp_path).strip() == "equal on eight"
    params = build()
    equal(restore(tmp_path, alone(params)), params)


def eight(source: Path, out: Path) -> None:
    """Restore on a mesh, as rules say, and store from there."""
    assert jax.device_count() == 8
    params = build()
    same, places = sharding.shardings(RULES, params, sharding.make_mesh("fsdp=4,tensor=2"))
    assert jax.tree.structure(same) == jax.tree.structure(params)  # the rules split nothing
    got = restore(source, on(places, params))
    assert [a.sharding for a in jax.tree.leaves(got)] == jax.tree.leaves(places)
    assert all(not a.is_fully_replicated for a in jax.tree.leaves(got))
    for name in ("int8", "int4", "affine"):
        packed = got["blocks"]["0-1"][name].packed
        assert packed.sharding.shard_shape(packed.shape) == (2, 16 // 2, packed.shape[-1] // 4)
    equal(got, params)
    save(out, got)
    print("equal on eight")


def change(params: tree.Params, path: str, **fields) -> tree.Params:
    return tree.map_leaves(
        lambda p, leaf: dataclasses.replace(leaf, **fields) if p == path else leaf, params
    )


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("blocks/0-1/int4", {"bits": 2}),
        ("blocks/0-1/int4", {"activations": None}),
        ("blocks/2/affine", {"bits": 1, "pad": 1}),
        ("blocks/2/sparse", {"pad": 3}),
        ("blocks/0-1/sparse_pattern", {"pattern": None}),
    ],
)
def test_wrong_static_fields_are_refused_which_orbax_takes(path, fields, folder, tmp_path):
    params = build()
    wrong = alone(change(params, path, **fields))
    with ocp.StandardCheckpointer() as checkpointer:
        taken = checkpointer.restore(folder / "arrays", wrong)
    for name, value in fields.items():
        assert getattr(tree.flatten(taken)[path], name) == value
    layer = tree.layer_paths(path)[0]
    with pytest.raises(
        InputError, match=f"^fields: '{layer}' was stored as .*; the tree has .* there$"
    ):
        restore(folder, wrong)
    # and the other way round: the right tree, and a file in which somebody changed the field
    stored = json.loads((folder / "fields.json").read_text())
    stored["leaves"][layer] |= fields
    with pytest.raises(InputError, match="have changed since they were written"):
        check_fields(alone(params), stored)


if __name__ == "__main__":
    eight(Path(sys.argv[1]), Path(sys.argv[2]))
