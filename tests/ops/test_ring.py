"""Ring attention on eight devices: equal to attention on one, with the bytes that its formula says.

The checks run once, in one process with eight simulated devices (see `outcomes8`); the tests here
read how they went.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmodel import ops, plan, sharding

B = 2
T = 32
H = 4
K = 2
WIDTH = 8
PLACED = ops.Policy(axes=ops.MESH_AXES)
MESHES = ("sequence=4", "data=2,sequence=2,tensor=2", "sequence=8")


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def heads(t: int = T, s: int = T) -> tuple[jax.Array, jax.Array, jax.Array]:
    return random(B, t, H, WIDTH), random(B, K, s, WIDTH, seed=1), random(B, K, s, WIDTH, seed=2)


SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], T // 4, axis=1), jnp.int32)
LENGTHS = jnp.arange(T)[None] < jnp.asarray([[T - 5], [T // 2]])
CASES = {
    "causal": (ops.AttentionMask(), {}),
    "all": (ops.AttentionMask(causal=False), {}),
    "segments": (ops.AttentionMask(segments=(SEGMENTS, SEGMENTS)), {}),
    "padding": (ops.AttentionMask(valid=LENGTHS, causal=False), {}),
    "padding and segments": (ops.AttentionMask(segments=(SEGMENTS, SEGMENTS), valid=LENGTHS), {}),
    "window": (ops.AttentionMask(window=jnp.int32(6)), {}),
    "window on both sides": (ops.AttentionMask(window=jnp.int32(6), causal=False), {}),
    "soft cap": (ops.AttentionMask(), {"softcap": 2.0, "scale": 0.7}),
    "places": (ops.AttentionMask(query=jnp.arange(T, dtype=jnp.int32)[::-1][None]), {}),
}


def of_case(policy: ops.Policy, options: dict):
    """The result and the gradients of attention, jitted; rows that see nothing have no meaning and
    do not count.
    """

    def run(q, k, v, seen, counts):
        def score(q, k, v):
            out = ops.attention(q, k, v, seen, policy, **options)
            return jnp.sum(jnp.sin(out) * counts[..., None, None]), out * counts[..., None, None]

        (_, out), grads = jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    return jax.jit(run)


def close(got, want, tolerance: float = 2e-6) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


def counted(seen: ops.AttentionMask, t: int = T) -> jax.Array:
    return jnp.broadcast_to(jnp.any(seen.square(t, t), axis=2), (B, t)).astype(jnp.float32)


def check_equal_to_one_device(name: str, mesh: str) -> None:
    seen, options = CASES[name]
    args = *heads(), seen, counted(seen)
    want = of_case(ops.Policy(attention="plain"), options)(*args)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        run = of_case(PLACED, options)
        program = run.lower(*args).compile()
        close(program(*args), want)
    sent = plan.moved(plan.collectives(program))
    assert "collective-permute" in sent and "all-gather" not in sent, f"no ring: {sent}"


def check_parts_that_are_no_whole_blocks() -> None:
    """Local parts of 300 queries and keys: two blocks of 256 queries, of which the second is filled
    up.
    """
    t = 1200
    seen = ops.AttentionMask(
        segments=(jnp.arange(t, dtype=jnp.int32)[None].repeat(B, 0) // 500,) * 2
    )
    args = *heads(t, t), seen, jnp.ones((B, t))
    want = of_case(ops.Policy(attention="plain"), {})(*args)
    with jax.set_mesh(sharding.make_mesh("sequence=4")):
        close(of_case(PLACED, {})(*args), want, 5e-6)


def check_a_memory_of_another_length() -> None:
    seen = ops.AttentionMask(valid=jnp.arange(16)[None] < jnp.asarray([[9], [16]]), causal=False)
    args = *heads(T, 16), seen, jnp.ones((B, T))
    want = of_case(ops.Policy(attention="plain"), {})(*args)
    with jax.set_mesh(sharding.make_mesh("sequence=4")):
        close(of_case(PLACED, {})(*args), want)


def check_sinks(mesh: str) -> None:
    """The sinks of all heads, and their gradients, which come from every part of the positions."""
    seen = CASES["padding and segments"][0]
    q, k, v = heads()
    counts = counted(seen)[..., None, None]
    sinks = random(H, seed=3)

    def of(policy: ops.Policy):
        def score(q, k, v, sinks):
            out = ops.attention(q, k, v, seen, policy, sinks=sinks)
            return jnp.sum(jnp.sin(out) * counts), out * counts

        return jax.jit(jax.value_and_grad(score, argnums=(0, 1, 2, 3), has_aux=True))

    (_, want), grads = of(ops.Policy(attention="plain"))(q, k, v, sinks)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        program = of(PLACED).lower(q, k, v, sinks).compile()
        (_, out), found = program(q, k, v, sinks)
    close((out, found), (want, grads))
    assert "all-gather" not in plan.moved(plan.collectives(program))


def check_what_is_no_ring_is_gathered() -> None:
    """A bias, a mask, or positions that the devices do not divide: as on one device."""
    mask = jnp.asarray(np.random.default_rng(0).random((B, T, T)) < 0.7)
    for t, seen, options in (
        (T, ops.AttentionMask(), {"bias": random(1, H, T, T)}),
        (T, ops.AttentionMask(mask=mask, causal=False), {}),
        (30, ops.AttentionMask(), {}),
    ):
        args = *heads(t, t), seen, counted(seen, t)
        want = of_case(ops.Policy(attention="plain"), options)(*args)
        with jax.set_mesh(sharding.make_mesh("sequence=4")):
            close(of_case(PLACED, options)(*args), want)


def check_bytes() -> None:
    """Each of n devices sends its part of keys and values n - 1 times forward; backward too, and
    their gradients.

    In float32, since XLA on a CPU sends bfloat16 as float32.
    """
    for mesh in ("sequence=4", "data=2,sequence=4"):
        made = sharding.make_mesh(mesh)
        n = made.shape["sequence"]
        rows = B // made.shape.get("data", 1)
        batch = "data" if "data" in made.shape else None
        q, k, v = heads()
        q = jax.device_put(q, NamedSharding(made, P(batch, "sequence")))
        k, v = (jax.device_put(a, NamedSharding(made, P(batch, None, "sequence"))) for a in (k, v))
        place = NamedSharding(made, P(batch, "sequence"))
        seen, counts = jax.device_put((CASES["segments"][0], jnp.ones((B, T))), place)
        with jax.set_mesh(made):
            program = of_case(PLACED, {}).lower(q, k, v, seen, counts).compile()
        part = rows * K * (T // n) * WIDTH * 4
        tokens = rows * (T // n)
        keys = 2 * part + 4 * tokens
        formula = (n - 1) * (
            2 * keys + 2 * part
        ) - keys  # without a loop around, XLA sees that the first of both passes are one
        assert plan.moved(plan.collectives(program)) == {"collective-permute": formula}


CHECKS = [
    *(f"check_equal_to_one_device:{name}:{MESHES[0]}" for name in CASES),
    *(
        f"check_equal_to_one_device:{name}:{mesh}"
        for mesh in MESHES[1:]
        for name in ("causal", "padding and segments")
    ),
    *(f"check_sinks:{mesh}" for mesh in MESHES[:2]),
    "check_parts_that_are_no_whole_blocks",
    "check_a_memory_of_another_length",
    "check_what_is_no_ring_is_gathered",
    "check_bytes",
]


@pytest.fixture(scope="module")
def outcome(outcomes8):
    return outcomes8(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_ring(name, outcome):
    assert not outcome[name], outcome[name]
