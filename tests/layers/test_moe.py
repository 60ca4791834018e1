"""The mixture of experts against a loop over tokens; transformers' own results:
tests/hub/test_goldens.py.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, layers, ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.moe import load_balance
from jaxmodel.leaves import decode
from jaxmodel.models import llama

B = 3
T = 8
D = 16
F = 12
E = 5


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def moe(chosen: int, policy: ops.Policy = ops.Policy()) -> layers.MoE:
    init = nn.initializers.normal(0.3)
    return layers.MoE(E, chosen, F, nn.silu, init, init, policy)


@functools.cache
def params() -> tree.Params:
    return jax.jit(moe(2).init)(jax.random.key(0), normal(B, T, D))["params"]


@functools.partial(jax.jit, static_argnames=("chosen", "policy"))
def run(
    chosen: int,
    p: tree.Params,
    x: jax.Array,
    real: jax.Array | None = None,
    policy: ops.Policy = ops.Policy(),
):
    return moe(chosen, policy).apply({"params": p}, x, real)


def token_by_token(
    chosen: int, p: tree.Params, x: jax.Array, real: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """In float64: each token with the experts of its largest scores; and the loss of balance from
    its definition.
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    rows = np.asarray(x, np.float64).reshape(-1, D)
    out = np.zeros_like(rows)
    used = np.zeros(E)
    probability = np.zeros(E)
    tokens = 0
    for i, row in enumerate(rows):
        if real is not None and not real.reshape(-1)[i]:
            continue
        scores = p["router"] @ row
        best = np.argsort(-scores)[:chosen]
        for e in best:
            gate = p["gate"][e] @ row
            up = p["up"][e] @ row
            part = p["down"][e] @ (gate / (1 + np.exp(-gate)) * up)
            out[i] += (
                np.exp(scores[e] - scores.max()) / np.exp(scores[best] - scores.max()).sum() * part
            )
            used[e] += 1
        probability += np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        tokens += 1
    return out.reshape(x.shape), E * float((used / tokens) @ (probability / tokens))


def test_leaves():
    assert jax.tree.map(jnp.shape, params()) == {
        "router": (E, D),
        "gate": (E, F, D),
        "up": (E, F, D),
        "down": (E, D, F),
    }


@pytest.mark.parametrize("chosen", [1, 2, E])
def test_equals_token_by_token(chosen):
    x = normal(B, T, D, seed=1)
    got, aux = run(chosen, params(), x)
    want, balance = token_by_token(chosen, params(), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert float(aux["load_balance"]) == pytest.approx(balance, rel=1e-5)
    assert aux["load_balance"].shape == () and np.abs(want).max() > 0.3


def test_padding_is_sent_to_no_expert():
    x = normal(B, T, D, seed=1)
    real = np.arange(T) < np.array([[3], [8], [5]])
    got, aux = run(2, params(), x, jnp.asarray(real))
    want, balance = token_by_token(2, params(), x, real)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(got)[~real])
    assert float(aux["load_balance"]) == pytest.approx(balance, rel=1e-5)
    other = jnp.where(real[..., None], x, normal(B, T, D, seed=2))
    np.testing.assert_array_equal(run(2, params(), other, jnp.asarray(real))[0], got)
    nothing, aux = run(2, params(), x, jnp.zeros((B, T), bool))
    assert not np.any(nothing) and float(aux["load_balance"]) == 0


def test_all_to_one_expert():
    """No token is dropped, however uneven the choice is; the loss is then as large as it can be."""
    skewed = {**params(), "router": jnp.zeros((E, D)).at[3].set(50.0)}
    x = jnp.abs(normal(B, T, D, seed=1))
    got, aux = run(1, skewed, x)
    np.testing.assert_allclose(got, token_by_token(1, skewed, x)[0], rtol=1e-4, atol=1e-5)
    assert float(aux["load_balance"]) == pytest.approx(E, rel=1e-5)
    even = load_balance(jnp.zeros((20, E)), jnp.full(E, 8))
    assert float(even) == pytest.approx(2)  # two for each token, all alike


def test_the_balance_has_a_gradient_for_the_router_only():
    x = normal(B, T, D, seed=1)
    grads = jax.grad(lambda p: run(2, p, x)[1]["load_balance"])(params())
    assert np.abs(grads["router"]).max() > 1e-3
    assert not any(np.any(grads[name]) for name in ("gate", "up", "down"))
    better = {**params(), "router": params()["router"] - 0.01 * grads["router"]}
    assert run(2, better, x)[1]["load_balance"] < run(2, params(), x)[1]["load_balance"]


def test_the_router_is_float32_whatever_the_policy():
    """Two experts whose scores bfloat16 cannot tell apart."""
    close = {**params(), "router": jnp.zeros((E, D)).at[1, 0].set(1.0).at[2, 0].set(1.0001)}
    x = jnp.ones((1, 1, D))
    got, _ = run(1, close, x, policy=ops.Policy(compute_dtype="bfloat16"))
    np.testing.assert_allclose(got, token_by_token(1, close, x)[0], rtol=0.05, atol=0.02)
    wrong = {**close, "router": close["router"].at[2, 0].set(0.9999)}
    assert np.abs(got - token_by_token(1, wrong, x)[0]).max() > 0.1


@pytest.mark.parametrize("kind", ["array", "int8"])
def test_fused(kind):
    x = normal(B, T, D, seed=1)
    p = {"blocks": {"0": {"moe": params()}}}
    if kind == "int8":
        p, _ = compress.apply([("blocks/.*/(gate|up)", "rtn(bits=8)"), (".*", ())], p)
    fused = layers.fuse(p)
    assert set(fused["blocks"]["0"]["moe"]) == {"router", "gate+up", "down"}
    assert fused["blocks"]["0"]["moe"]["gate+up"].shape == (E, 2 * F, D)
    got, want = (run(2, tree_["blocks"]["0"]["moe"], x)[0] for tree_ in (fused, p))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, layers.unfuse(fused), p)


def test_sizes_of_experts():
    for chosen in (0, 5):
        with pytest.raises(InputError, match=f"experts_per_token: {chosen} given; allowed: 1 to 4"):
            dataclasses.replace(llama.SIZES["tiny-moe"], experts_per_token=chosen)
    assert llama.SIZES["mixtral-8x7b"].experts_per_token == 2
    shapes = jax.eval_shape(llama.model(llama.SIZES["mixtral-8x7b"]).init, jax.random.key(0))
    assert tree.count(shapes) == 46_702_792_704  # as published, with the norms


# --------------------------------------------------------------------------------- in a whole model

CONFIG = dataclasses.replace(llama.SIZES["tiny-moe"], init_scale=0.3, depth=2)
MODEL = llama.model(CONFIG)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16)), jnp.int32)


@functools.cache
def whole() -> tree.Params:
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_the_balance_of_a_model_is_the_sum_over_its_layers():
    embed, block, _ = map(jax.jit, MODEL.parts)
    x, context = embed(whole(), {"tokens": TOKENS})
    each = []
    for i, layer in tree.unstack(whole())["blocks"].items():
        x, _, aux = block(layer, x, context, None, int(i))
        each.append(float(aux["load_balance"]))
    total = jax.jit(MODEL.apply)(whole(), TOKENS).aux["load_balance"]
    assert (
        float(total) == pytest.approx(sum(each), rel=1e-5)
        and len({round(value, 3) for value in each}) == 2
    )
    dense = llama.model(llama.SIZES["tiny"])
    assert (
        jax.eval_shape(lambda key: dense.apply(dense.init(key), TOKENS), jax.random.key(0)).aux
        == {}
    )


def test_each_expert_is_measured_by_its_own_tokens():
    """The Gram matrix of an expert's input is that of the tokens that its router sends there."""
    stats = compress.observe(MODEL, whole(), [TOKENS], "blocks/0/moe/.*", ["gram"])
    embed, block, _ = map(jax.jit, MODEL.parts)
    layer = tree.unstack(whole())["blocks"]["0"]
    x, context = embed(whole(), {"tokens": TOKENS})
    empty = {**layer, "moe": {**layer["moe"], "down": jnp.zeros_like(layer["moe"]["down"])}}
    rows = ops.rms_norm(
        block(empty, x, context)[0], layer["mlp_norm"]["weight"], CONFIG.norm_eps
    ).reshape(-1, CONFIG.width)
    _, chosen = jax.lax.top_k(rows @ layer["moe"]["router"].T, 2)
    for e in range(CONFIG.experts):
        own = np.asarray(rows)[np.any(np.asarray(chosen) == e, axis=1)]
        for name in ("gate", "up"):
            found = stats[f"blocks/0/moe/{name}"]
            assert float(found["count"][e]) == len(own) > 0
            np.testing.assert_allclose(found["gram"][e], own.T @ own, rtol=1e-3, atol=1e-3)
    assert float(stats["blocks/0/moe/router"]["count"]) == TOKENS.size
    np.testing.assert_array_equal(
        stats["blocks/0/moe/down"]["count"], stats["blocks/0/moe/up"]["count"]
    )


@pytest.mark.parametrize(
    "chain",
    ["rtn(bits=8, activations='int8')", "rtn(bits=4, group=16)", "magnitude(0.5) | rtn(bits=8)"],
)
def test_compressed_experts_run_close_to_their_decoded_version(chain):
    smaller, report = compress.apply([("blocks/.*/moe/(gate|up|down)", chain), (".*", ())], whole())
    assert report.bytes_after < 0.8 * report.bytes_before
    decoded = tree.map_leaves(lambda _, leaf: decode(leaf), smaller)
    got, want = (jax.jit(MODEL.apply)(p, TOKENS).logits for p in (smaller, decoded))
    if "activations" in chain:
        assert 0 < np.sqrt(np.mean((got - want) ** 2)) < 0.1 * np.std(want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


PROGRAM = """
    import dataclasses
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxmodel import compress, layers, ops, plan, sharding, tree
    from jaxmodel.models import llama

    config = dataclasses.replace(llama.SIZES["tiny-moe"], init_scale=0.3, depth=1)
    alone, placed = llama.model(config), llama.model(config, ops.Policy(axes=ops.MESH_AXES))
    params = jax.jit(alone.init)(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 6)), jnp.int32)
    mask = jnp.arange(6)[None] < jnp.asarray([6, 5, 6, 3, 6, 6, 2, 6])[:, None]


    def loss(model):
        def run(params, tokens, mask):
            out = model.apply(params, {"tokens": tokens, "mask": mask})
            return jnp.sum(jnp.where(mask[..., None], jnp.sin(out.logits), 0.0)) + out.aux[
                "load_balance"
            ], out.logits

        return jax.jit(jax.value_and_grad(run, has_aux=True))


    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


    (value, logits), grads = loss(alone)(params, tokens, mask)
    real = np.asarray(mask)
    meshes = {
        "fsdp=2,expert=2,tensor=2": (2, 32, 16),
        "expert=4,sequence=2": (1, 64, 32),
        "data=4,fsdp=2": (4, 64, 16),
    }
    for shape, part in meshes.items():
        mesh = sharding.make_mesh(shape)
        on_mesh = sharding.place(alone.rules, params, mesh)
        gate = on_mesh["blocks"]["0"]["moe"]["gate"]
        assert gate.sharding.shard_shape(gate.shape) == part, gate.sharding
        rows = NamedSharding(
            mesh, P(tuple(name for name in sharding.BATCH_AXES if name in mesh.shape))
        )
        with jax.set_mesh(mesh):
            (got_value, got), got_grads = loss(placed)(
                on_mesh, jax.device_put(tokens, rows), jax.device_put(mask, rows)
            )
        np.testing.assert_allclose(got_value, value, rtol=1e-5)
        close(np.asarray(got)[real], np.asarray(logits)[real])
        jax.tree.map(close, jax.device_get(got_grads), jax.device_get(grads))

    smaller, _ = compress.apply(
        [("blocks/.*/moe/(gate|up|down)", "rtn(bits=8)"), (".*", ())], params
    )
    want = jax.jit(alone.apply)(smaller, tokens).logits
    mesh = sharding.make_mesh("data=2,expert=4")
    with jax.set_mesh(mesh):
        got = jax.jit(placed.apply)(sharding.place(alone.rules, smaller, mesh), tokens).logits
    close(got, want)

    # the bytes of one layer's experts, forward and backward
    D, N, n = 32, 8 * 6, 2
    mesh = sharding.make_mesh("expert=4")
    layer = layers.MoE(4, n, 64, jax.nn.silu, None, None, placed.policy)
    leaves = params["blocks"]["0"]["moe"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6, D)), jnp.float32)
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        leaves = {
            name: put(a, *(["expert"] if name != "router" else [])) for name, a in leaves.items()
        }
        score = lambda p, x: jnp.sum(jnp.sin(layer.apply({"params": p}, x)[0]))
        text = (
            jax.jit(jax.grad(score, argnums=1)).lower(leaves, put(x, "expert")).compile().as_text()
        )
    found = plan.moved(plan.collectives(text))
    gathered, scattered = N * (4 * D + 8 * n) + N * 4 * D, N * 4 * D + N * (4 * D + 4 * n)
    assert found == {"all-gather": gathered, "reduce-scatter": scattered}, (
        found,
        gathered,
        scattered,
    )
    print("equal")
"""


def test_experts_on_a_mesh_equal_those_on_one_device(devices8):
    """Cut by expert, with tensor, fsdp or sequence beside it, or not cut at all; and the bytes are
    those of the formula.
    """
    assert devices8(PROGRAM).splitlines()[-1] == "equal"
