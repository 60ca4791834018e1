"""`product`: its values and gradients against float64, and no operand in another precision anywhere
in a training step.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import losses, ops
from jaxmodel.models import gpt2, llama
from jaxmodel.models.gpt2 import SIZES
from jaxmodel.ops.product import compiler_options

EQUATIONS = {
    "bi,oi->bo": ((6, 32), (5, 32)),
    "bknh,bksh->bkns": ((2, 3, 4, 16), (2, 3, 7, 16)),
    "abi,oi->abo": ((2, 3, 8), (4, 8)),
}


def operands(equation: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape) for shape in EQUATIONS[equation])


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(
    ("compute", "limit"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 1e-2)]
)
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_value_and_gradients_against_float64(equation, compute, limit, out):
    x, y = operands(equation)
    weights = np.random.default_rng(1).normal(size=np.einsum(equation, x, y).shape)
    f = lambda x, y: jnp.sum(
        ops.product(equation, x, y, compute, out).astype(jnp.float32) * jnp.float32(weights)
    )
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    transposes = (
        np.einsum(f"{result},{right}->{left}", weights, y),
        np.einsum(f"{result},{left}->{right}", weights, x),
    )
    wanted = np.einsum(equation, x, y), *transposes
    x = jnp.float32(x)
    y = jnp.float32(y)
    found = ops.product(equation, x, y, compute, out), *jax.grad(f, argnums=(0, 1))(x, y)
    assert found[0].dtype == jnp.dtype(out) and found[1].dtype == found[2].dtype == jnp.float32
    limit = max(limit, 1e-2) if out == "bfloat16" else limit
    for got, want in zip(found, wanted, strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= limit * np.linalg.norm(want)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_rows_of_a_vmap_are_those_of_each_alone(equation):
    x, y = (jnp.float32(a) for a in operands(equation))
    xs = jnp.stack([x, 2 * x])
    run = jax.grad(
        lambda x, y: jnp.sum(ops.product(equation, x, y, jnp.bfloat16) ** 2), argnums=(0, 1)
    )
    for i, j in itertools.product(range(2), repeat=2):
        np.testing.assert_allclose(
            jax.vmap(run, (0, None))(xs, y)[i][j], run(xs[j], y)[i], rtol=2e-2, atol=1e-3
        )


def products(jaxpr: Any) -> list[tuple[str, str]]:
    """The dtypes of the operands of every matrix product in a program."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(str(v.aval.dtype) for v in eqn.invars))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += products(getattr(inner, "jaxpr", inner))
    return found


def of_a_step(model: Any) -> list[tuple[str, str]]:
    """The products of the gradient of a language model's loss."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in ("tokens", "targets")}
    gradient = jax.grad(lambda params, batch: losses.next_token(model, params, batch)[0])
    return products(jax.make_jaxpr(gradient)(params, batch).jaxpr)


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
@pytest.mark.parametrize("module", [gpt2, llama])
def test_every_product_of_a_training_step_is_in_bfloat16(module, attention):
    found = of_a_step(
        module.model(module.SIZES["tiny"], ops.Policy("bfloat16", attention=attention))
    )
    assert len(found) > 20  # forward, and two for each of them backward
    assert set(found) == {("bfloat16", "bfloat16")}


def test_dots_are_kept_by_remat():
    """`remat="dots"` sees the products, so that its backward pass has fewer of them than that of
    "full".
    """
    of = lambda remat: len(
        of_a_step(gpt2.model(SIZES["tiny"], ops.Policy("bfloat16", remat=remat)))
    )
    counts = {remat: of(remat) for remat in ("none", "dots", "full")}
    assert counts["none"] <= counts["dots"] < counts["full"]


@pytest.mark.parametrize("unroll", [1, 2, 8])
def test_layers_out_of_the_loop_are_the_same_layers(unroll):
    model, other = (gpt2.model(SIZES["tiny"], ops.Policy(unroll=n)) for n in (1, unroll))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    got, want = (jax.jit(m.apply)(params, tokens).logits for m in (other, model))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_options_of_the_compiler_change_nothing_but_the_speed():
    """Also in float32, where there are none."""
    assert compiler_options("float32") == {}
    x, y = (jnp.float32(a) for a in operands("bi,oi->bo"))
    small = jnp.bfloat16
    run = jax.grad(
        lambda x, y: jnp.sum(ops.product("bi,oi->bo", x, y, small, small).astype(jnp.float32) ** 2),
        (0, 1),
    )
    plain = jax.jit(run)(x, y)
    fast = jax.jit(run, compiler_options=compiler_options("bfloat16"))(x, y)
    for a, b in zip(plain, fast, strict=True):
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(a)
