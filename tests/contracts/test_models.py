"""The laws that every architecture keeps. Members are discovered (see conftest.py): a new file in
models/ is tested as it is.

What each member declares and computes is tested for `case`, any of them; what they share, for
`kind`, one of each kind; `form` is for code that is one for all (wrappers, dtypes).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

from jaxmodel import axes, ops, sharding, tree
from jaxmodel.cli.inspect import COUNTS
from jaxmodel.layers import fuse, unfuse
from jaxmodel.leaves import QTensor, decode
from jaxmodel.models import Output, families, wrap


def close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance, strict=True)


# --------------------------------------------------------------------------------------- the record


def test_config_is_frozen_and_equal_arguments_give_the_same_model(case):
    make = case.module.model
    config = case.model.config
    assert isinstance(config, case.module.Config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 1
    again = dataclasses.replace(config)
    assert again is not config
    assert make(again) is case.model
    assert make(again, ops.Policy()) is make(again, ops.Policy())
    assert make(config, ops.Policy(compute_dtype="bfloat16")) is not case.model
    assert case.model.policy == ops.Policy()


def test_params_are_a_plain_dict_of_arrays(case):
    def check(node):
        if isinstance(node, dict):
            assert type(node) is dict
            assert all(isinstance(key, str) and "/" not in key for key in node)
            return [leaf for child in node.values() for leaf in check(child)]
        return [node]

    leaves = check(case.shapes)
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.float32 for leaf in leaves
    )
    if "blocks" in case.shapes:
        tree.segments(case.shapes["blocks"])  # whole, or it raises


def test_first_params_are_finite_and_follow_from_the_key(kind):
    params = kind.init(jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, kind.params)
    other = kind.init(jax.random.key(1))
    assert tree.fingerprint(params) == tree.fingerprint(kind.init(jax.random.key(0)))
    assert tree.fingerprint(params) != tree.fingerprint(other)


@functools.cache
def shapes_of(family: str) -> dict[str, tree.Params]:
    """The shapes of the parameters of every size of a family, the tiny ones first; without their
    arrays.
    """
    module = families()[family]
    sizes = sorted(module.SIZES, key=lambda name: not name.startswith("tiny"))
    return {
        name: jax.eval_shape(module.model(module.SIZES[name]).init, jax.random.key(0))
        for name in sizes
    }


@pytest.mark.parametrize("family", families())
def test_every_leaf_has_axes_and_no_rule_is_dead(family):
    used = set()
    module = families()[family]
    for name, shapes in shapes_of(family).items():
        model = module.model(module.SIZES[name])
        assert set(axes.roles(model.axes, shapes).values()) <= set(axes.ROLES)
        specs = tree.assign(model.rules, shapes)
        for path, leaf in tree.flatten(shapes).items():
            shape = tree.layer_shape(path, leaf)
            for layer in tree.layer_paths(path):
                assert isinstance(specs[layer], P) and len(specs[layer]) <= len(shape), layer
                cut = {
                    axis
                    for entry in specs[layer]
                    if entry
                    for axis in ((entry,) if isinstance(entry, str) else entry)
                }
                assert cut or np.prod(shape) < 2**20, (
                    f"{name}: {layer} {shape} is cut over no axis, so a big one does not fit"
                )
        if name.startswith("tiny"):
            used |= set(map(str, specs.values()))
        else:
            assert set(map(str, specs.values())) <= used, (
                f"{name} has a leaf that no tiny member has"
            )


@pytest.mark.parametrize("family", families())
def test_stored_counts_are_true(family):
    """If not:

    `python -c "from jaxmodel.cli import inspect; inspect.store_counts()"`. A size that is not
    stored is counted.
    """
    stored = json.loads(COUNTS.read_text())
    for name, shapes in shapes_of(family).items():
        if (size := stored.get(f"{family}/{name}")) is not None:
            assert size["parameters"] == tree.count(shapes), name


# ---------------------------------------------------------------------------------------- functions


def composed(model, params, inputs):
    """What `apply` should compute, by the parts alone."""
    embed, block, head = model.parts
    x, context = embed(params, inputs)
    context.pop("aux", None)
    for i, layer in tree.unstack(params)["blocks"].items() if block is not None else ():
        x, cache, aux = block(layer, x, context, None, int(i))
        assert cache is None
        assert all(value.shape == () for value in aux.values())
    return head(params, x), x


def test_parts_compose_and_hidden_has_no_logits(kind):
    """What each family declares; the composition is code that is one for all, see below."""
    found = jax.eval_shape(kind.run, kind.model, kind.params, kind.inputs)
    run = functools.partial(composed, kind.model)
    assert jax.eval_shape(run, kind.params, kind.inputs) == found
    out = jax.eval_shape(
        kind.model.hidden, kind.params, kind.inputs
    )  # what it computes: the test of wrapped models
    assert isinstance(out, Output)
    assert out.logits is None


def test_apply_is_the_composition_of_its_parts(form):
    run = jax.jit(functools.partial(composed, form.model))
    close(form.run(form.model, form.params, form.inputs), run(form.params, form.inputs))


def test_logits_are_large_float32(case):
    logits = case.apply(case.params, case.inputs)
    assert logits.dtype == jnp.float32
    assert np.abs(logits).max() > 0.3  # the tolerances of the laws mean something


def test_an_array_alone_is_the_one_input(kind):
    if len(kind.inputs) == 1:
        (only,) = kind.inputs.values()
        program, same = (
            kind.run.lower(kind.model, kind.params, inputs).as_text()
            for inputs in (kind.inputs, only)
        )
        assert program == same
    else:
        with pytest.raises(ValueError, match=f"allowed: a dict of {', '.join(kind.inputs)}"):
            kind.apply(kind.params, next(iter(kind.inputs.values())))


def test_the_second_call_traces_nothing(case):
    case.apply(case.params, case.inputs)
    traced = len(case.traces)
    model = case.module.model(
        dataclasses.replace(case.model.config)
    )  # built anew from an equal config
    case.run(
        model, jax.tree.map(lambda a: jnp.asarray(np.asarray(a) + 1), case.params), case.inputs
    )
    assert len(case.traces) == traced
    case.run.eval_shape(case.model.with_policy(ops.Policy(remat="full")), case.params, case.inputs)
    assert len(case.traces) == traced + 1  # another model is another program, so this does count


def in_bfloat16_is_close(case, activations: str) -> None:
    model = case.model.with_policy(
        ops.Policy(compute_dtype="bfloat16", activation_dtype=activations)
    )
    run = jax.jit(
        lambda params, inputs: model.apply(tree.cast(params, jnp.bfloat16), inputs).logits
    )
    logits = run(case.params, case.inputs)
    want = np.asarray(case.apply(case.params, case.inputs))
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((np.asarray(logits) - want) ** 2)) < 0.05 * np.std(want)


def test_bfloat16_is_close_and_logits_stay_float32(kind):
    """Products and what lies between them, which rounds most; the latter in float32: see below."""
    in_bfloat16_is_close(kind, "bfloat16")


def test_bfloat16_with_activations_in_float32_is_close(form):
    in_bfloat16_is_close(form, "float32")


# ------------------------------------------------------------------------------ segments and leaves


def test_segments_do_not_change_the_function(kind):
    close(kind.apply(kind.apart, kind.inputs), kind.apply(kind.params, kind.inputs))


def test_mixed_compressed_layers_run_close_to_their_decoded_version(kind):
    decoded = jax.jit(lambda params: tree.map_leaves(lambda _, leaf: decode(leaf), params))(
        kind.mixed
    )
    want = np.asarray(kind.apply(decoded, kind.inputs))
    close(kind.of_mixed, want)
    assert (
        np.abs(want - np.asarray(kind.apply(kind.params, kind.inputs))).max() > 0.05
    )  # they are compressed


def test_int8_activations_are_close_to_those_that_are_not_rounded(form):
    """The leaf asks for it and the contraction does it, whoever the model is."""
    want = np.asarray(form.of_mixed)
    # of_mixed is in floating point; what remains is the rounding of activations
    dynamic = jax.tree.map(
        lambda leaf: (
            dataclasses.replace(leaf, activations="int8") if isinstance(leaf, QTensor) else leaf
        ),
        form.mixed,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    error = np.asarray(form.apply(dynamic, form.inputs)) - want
    assert 0 < np.sqrt((error**2).mean()) < 0.1 * np.std(want)


def test_fused_equals_unfused(kind):
    if not kind.model.axes.fused:
        assert fuse(kind.params, kind.model.axes.fused).keys() == kind.params.keys()
        return

    @jax.jit
    def run(params, inputs):
        fused = fuse(params, kind.model.axes.fused)
        return kind.model.apply(fused, inputs).logits, unfuse(fused)

    logits, again = run(kind.params, kind.inputs)
    close(logits, kind.apply(kind.params, kind.inputs), 1e-5)
    chex.assert_trees_all_equal(again, kind.params, strict=True)


def test_fused_equals_unfused_with_leaves_of_several_kinds(form):
    """What `fuse` joins it decides by the leaves, under the same names in all models."""
    logits = jax.jit(
        lambda params, inputs: form.model.apply(fuse(params, form.model.axes.fused), inputs).logits
    )(form.mixed, form.inputs)
    close(logits, form.of_mixed, 1e-5)


# ----------------------------------------------------------------------------------------- training


def trains(path: str) -> bool:
    """Statistics are set, not trained; softmax does not see a shift of all scores: biases of keys,
    SigLIP's of its logits.
    """
    return not path.endswith(("/mean", "/variance", "k_bias")) and path != "bias"


def adam(params, grads, moments, step: int, rate: float = 1e-2):
    """One step of Adam in NumPy, which compiles nothing."""

    def move(p, g, m, v):
        m[...], v[...] = 0.9 * m + 0.1 * np.asarray(g), 0.999 * v + 0.001 * np.asarray(g) ** 2
        return p - np.float32(rate) * (m / (1 - 0.9**step)) / (
            np.sqrt(v / (1 - 0.999**step)) + np.float32(1e-8)
        )

    return jax.tree.map(move, params, grads, *moments)


def test_the_loss_falls(kind):
    params = jax.device_get(kind.init(jax.random.key(0)))
    moments = [jax.tree.map(np.zeros_like, params) for _ in range(2)]
    losses = []
    for step in range(1, 41):
        loss, grads = kind.gradients(params, kind.inputs)
        params = adam(params, grads, moments, step)
        losses.append(float(loss))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.6 * losses[0]


def test_gradients_reach_every_leaf(case):
    _, grads = case.gradients(case.params, case.inputs)
    for path, grad in tree.flatten(grads).items():
        assert np.abs(np.asarray(grad)).max() > 1e-6 or not trains(path), path


def test_one_step_lowers_on_an_abstract_mesh(kind):
    """For a TPU pod that is not there: no device of it is needed before compilation."""
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = kind.module.model(
        kind.model.config, ops.Policy("bfloat16", "bfloat16", remat="full", axes=ops.MESH_AXES)
    )
    params, placed = sharding.shardings(
        model.rules, jax.eval_shape(model.init, jax.random.key(0)), mesh
    )
    optimizer = optax.sgd(1e-3, momentum=0.9)  # Adam's moments: test_devices.py
    state = jax.eval_shape(optimizer.init, params)

    def on(shapes, shardings):
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        )

    def step(params, state, inputs):
        loss, grads = jax.value_and_grad(lambda p: kind.loss(model, p, inputs))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("fsdp"))),
        model.inputs(8, 8),
    )
    arguments = on(params, placed), on(state, sharding.inherit(state, placed, mesh)), batch
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert "num_partitions = 8" in text
    assert text.count("sharding_constraint") >= 1  # activations are placed too


def test_a_wrapped_model_is_wrapped_everywhere(form):
    """Also in what runs the parts on their own (losses, prefill, perplexity), and under another
    policy.
    """

    def quieter(parts):
        return parts._replace(
            embed=lambda *args: (lambda x, context: (0 * x, context))(*parts.embed(*args))
        )

    wrapped = wrap(form.model, quieter)
    other = wrapped.with_policy(ops.Policy(compute_dtype="bfloat16"))
    assert other.policy.compute_dtype == "bfloat16"

    @jax.jit
    def run(params, inputs):
        def both(model):
            return model.parts.embed(params, inputs, None, None, False)[0], model.apply(
                params, inputs
            )

        return (both(wrapped), both(other)), wrapped.hidden(params, inputs).hidden

    outs, hidden = run(form.params, form.inputs)
    for x, out in outs:
        assert not np.any(x)
        assert hidden.shape == out.hidden.shape
        assert (
            np.abs(np.asarray(out.logits) - np.asarray(form.apply(form.params, form.inputs))).max()
            > 1e-2
        )
    np.testing.assert_array_equal(hidden, outs[0][1].hidden)
    with pytest.raises(ValueError, match="init=False"):
        dataclasses.replace(form.model, apply=lambda params, inputs: None)
