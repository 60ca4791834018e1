"""Meshes and placement by rules: what lies where, and what is refused.

Numbers on meshes: tests/contracts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

from jaxmodel import sharding, tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.models import llama

MESH = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def specs(rules: tree.Rules, params: tree.Params, mesh: AbstractMesh = MESH) -> dict[str, P]:
    """The spec of every buffer by path."""
    placed = sharding.shardings(rules, params, mesh)[1]
    flat = jax.tree_util.tree_flatten_with_path(placed)[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", ""))) for k in path): s.spec
        for path, s in flat
    }


# ------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    "shape", ["fsdp=1,tensor=1", " fsdp = 1 , tensor=1 ", {"fsdp": 1, "tensor": 1}]
)
def test_make_mesh(shape):
    mesh = sharding.make_mesh(shape)
    assert dict(mesh.shape) == {"fsdp": 1, "tensor": 1}
    assert mesh.axis_names == ("fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert list(mesh.devices.flat) == jax.devices()[:1]


@pytest.mark.parametrize(
    "text", ["", "fsdp", "fsdp=", "fsdp=four", "fsdp=4;tensor=2", "=4", "fsdp=1,fsdp=1", "fsdp=1,"]
)
def test_a_mesh_that_is_not_readable(text):
    with pytest.raises(InputError, match=r"mesh: .* cannot be read; write it as 'fsdp=4,tensor=2'"):
        sharding.make_mesh(text)


@pytest.mark.parametrize("shape", ["fsdp=0", "fsdp=-1,tensor=-1", {}])
def test_a_mesh_without_devices(shape):
    with pytest.raises(InputError, match="a length of at least 1"):
        sharding.make_mesh(shape)


def test_more_devices_than_there_are():
    with pytest.raises(
        InputError, match=r"mesh: {'fsdp': 4, 'tensor': 2} needs 8 devices; there are 1"
    ):
        sharding.make_mesh("fsdp=4,tensor=2")


# -------------------------------------------------------------------------------------------- rules

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
        (
            [("norm", P(None, "fsdp")), (".*", P())],
            r"the leaf 'norm' has 1 axes \(8,\) but its spec",
        ),
        (
            [(".*/q", P(None, ("fsdp", "tensor"))), (".*", P())],
            r"does not divide the leaf 'blocks/2/q': axis 1 of \(8, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(rules, message):
    with pytest.raises(InputError, match=message):
        sharding.shardings(rules, PARAMS, MESH)


@pytest.mark.parametrize(
    ("axis", "hint"),
    [
        ("fdsp", "fsdp"),
        ("tenosr", "tensor"),
        ("Data", "data"),
        ("seq", "sequence"),
        ("expert", None),
    ],
)
def test_an_axis_that_nothing_uses_is_an_error(axis, hint):
    """A mistyped axis would place a copy of everything on each of its devices, and train on with
    none of them in use.
    """
    mesh = AbstractMesh((4, 2), (axis, "tensor"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(InputError) as error:
        sharding.shardings(RULES, PARAMS, mesh)
    assert str(error.value) == (
        f"mesh: the axis {axis!r} would hold 4 copies of everything, since no rule names it; "
        f"allowed: data, fsdp, pipeline, sequence, tensor{f' (nearest: {hint})' if hint else ''}"
    )
    one = AbstractMesh((1, 2), (axis, "tensor"), axis_types=(AxisType.Auto,) * 2)
    assert specs(RULES, PARAMS, one)["norm"] == P()  # one device holds no copies


def test_a_mesh_may_have_axes_that_only_rules_or_only_activations_know():
    def mesh(axis: str) -> AbstractMesh:
        return AbstractMesh((2,), (axis,), axis_types=(AxisType.Auto,))

    for axis in sharding.ACTIVATION_AXES:
        assert specs([(".*", P())], PARAMS, mesh(axis)) == dict.fromkeys(
            ["embed", "blocks/0-1/q", "blocks/2/q", "norm"], P()
        ) | {"blocks/0-1/q": P(None)}
    rules = [(tree.optional(".*/experts/.*"), P("expert", None)), (".*", P())]
    of_experts = {**PARAMS, "blocks": {"0": {"experts": {"up": struct(4, 8, 8)}}}}
    assert specs(rules, of_experts, mesh("expert"))["blocks/0/experts/up"] == P(("expert",), None)
    with pytest.raises(InputError, match="the axis 'tensor' would hold 2 copies"):
        sharding.shardings(rules, of_experts, mesh("tensor"))
    with pytest.raises(
        InputError, match="the axis 'expert' would hold 2 copies"
    ):  # the rule is there and decides no leaf
        sharding.shardings(rules, PARAMS, mesh("expert"))


def test_a_dense_model_has_no_use_for_an_axis_of_experts():
    mesh = AbstractMesh((2, 2), ("expert", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    for name, placed in (("tiny", False), ("tiny-moe", True)):
        model = llama.model(llama.SIZES[name])
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        if placed:
            assert specs(model.rules, shapes, mesh)["blocks/0-2/moe/up"] == P(
                None, ("expert",), None, ("fsdp",)
            )
            continue
        with pytest.raises(
            InputError,
            match="the axis 'expert' would hold 2 copies .* allowed: data, .*, sequence, tensor$",
        ):
            sharding.shardings(model.rules, shapes, mesh)


def test_a_compressed_leaf_gets_a_spec_for_each_part():
    groups = QTensor.from_codes(
        jnp.zeros((2, 8, 64), jnp.int32), jnp.ones((2, 8, 8)), bits=4, group=8
    )
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
        specs(
            [(".*", P(None, ("fsdp", "tensor")))],
            {"w": QTensor(rows.packed, jnp.ones((8, 4)), bits=8)},
        )


def test_place_puts_values_where_shardings_says():
    mesh = sharding.make_mesh("fsdp=1,tensor=1")
    params = {
        "embed": jnp.ones((4, 2)),
        "blocks": {"0-1": {"q": jnp.ones((2, 8, 8))}},
        "norm": jnp.ones(2),
    }
    placed = sharding.place(RULES, params, mesh)
    assert placed["embed"].sharding == NamedSharding(mesh, P(("tensor",), ("fsdp",)))
    jax.tree.map(np.testing.assert_array_equal, placed, params)


# --------------------------------------------------------------------------------- optimiser states


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
    placed = {
        "norm": NamedSharding(MESH, P("fsdp")),
        "block": {"norm": NamedSharding(MESH, P("tensor"))},
    }
    inherited = sharding.inherit(
        {"mu": {"norm": struct(8), "block": {"norm": struct(8)}}}, placed, MESH
    )["mu"]
    assert (inherited["norm"].spec, inherited["block"]["norm"].spec) == (P("fsdp"), P("tensor"))


def test_factored_moments_of_another_shape_are_everywhere():
    params = {"w": struct(256, 128), "bias": struct(8)}
    placed = sharding.shardings([("w", P("tensor", "fsdp")), ("bias", P("tensor"))], params, MESH)[
        1
    ]
    state = jax.eval_shape(optax.scale_by_factored_rms().init, params)
    inherited = sharding.inherit(state, placed, MESH)
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(inherited), strict=True):
        where.shard_shape(leaf.shape)  # raises where the mesh does not divide the leaf
    assert inherited.v["bias"].spec == P(("tensor",))
    assert inherited.v_row["w"].spec == P()


def codes(*shape: int, bits: int = 8, group: int | None = None) -> QTensor:
    scale = jnp.ones((*shape[:-1], -(-shape[-1] // group) if group else 1))
    return QTensor.from_codes(jnp.zeros(shape, jnp.int32), scale, bits=bits, group=group)


def inherited(moments: tree.Params, rules: tree.Rules, params: tree.Params) -> dict[str, P]:
    """Where the buffers of these moments lie, which is checked to be possible."""
    state = jax.eval_shape(
        lambda: (jnp.zeros((), jnp.int32), moments)
    )  # a count, and moments at the parameters' paths
    placed = sharding.inherit(state, sharding.shardings(rules, params, MESH)[1], MESH)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for buffer, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        where.shard_shape(buffer.shape)  # raises where the mesh does not divide the buffer
    flat = jax.tree_util.tree_flatten_with_path(placed[1])[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", ""))) for k in path): s.spec
        for path, s in flat
    }


def test_a_compressed_moment_derives_its_places_from_its_parameter():
    params = {
        "blocks": {"0-1": {"q": struct(2, 8, 64)}, "2": {"q": struct(8, 64)}},
        "norm": struct(64),
        "embed": struct(8, 64),
    }
    moments = {
        "blocks": {"0-1": {"q": codes(2, 8, 64, bits=4, group=8)}, "2": {"q": codes(8, 64)}},
        "norm": jnp.zeros(64),
        "embed": codes(8, 64, group=16),
    }
    rules = [("norm", P("tensor")), (".*", P("tensor", "fsdp"))]
    cut = P(("tensor",), ("fsdp",))
    stacked = P(None, ("tensor",), ("fsdp",))
    assert inherited(moments, rules, params) == {
        "blocks/0-1/q/packed": stacked,
        "blocks/0-1/q/scale": stacked,
        "blocks/2/q/packed": cut,
        "blocks/2/q/scale": P(("tensor",), None),  # a scale for a whole row
        "norm": P(("tensor",)),
        "embed/packed": cut,
        "embed/scale": cut,
    }
    sparse = Sparse.from_dense(jnp.tile(jnp.asarray([0.0, 0.0, 1.0, 1.0]), (8, 32)), pattern=(2, 4))
    assert inherited({"w": sparse}, rules[1:], {"w": struct(8, 128)}) == {
        "w/mask": cut,
        "w/values": cut,
    }


@pytest.mark.parametrize(
    ("moment", "spec"),
    [
        (codes(8, 64, group=32), P("tensor", "fsdp")),  # would split a group
        (codes(8, 60, bits=4, group=8), P("tensor", "fsdp")),  # ends in padding
        (codes(64, 256), P("tensor", None, "fsdp")),  # fewer axes than its parameter
        (codes(3, 64), P("tensor")),  # no two halves of its rows
        (
            Sparse.from_dense(jnp.ones((8, 64))),
            P("tensor", "fsdp"),
        ),  # kept values lie anywhere in a row
    ],
)
def test_a_compressed_moment_that_cannot_be_cut_so_is_everywhere(moment, spec):
    params = {"w": struct(8, 8, 8) if len(spec) == 3 else struct(8, 64)}
    assert all(not any(where) for where in inherited({"w": moment}, [("w", spec)], params).values())


def test_a_compressed_leaf_beside_its_compressed_parameter_lies_as_that_does():
    """What rides along in a state: an average, the best so far."""
    params = {"w": codes(8, 64, bits=4, group=8), "frozen": codes(8, 64)}
    rules = [("w", P("tensor", "fsdp")), ("frozen", P())]
    cut = P(("tensor",), ("fsdp",))
    got = inherited(params, rules, params)
    assert got == {
        "w/packed": cut,
        "w/scale": cut,
        "frozen/packed": P(None, None),
        "frozen/scale": P(None, None),
    }


# -------------------------------------------------------------------------------------- activations


def constrained(letters: str, table: sharding.AxisTable, *shape: int) -> str:
    with jax.sharding.use_abstract_mesh(MESH):
        return str(
            jax.make_jaxpr(lambda x: sharding.constrain(x, letters, table))(jnp.zeros(shape))
        )


def test_constrain():
    table = (("B", ("data", "fsdp")), ("F", "tensor"))
    assert "spec=P('fsdp', None, 'tensor')" in constrained("B T F", table, 4, 3, 6)
    assert "spec=P(None, None, 'tensor')" in constrained(
        "BTF", table, 3, 3, 6
    )  # what the mesh does not divide stays whole
    assert "sharding_constraint" not in constrained("BTF", (), 4, 3, 6)
    x = jnp.zeros((4, 3))
    assert sharding.constrain(x, "BT", table) is x  # without a mesh
    with pytest.raises(ValueError, match="zip"):
        constrained("BT", table, 4, 3, 6)
