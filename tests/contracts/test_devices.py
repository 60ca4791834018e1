"""What runs on one device runs on a mesh of eight and gives the same, for every family and every
compressed leaf.

The checks run once, in one process with eight simulated devices (see `outcomes8`); the tests here
read how they went. By hand: `JAX_NUM_CPU_DEVICES=8 python tests/run_checks.py
tests/contracts/test_devices.py check_meshes`.
"""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmodel import compress, ops, optim, plan, sharding, train, tree
from jaxmodel.compress.draft import _stored, draft_of, stored_of
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse, Turned, decode
from jaxmodel.models import families
from jaxmodel.train.state import init_state, state_shardings
from tests.contracts import test_chains
from tests.contracts.conftest import LINES_OF_PAGE

MESH = "fsdp=4,tensor=2"
B = 8
T = 6
STEPPED = ("connected", "llama", "resnet")  # matrices and tables, stacked; convolutions, statistics
READERS = ("gpt_oss", "llama")  # by `ragged`, by `einsum`
LOGITS = lambda vocab: (B // 4, T, vocab // 2)  # of a decoder, on one device


# -------------------------------------------------------------------------------------- the helpers


@functools.cache
def build(family: str):
    """The model on one device, the one whose policy places activations, large parameters,
    inputs.
    """
    module = families()[family]
    config = module.SIZES["tiny"]
    alone = module.model(config)
    placed = module.model(config, ops.Policy(axes=ops.MESH_AXES))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(alone.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.2, a.dtype), shapes)
    params = tree.map_leaves(
        lambda path, a: jnp.abs(a) + 0.5 if path.endswith("variance") else a, params
    )
    inputs = {}
    for name, a in alone.inputs(B, T).items():
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        inputs[name] = jnp.asarray(
            rng.integers(0, config.vocab, a.shape) if whole else rng.normal(size=a.shape), a.dtype
        )
    return alone, placed, params, inputs


@functools.cache
def on_one_device(family: str):
    """Logits and gradients, which the checks of a family share."""
    alone, _, params, inputs = build(family)
    run = jax.jit(jax.grad(functools.partial(loss, alone), has_aux=True))
    grads, logits = run(params, inputs)
    return logits, grads


def decodes(family: str) -> bool:
    """Whether a family reads one text and continues it."""
    return families()[family].model(families()[family].SIZES["tiny"]).continues


def loss(model, params, inputs):
    logits = model.apply(params, inputs).logits
    classes = (
        jnp.arange(logits[..., 0].size, dtype=jnp.int32).reshape(logits.shape[:-1])
        % logits.shape[-1]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean(), logits


def close(got, want, tolerance: float = 1e-5) -> None:
    """Equal in structure, shapes and dtypes, and in values relative to the largest of each leaf."""

    def error(a, b):
        return np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1)

    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    message = lambda a, b: f"{error(a, b)} of the largest apart, allowed: {tolerance}"
    chex.assert_trees_all_equal_comparator(
        lambda a, b: error(a, b) <= tolerance, message, got, want
    )


def quantise(
    w: jax.Array, bits: int = 8, group: int | None = None, tensor: bool = False, **static
) -> QTensor:
    n = w.shape[-1]
    grouped = np.pad(np.asarray(w), [(0, 0)] * (w.ndim - 1) + [(0, -n % (group or 1))])
    grouped = grouped.reshape(*w.shape[:-1], -1, group or n)
    scale = np.abs(grouped).max(-1) / (2 ** (bits - 1) - 1)
    scale = np.full_like(scale[..., :1, :], scale.max()) if tensor else scale
    codes = (
        np.round(grouped / scale[..., None]).astype(np.int32).reshape(*w.shape[:-1], -1)[..., :n]
    )
    return QTensor.from_codes(
        jnp.asarray(codes), jnp.asarray(scale), bits=bits, group=group, **static
    )


def affine(w: jax.Array, group: int) -> QTensor:
    grouped = np.asarray(w).reshape(*w.shape[:-1], -1, group)
    low = grouped.min(-1)
    scale = (grouped.max(-1) - low) / 15
    codes = (
        np.round((grouped - low[..., None]) / scale[..., None]).astype(np.int32).reshape(w.shape)
    )
    return QTensor.from_codes(
        jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(low), bits=4, group=group
    )


def sparse(w: jax.Array) -> Sparse:
    size = np.abs(np.asarray(w))
    return Sparse.from_dense(w, jnp.asarray(size >= np.median(size, axis=-1, keepdims=True)))


def refused(run, message: str) -> None:
    try:
        run()
    except InputError as error:
        assert re.search(message, str(error)), str(error)
    else:
        raise AssertionError(f"nothing raised; wanted: {message}")


# ------------------------------------------------------------------ the checks, one for each family


def check_a_training_step(family: str) -> None:
    """Logits and gradients; the moments of Adam would lie as their parameters do.

    Adam sees leaves, not families: it is run, and its moments looked at afterwards, for `STEPPED`.
    """
    alone, placed, params, inputs = build(family)
    logits, grads = on_one_device(family)
    optimizer = optax.adam(1e-2)
    mesh = sharding.make_mesh(MESH)
    params, places = sharding.shardings(alone.rules, params, mesh)
    on_mesh = jax.device_put(params, places)
    cut = [leaf for leaf in jax.tree.leaves(on_mesh) if not leaf.is_fully_replicated]
    assert sum(leaf.size for leaf in cut) > (0.9 if decodes(family) else 0.3) * tree.count(params)
    assert tree.fingerprint(on_mesh) == tree.fingerprint(params)
    state = jax.eval_shape(optimizer.init, params)
    inherited = sharding.inherit(state, places, mesh)
    for moment in (inherited[0].mu, inherited[0].nu):
        assert jax.tree.leaves(moment) == jax.tree.leaves(places)
    rows = NamedSharding(mesh, P("fsdp"))
    if family not in STEPPED:
        run = jax.jit(
            jax.grad(functools.partial(loss, placed), has_aux=True), out_shardings=(places, None)
        )
        with jax.set_mesh(mesh):
            found, computed = run(on_mesh, jax.device_put(inputs, rows))
        close((computed, found), (logits, grads))
        if decodes(family):
            assert computed.sharding.shard_shape(logits.shape) == LOGITS(alone.config.vocab)
        return
    before = jax.device_put(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state), inherited)

    @functools.partial(
        jax.jit, out_shardings=(None, places, inherited, places)
    )  # as `fit` does; else XLA cuts as it likes
    def step(params, state, inputs):
        (_, logits), grads = jax.value_and_grad(lambda p: loss(placed, p, inputs), has_aux=True)(
            params
        )
        updates, state = optimizer.update(grads, state, params)
        return logits, grads, state, optax.apply_updates(params, updates)

    with jax.set_mesh(mesh):
        got = step(on_mesh, before, jax.device_put(inputs, rows))
    close(got[:2], (logits, grads))
    # the first step by hand
    adam = got[2][0]
    assert int(adam.count) == 1
    close(adam.mu, jax.tree.map(lambda g: np.float32(0.1) * np.asarray(g), grads))
    close(adam.nu, jax.tree.map(lambda g: np.float32(0.001) * np.asarray(g) ** 2, grads))
    if decodes(family):
        assert got[0].sharding.shard_shape(logits.shape) == LOGITS(alone.config.vocab)
    for after in (adam.mu, adam.nu, got[3]):
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(on_mesh), strict=True):
            assert a.sharding.shard_shape(a.shape) == b.sharding.shard_shape(b.shape)
    # adam divides by the size of the gradient: where that is all rounding, so is its update
    for a, p, g in zip(
        *(map(np.asarray, jax.tree.leaves(x)) for x in (got[3], params, grads)), strict=True
    ):
        assert np.all((np.abs(a - (p - 0.01 * g / (np.abs(g) + 1e-8))) < 1e-4) | (np.abs(g) < 3e-5))


def check_cache(family: str) -> None:
    alone, placed, params, inputs = build(family)
    tokens = np.asarray(inputs["tokens"])
    want, _ = on_one_device(family)
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        run = jax.jit(placed.apply)
        on_mesh = sharding.place(alone.rules, params, mesh)
        first = run(on_mesh, jnp.asarray(tokens[:, : T // 2]), placed.init_cache(B, T))
        last = run(on_mesh, jnp.asarray(tokens[:, T // 2 :]), first.cache)
    close(np.concatenate([first.logits, last.logits], axis=1), want)


def check_compressed_leaves(family: str) -> None:
    """Layers of int8 rows, int4 in groups that divide with int8 activations, and sparse, cut by
    rows; an int8 table.

    The operations read such leaves, not the families: it is run for `READERS`.
    """
    alone, placed, params, inputs = build(family)
    tokens = inputs["tokens"]
    kinds = (quantise, lambda w: quantise(w, 4, group=8, activations="int8"), sparse)
    compressed = {}
    rows = []
    for path, leaf in tree.flatten(tree.unstack(jax.device_get(params))).items():
        leaf = jnp.asarray(leaf)
        if leaf.ndim != 2:
            compressed[path] = leaf
        elif not path.startswith("blocks/"):
            compressed[path] = quantise(leaf) if path == "embed" else leaf
        else:
            compressed[path] = kinds[int(path.split("/")[1]) % 3](leaf)
            rows += [path] if isinstance(compressed[path], Sparse) else []
    compressed = tree.unflatten(compressed)
    rules = [("|".join(rows), P("tensor")), *alone.rules]
    want = jax.jit(alone.apply)(compressed, tokens).logits
    mesh = sharding.make_mesh(MESH)
    on_mesh = sharding.place(rules, compressed, mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(placed.apply)(on_mesh, tokens).logits
    got = np.asarray(got)
    want = np.asarray(want)
    # a rounded activation on the edge between two codes may fall to either side
    assert np.sqrt(np.mean((got - want) ** 2)) < 1e-3 * np.std(want)
    assert np.median(np.abs(got - want)) < 1e-5
    cut = [
        a.sharding.shard_shape(a.shape) != a.shape
        for a in jax.tree.leaves(on_mesh)
        if a.size >= 512
    ]
    assert all(cut)
    assert tree.fingerprint(on_mesh) == tree.fingerprint(compressed)


# --------------------------------------------------------------------------------- the checks, once


def check_each_leaf_on_rows_and_columns() -> None:
    """einsum and take of every leaf that can be cut so, by rows, by columns and by both."""
    mesh = sharding.make_mesh(MESH)
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 64), (8, 64)))
    keep = np.argsort(np.argsort(-np.abs(np.asarray(w)).reshape(16, 16, 4)), axis=-1) < 2
    two_of_four = Sparse.from_dense(w, jnp.asarray(keep.reshape(16, 64)), pattern=(2, 4))
    anywhere = {
        "array": w,
        "int8": quantise(w),
        "int8 tensor": quantise(w, tensor=True),
        "dynamic": quantise(w, activations="int8"),
        "int4 rows": quantise(w, 4),
        "int4 groups": quantise(w, 4, group=8),
        "affine groups": affine(w, 16),
        "turned int8": Turned(quantise(w, activations="int8"), hadamard=64),
        "fp8 limit": QTensor.from_codes(
            (w * 100).astype(jnp.float8_e4m3fn),
            jnp.full((16, 1), 0.01, jnp.float32),
            bits=8,
            activations="int8",
            limit=jnp.full((1, 1), 2.0, jnp.float32),
            form="e4m3",
        ),
    }
    by_rows = {
        "int3 padded": quantise(w[:, :45], 3),
        "int4 padded": quantise(w[:, :60], 4, group=16),
        "ternary padded": QTensor.from_codes(
            jnp.sign(w[:, :48]).astype(jnp.int32), jnp.ones((16, 1)), bits=2, form="ternary"
        ),
        "sparse": sparse(w),
    }
    ids = jnp.asarray(rng.integers(0, 16, (2, 5)), jnp.int32)
    both = jax.jit(lambda leaf, x: (ops.einsum("BD,FD->BF", x, leaf), ops.embed(leaf, ids)))
    rows = P(("fsdp", "tensor"))
    columns = P("fsdp", "tensor")
    cases = [(leaf, spec) for leaf in anywhere.values() for spec in (rows, P("tensor", "fsdp"))]
    for leaf, spec in [
        *cases,
        *((leaf, rows) for leaf in by_rows.values()),
        (two_of_four, columns),
    ]:
        narrow = x[:, : leaf.shape[-1]]
        placed = sharding.place([("w", spec)], {"w": leaf}, mesh)["w"]
        main = jax.tree.leaves(placed)[0]
        assert (
            main.sharding.shard_shape(main.shape)[0] * (8 if spec == rows else mesh.shape[spec[0]])
            == 16
        )
        with jax.set_mesh(mesh):
            close(both(placed, narrow), both(leaf, narrow), 2e-5)


def check_stacked_leaves_scan_on_a_mesh() -> None:
    mesh = sharding.make_mesh(MESH)
    rng = np.random.default_rng(0)
    w, x = (
        jnp.asarray(rng.normal(size=shape) / 6, jnp.float32) for shape in ((3, 32, 32), (8, 32))
    )
    body = lambda x, leaf: (jnp.tanh(ops.einsum("BD,FD->BF", x, leaf)), None)
    run = jax.jit(lambda leaf, x: jax.lax.scan(body, x, leaf)[0])
    for leaf, spec in (
        (quantise(w, 4, group=8), P("tensor", "fsdp")),
        (sparse(w), P("tensor")),
        (w, P("tensor", "fsdp")),
    ):
        params = {"blocks": {"0-2": {"w": leaf}}}
        with jax.set_mesh(mesh):
            placed = sharding.place([(".*", spec)], params, mesh)["blocks"]["0-2"]["w"]
            got = run(placed, x)
        assert all(not a.is_fully_replicated for a in jax.tree.leaves(placed))
        close(got, run(leaf, x))


def momentum_in_8_bits(group: int, rate: float = 0.125) -> optax.GradientTransformation:
    """Momentum that is stored as codes; its scales are powers of two, so that sums and products of
    small numbers are exact.
    """

    def store(m: jax.Array) -> jax.Array | QTensor:
        if m.ndim < 2:
            return m
        grouped = m.reshape(*m.shape[:-1], -1, group)
        scale = jnp.ldexp(jnp.float32(1), jnp.frexp(jnp.abs(grouped).max(-1))[1] - 7)
        codes = (
            jnp.clip(jnp.round(grouped / scale[..., None]), -127, 127)
            .astype(jnp.int32)
            .reshape(m.shape)
        )
        return QTensor.from_codes(codes, scale, bits=8, group=group)

    def update(grads, state, params=None):
        moments = jax.tree.map(lambda g, m: 0.5 * decode(m) + g, grads, state)
        return jax.tree.map(lambda m: -rate * m, moments), jax.tree.map(store, moments)

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: store(jnp.zeros_like(p)), params), update
    )


def check_moments_in_8_bits_lie_with_their_parameters() -> None:
    """Before and after steps, whose results are equal to the bit; a moment whose groups cannot be
    cut is everywhere.
    """
    rng = np.random.default_rng(0)
    shapes = {
        "blocks": {"0-2": {"up": (3, 16, 64)}, "3": {"up": (16, 64)}},
        "embed": (64, 16),
        "norm": (16,),
    }
    whole = lambda shape: jnp.asarray(rng.integers(-100, 101, shape), jnp.float32)
    params = jax.tree.map(whole, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    rules = [("norm", P()), (".*", P("tensor", "fsdp"))]
    optimizer = momentum_in_8_bits(group=8)

    def step(state: train.TrainState) -> train.TrainState:
        grads = jax.grad(lambda p: sum(jnp.sum(leaf * leaf) / 2 for leaf in jax.tree.leaves(p)))(
            state.params
        )
        updates, opt_state = optimizer.update(grads, state.opt_state)
        return train.TrainState(
            state.step + 1, state.data_step, optax.apply_updates(state.params, updates), opt_state
        )

    state = init_state(params, optimizer)
    mesh = sharding.make_mesh(MESH)
    places = state_shardings(state, rules, mesh)
    on_mesh = jax.device_put(state, places)
    run = jax.jit(step, out_shardings=places)
    for _ in range(3):
        moments = on_mesh.opt_state
        for moment, lead in (
            (moments["blocks"]["0-2"]["up"], (3,)),
            (moments["blocks"]["3"]["up"], ()),
        ):
            assert moment.packed.sharding.shard_shape(moment.packed.shape) == (
                *lead,
                16 // 2,
                64 // 4,
            )
            assert moment.scale.sharding.shard_shape(moment.scale.shape) == (
                *lead,
                16 // 2,
                64 // 8 // 4,
            )
        assert all(
            a.is_fully_replicated for a in jax.tree.leaves(moments["embed"])
        )  # two groups a row, not for four devices
        assert not on_mesh.params["embed"].is_fully_replicated
        state = jax.jit(step)(state)
        with jax.set_mesh(mesh):
            on_mesh = run(on_mesh)
        chex.assert_trees_all_equal(jax.device_get(on_mesh), jax.device_get(state), strict=True)
    assert len(np.unique(state.opt_state["embed"].packed)) > 50  # the codes mean something


def check_what_cannot_be_cut_is_refused() -> None:
    mesh = sharding.make_mesh(MESH)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
    cut = lambda leaf, spec: lambda: sharding.place([("w", spec)], {"w": leaf}, mesh)
    refused(
        cut(quantise(w, 4, group=32), P(None, "fsdp")),
        "64 codes into 4 parts, which splits a group of 32",
    )
    refused(cut(quantise(w[:, :4], 4), P(None, "fsdp")), "splits a byte of 2")
    refused(cut(quantise(w[:, :60], 4, group=8), P(None, "tensor")), "cuts the last axis of 60")
    refused(cut(sparse(w), P(None, "tensor")), "only an N:M pattern")
    refused(
        cut(w[:6], P("fsdp")),
        "does not divide the leaf 'w': axis 0 of .6, 64. has length 6, which fsdp = 4",
    )
    cut(quantise(w, 4, group=32), P(None, "tensor"))()  # two groups of 32 on two devices


def check_meshes() -> None:
    assert sharding.make_mesh("data=2,fsdp=2,tensor=2").devices.shape == (2, 2, 2)
    assert list(sharding.make_mesh("fsdp=3").devices.flat) == jax.devices()[:3]
    last = sharding.make_mesh({"fsdp": 4}, jax.devices()[4:])
    assert {device.id for device in last.devices.flat} == {4, 5, 6, 7}
    refused(lambda: sharding.make_mesh("fsdp=4,tensor=4"), "needs 16 devices; there are 8")
    refused(lambda: sharding.make_mesh("fsdp=8", jax.devices()[:4]), "needs 8 devices; there are 4")


def check_a_mistyped_axis_is_refused() -> None:
    """It would place copies, and a run would go on without use of the devices."""
    mesh = sharding.make_mesh("fdsp=4")
    rules = [("w", P("tensor", "fsdp"))]
    params = {"w": jnp.ones((8, 8))}
    message = (
        r"the axis 'fdsp' would hold 4 copies .* allowed: data, fsdp, sequence, tensor "
        r"\(nearest: fsdp\)"
    )
    refused(lambda: sharding.place(rules, params, mesh), message)
    refused(lambda: state_shardings(init_state(params, optax.adam(0.1)), rules, mesh), message)
    assert sharding.place(rules, params, sharding.make_mesh("fdsp=1,fsdp=8"))[
        "w"
    ].sharding.shard_shape((8, 8)) == (8, 1)


BY_ROWS = (
    "magnitude(0.5)",
    "magnitude(0.4, scope='leaf')",
    "magnitude(pattern=(2, 4))",
    "wanda(0.5)",
    "rtn(4)",
    "gptq(4)",
    "sparsegpt(0.5)",
    "obs(0.5)",
    "wanda(0.5) | gptq(4)",
)
"""Chains whose rows meet in counts at most, so that no device sends its weights."""


def check_chains_by_rows() -> None:
    """The same leaves on 1, 2, 4 and 8 devices, and no weights sent, by the compiled program."""
    stats = {**test_chains.STATS}

    def known(chain, args):
        draft = draft_of.eval_shape(chain, *args)
        return draft.keep is None or draft.kept is not None

    for text in BY_ROWS:
        chain = compress.parse(text)
        want = None
        for count in (1, 2, 4, 8) if text == BY_ROWS[-1] else (1, 8):
            mesh = sharding.make_mesh(f"fsdp={count}", jax.devices()[:count])
            everywhere = lambda tree, mesh=mesh: jax.device_put(tree, NamedSharding(mesh, P()))
            rows = jax.device_put(test_chains.WEIGHT, NamedSharding(mesh, P(None, "fsdp")))
            args = rows, everywhere(stats), everywhere(test_chains.KEYS)
            program = stored_of.lower(chain, *args).compile() if known(chain, args) else None
            if program is None:  # how much a row keeps is read between two programs
                first = draft_of.lower(chain, *args).compile()
                draft = first(*args)
                kept = int(jnp.max(jnp.sum(draft.keep, -1)))
                storing = _stored.lower(draft, kept).compile()
                programs, found = (first, storing), (storing(draft), draft.notes)
            else:
                programs, found = (program,), program(*args)
            sent = [one for program in programs for one in plan.collectives(program)]
            weights = rows[0].nbytes // count
            big = [one for one in sent if one.bytes >= weights]
            assert not big, f"{text} on {count} devices sends {big}"
            found = jax.device_get(found)
            want = found if want is None else want
            chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)


def check_sparse_training() -> None:
    """Masks lie with their weights; the same connections as on one device.

    The optimizers see leaves and gradients, which here are not those of a loss.
    """
    alone, _, params, _ = build("llama")
    wrapped = {
        "rewire": optim.rewire(optax.sgd(0.1), 0.75, grow="random", every=1),
        "prune": optim.prune_gradually(optax.sgd(0.1), 0.5, begin=0, end=2, every=1),
    }
    mesh = sharding.make_mesh(MESH)
    for optimizer in wrapped.values():
        state = init_state(params, optimizer)
        places = state_shardings(state, alone.rules, mesh)

        def step(state, optimizer=optimizer):
            grads = jax.tree.map(lambda p: jnp.cos(37 * p), state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return train.TrainState(state.step, state.data_step, params, opt_state)

        run = jax.jit(step)
        spread = jax.jit(step, out_shardings=places)
        on_mesh = jax.device_put(state, places)
        for _ in range(2):
            state = run(state)
            with jax.set_mesh(mesh):
                on_mesh = spread(on_mesh)
        masks = on_mesh.opt_state.masks
        for path, mask in tree.flatten(masks).items():
            beside = tree.flatten(on_mesh.params)[path]
            assert mask.sharding.shard_shape(mask.shape) == beside.sharding.shard_shape(mask.shape)
            want = np.asarray(tree.flatten(state.opt_state.masks)[path])
            assert 0.2 < np.mean(want) < 0.8 and np.mean(np.asarray(mask) != want) < 0.01
            assert not np.any(np.asarray(beside)[~np.asarray(mask)])


CHECKS = (
    check_chains_by_rows,
    check_sparse_training,
    check_each_leaf_on_rows_and_columns,
    check_stacked_leaves_scan_on_a_mesh,
    check_moments_in_8_bits_lie_with_their_parameters,
    check_what_cannot_be_cut_is_refused,
    check_meshes,
    check_a_mistyped_axis_is_refused,
)
assert "parallel" in families() and LINES_OF_PAGE <= 120, (
    "the family of the how-to keeps the laws, in few lines"
)
NAMES = [f"{check_a_training_step.__name__}:{family}" for family in families()]
NAMES += [f"{check_cache.__name__}:{family}" for family in families() if decodes(family)]
NAMES += [f"{check_compressed_leaves.__name__}:{family}" for family in READERS]
NAMES += [check.__name__ for check in CHECKS]


# ---------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def outcome(outcomes8):
    return outcomes8(__file__, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_on_eight_devices(name, outcome):
    assert not outcome[name], outcome[name]
