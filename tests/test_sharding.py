"""Meshes and placement by rules: what lies where, and what is refused. Numbers on meshes: tests/contracts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodel import sharding, tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse

MESH = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def specs(rules: tree.Rules, params: tree.Params, mesh: AbstractMesh = MESH) -> dict[str, P]:
    """The spec of every buffer by path."""
    placed = sharding.shardings(rules, params, mesh)[1]
    flat = jax.tree_util.tree_flatten_with_path(placed)[0]
    return {"/".join(str(getattr(k, "key", getattr(k, "name", ""))) for k in path): s.spec for path, s in flat}


# -------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("shape", ["fsdp=1,tensor=1", " fsdp = 1 , tensor=1 ", {"fsdp": 1, "tensor": 1}])
def test_make_mesh(shape):
    mesh = sharding.make_mesh(shape)
    assert dict(mesh.shape) == {"fsdp": 1, "tensor": 1}
    assert mesh.axis_names == ("fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert list(mesh.devices.flat) == jax.devices()[:1]


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=", "fsdp=four", "fsdp=4;tensor=2", "=4", "fsdp=1,fsdp=1", "fsdp=1,"])
def test_a_mesh_that_is_not_readable(text):
    with pytest.raises(InputError, match=r"mesh: .* is not readable; write it as 'fsdp=4,tensor=2'"):
        sharding.make_mesh(text)


@pytest.mark.parametrize("shape", ["fsdp=0", "fsdp=-1,tensor=-1", {}])
def test_a_mesh_without_devices(shape):
    with pytest.raises(InputError, match="a length of 1 or more"):
        sharding.make_mesh(shape)


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match=r"mesh: {'fsdp': 4, 'tensor': 2} needs 8 devices; there are 1"):
        sharding.make_mesh("fsdp=4,tensor=2")


# --------------------------------------------------------------------------------------------------------------- rules

PARAMS = {
    "embed": struct(16, 8),
    "blocks": {"0-1": {"q": struct(2, 8, 8)}, "2": {"q": struct(8, 4)}},
    "norm": struct(8),
}
RULES = [("embed", P("tensor", "fsdp")), (".*/q", P(("fsdp", "tensor"))), ("norm", P())]


def test_rules_place_leaves_and_stacked_layers():
    assert specs(RULES, PARAMS) == {
        "embed": P(("tensor",), ("fsdp",)),
        "blocks/0-1/q": P(None, ("fsdp", "tensor")),
        "blocks/2/q": P(("fsdp", "tensor")),
        "norm": P(),
    }


def test_axes_that_the_mesh_lacks_are_left_out():
    small = AbstractMesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    assert specs(RULES, PARAMS, small) == {
        "embed": P(("tensor",), None),
        "blocks/0-1/q": P(None, ("tensor",)),
        "blocks/2/q": P(("tensor",)),
        "norm": P(),
    }


def test_layers_that_rules_tell_apart_are_split():
    params = {"blocks": {"0-3": {"q": jnp.zeros((4, 8, 8))}}}
    rules = [("blocks/0/q", P()), (".*", P("tensor"))]
    split, placed = sharding.shardings(rules, params, MESH)
    assert list(tree.flatten(split)) == list(tree.flatten(placed)) == ["blocks/0/q", "blocks/1-3/q"]
    assert placed["blocks"]["1-3"]["q"].spec == P(None, ("tensor",))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("embed", P())], "no rule covers the leaf"),
        ([*RULES, ("head", P())], "'head' matches no leaf"),
        ([("norm", P(None, "fsdp")), (".*", P())], r"the leaf 'norm' has 1 axes \(8,\) but its spec"),
        (
            [(".*/q", P(None, ("fsdp", "tensor"))), (".*", P())],
            r"does not divide the leaf 'blocks/2/q': axis 1 of \(8, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(rules, message):
    with pytest.raises(InputError, match=message):
        sharding.shardings(rules, PARAMS, MESH)


def test_a_compressed_leaf_gets_a_spec_for_each_part():
    groups = QTensor.from_codes(jnp.zeros((2, 8, 64), jnp.int32), jnp.ones((2, 8, 8)), bits=4, group=8)
    rows = QTensor.from_codes(jnp.zeros((8, 64), jnp.int32), jnp.ones((8, 1)), bits=8)
    sparse = Sparse.from_dense(jnp.ones((8, 16)))
    params = {"blocks": {"0-1": {"w": groups}}, "rows": rows, "sparse": sparse}
    got = specs([("sparse", P("tensor")), (".*", P("tensor", "fsdp"))], params)
    assert got == {
        "blocks/0-1/w/packed": P(None, ("tensor",), ("fsdp",)),
        "blocks/0-1/w/scale": P(None, ("tensor",), ("fsdp",)),
        "rows/packed": P(("tensor",), ("fsdp",)),
        "rows/scale": P(("tensor",), None),
        "sparse/mask": P(("tensor",), None),
        "sparse/values": P(("tensor",), None),
    }
    with pytest.raises(InputError, match="splits a group"):
        specs([(".*", P(None, ("fsdp", "tensor")))], {"w": QTensor(rows.packed, jnp.ones((8, 4)), bits=8)})


def test_place_puts_values_where_shardings_says():
    mesh = sharding.make_mesh("fsdp=1,tensor=1")
    params = {"embed": jnp.ones((4, 2)), "blocks": {"0-1": {"q": jnp.ones((2, 8, 8))}}, "norm": jnp.ones(2)}
    placed = sharding.place(RULES, params, mesh)
    assert placed["embed"].sharding == NamedSharding(mesh, P(("tensor",), ("fsdp",)))
    jax.tree.map(np.testing.assert_array_equal, placed, params)


# ----------------------------------------------------------------------------------------------------- optimiser states


def test_an_optimiser_state_lies_as_its_parameters_do():
    placed = sharding.shardings(RULES, PARAMS, MESH)[1]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, PARAMS)
    inherited = sharding.inherit(state, placed, MESH)
    assert jax.tree.structure(inherited) == jax.tree.structure(state)
    adam = inherited[1][0]
    assert adam.count.spec == P()
    for moment in (adam.mu, adam.nu):
        assert jax.tree.map(lambda s: s.spec, moment) == jax.tree.map(lambda s: s.spec, placed)


def test_the_longest_path_counts():
    """`norm` in a block is not the `norm` at the top."""
    placed = {"norm": NamedSharding(MESH, P("fsdp")), "block": {"norm": NamedSharding(MESH, P("tensor"))}}
    inherited = sharding.inherit({"mu": {"norm": struct(8), "block": {"norm": struct(8)}}}, placed, MESH)["mu"]
    assert (inherited["norm"].spec, inherited["block"]["norm"].spec) == (P("fsdp"), P("tensor"))


def test_factored_moments_of_another_shape_are_everywhere():
    params = {"w": struct(256, 128), "bias": struct(8)}
    placed = sharding.shardings([("w", P("tensor", "fsdp")), ("bias", P("tensor"))], params, MESH)[1]
    state = jax.eval_shape(optax.scale_by_factored_rms().init, params)
    inherited = sharding.inherit(state, placed, MESH)
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(inherited), strict=True):
        where.shard_shape(leaf.shape)  # raises where the mesh does not divide the leaf
    assert inherited.v["bias"].spec == P(("tensor",))
    assert inherited.v_row["w"].spec == P()


# ---------------------------------------------------------------------------------------------------------- activations


def constrained(letters: str, table: sharding.AxisTable, *shape: int) -> str:
    with jax.sharding.use_abstract_mesh(MESH):
        return str(jax.make_jaxpr(lambda x: sharding.constrain(x, letters, table))(jnp.zeros(shape)))


def test_constrain():
    table = (("B", ("data", "fsdp")), ("F", "tensor"))
    assert "spec=P('fsdp', None, 'tensor')" in constrained("B T F", table, 4, 3, 6)
    assert "spec=P(None, None, 'tensor')" in constrained("BTF", table, 3, 3, 6)  # what the mesh does not divide stays whole
    assert "sharding_constraint" not in constrained("BTF", (), 4, 3, 6)
    x = jnp.zeros((4, 3))
    assert sharding.constrain(x, "BT", table) is x  # without a mesh
    with pytest.raises(ValueError, match="zip"):
        constrained("BT", table, 4, 3, 6)
