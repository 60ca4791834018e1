"""The reader of collectives: programs whose traffic is known, compiled for eight CPU devices, and a
text as TPUs have them.

This file runs itself once, in a process of its own, as tests/contracts/test_devices.py does; the
tests here read what it found.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmodel import plan, sharding
from jaxmodel.errors import InputError

N, BYTES = 8, 8 * 16 * 4  # devices, and bytes of an array [8, 16]
P = jax.P
RING = [(i, (i + 1) % N) for i in range(N)]


def psum(a: jax.Array) -> jax.Array:
    return jax.lax.psum(a, "data")


def scanned(times: int, run):
    return lambda a: jax.lax.scan(lambda a, _: (run(a), None), a, length=times)[0]


def repeated(times: int, run):
    return lambda a: jax.lax.fori_loop(0, times, lambda i, a: run(a) / N, a)


# each of a whole array [8, 16] on each device
PROGRAMS = {
    "none": (lambda a: a + 1, {}),
    "one all-reduce": (psum, {"all-reduce": 2 * BYTES}),
    "several operands": (
        lambda a: sum(x.sum() for x in psum((a, a[:4], a[0]))) + a,
        {"all-reduce": 2 * (BYTES * 13 // 8)},
    ),
    "all-gather": (lambda a: jax.lax.all_gather(a, "data").sum(0), {"all-gather": N * BYTES}),
    "reduce-scatter": (
        lambda a: a + jax.lax.psum_scatter(a, "data", tiled=True),
        {"reduce-scatter": BYTES},
    ),
    "all-to-all": (
        lambda a: jax.lax.all_to_all(a, "data", 0, 1, tiled=True).reshape(a.shape),
        {"all-to-all": BYTES},
    ),
    "a ring": (lambda a: jax.lax.ppermute(a, "data", RING), {"collective-permute": BYTES}),
    "two of eight send": (
        lambda a: jax.lax.ppermute(a, "data", [(0, 1), (5, 2)]),
        {"collective-permute": BYTES // 4},
    ),
    "in a scan": (scanned(5, lambda a: psum(a) / N), {"all-reduce": 5 * 2 * BYTES}),
    "in a loop in a scan": (scanned(5, repeated(3, psum)), {"all-reduce": 5 * 3 * 2 * BYTES}),
    "in a scan, under gradients": (
        jax.grad(
            lambda a: jnp.sum(scanned(5, lambda a: jnp.sin(jax.lax.ppermute(a, "data", RING)))(a))
        ),
        {"collective-permute": 10 * BYTES},
    ),
    "in a branch": (
        lambda a: jax.lax.cond(jnp.sum(a) > 0, psum, lambda a: a, a),
        {"all-reduce": 2 * BYTES},
    ),
}


def run_all() -> dict[str, dict]:
    """What is found in each program, and in two that `jit` sharded."""
    mesh = sharding.make_mesh("data=8")
    found = {}
    with jax.set_mesh(mesh):
        for name, (run, _) in PROGRAMS.items():
            mapped = jax.shard_map(run, in_specs=P(), out_specs=P(), check_vma=False)
            found[name] = plan.moved(
                plan.collectives(jax.jit(mapped).lower(jnp.ones((8, 16))).compile())
            )
    grid = sharding.make_mesh("data=2,tensor=4")
    put = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(grid, P(*spec))
    )
    x = put((8, 16), "data", "tensor")
    w = put((16, 8), "tensor")
    program = (
        jax.jit(lambda x, w: jnp.sin(x @ w), out_shardings=jax.NamedSharding(grid, P("data")))
        .lower(x, w)
        .compile()
    )
    found["jit"] = [
        [one.kind, one.bytes, one.group, one.times] for one in plan.collectives(program)
    ]
    return found


@pytest.fixture(scope="module")
def outcome(devices8):
    return json.loads(devices8(Path(__file__)).splitlines()[-1])


@pytest.mark.parametrize("name", PROGRAMS)
def test_traffic_that_is_known(name, outcome):
    assert outcome[name] == PROGRAMS[name][1]


def test_what_jit_shards(outcome):
    """`[8/2, 16/4] @ [16/4, 8]` is summed over the four devices of a row."""
    assert outcome["jit"] == [["all-reduce", 2 * 4 * 8 * 4, 4, 1]]


# ------------------------------------------------------------- forms that only a TPU's modules have

TPU = """
HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%first_half (x: f32[4,2]) -> (f32[4,2], f32[4,16], u32[]) {
  %x = f32[4,2]{1,0:T(8,128)} parameter(0)
  %gather.1 = f32[4,16]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=7, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={1}
  %n = u32[]{:S(2)} constant(1)
  ROOT %out = (f32[4,2]{1,0:T(8,128)}, f32[4,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) tuple(%x, \
%gather.1, %n)
}

%second_half (x: f32[4,2]) -> f32[4,16] {
  %x = f32[4,2]{1,0:T(8,128)} parameter(0)
  ROOT %gather.2 = f32[4,16]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=7, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={1}
}

%all-reduce-scatter.3 (x: f32[16,4], y: f32[8]) -> (f32[2,4], f32[1]) {
  %x = f32[16,4]{1,0:T(8,128)} parameter(0)
  %y = f32[8]{0:T(8)} parameter(1)
  %sums = (f32[16,4]{1,0:T(8,128)}, /*index=1*/f32[8]{0:T(8)}) all-reduce(%x, %y), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %one = f32[16,4]{1,0:T(8,128)} get-tuple-element(%sums), index=0
  ROOT %cut = (f32[2,4]{1,0}, f32[1]{0}) tuple(%one, %one)
}

%body (t: (s32[], f32[4,2], f32[16,4])) -> (s32[], f32[4,2], f32[16,4]) {
  %t = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)}, f32[16,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,2]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %start = (f32[4,2]{1,0:T(8,128)}, f32[4,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) fusion(%x), \
kind=kCustom, calls=%first_half
  %done = f32[4,16]{1,0:T(8,128)S(1)} fusion(%x), kind=kCustom, calls=%second_half
  %w = f32[16,4]{1,0:T(8,128)} get-tuple-element(%t), index=2
  %scattered = (f32[2,4]{1,0}, f32[1]{0}) fusion(%w, %w), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %again = (s32[]{:T(128)}, f32[4,2]{1,0}, f32[16,4]{1,0}) tuple(%t, %x, %w)
}

%condition (t: (s32[], f32[4,2], f32[16,4])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)}, f32[16,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (t: (s32[], f32[4,2], f32[16,4])) -> (s32[], f32[4,2], f32[16,4]) {
  %t = (s32[]{:T(128)}, f32[4,2]{1,0:T(8,128)}, f32[16,4]{1,0:T(8,128)}) parameter(0)
  %y = bf16[4,2]{1,0} get-tuple-element(%t), index=1
  %sent = (bf16[4,2]{1,0}, bf16[4,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%y), \
channel_id=3, source_target_pairs={{0,1},{1,0},{2,2},{3,4}}
  %got = bf16[4,2]{1,0} collective-permute-done(%sent)
  %began = (bf16[4,2]{1,0}, bf16[4,16]{1,0}) all-gather-start(%y), channel_id=4, \
replica_groups=[1,8]<=[8], dimensions={1}
  %ended = bf16[4,16]{1,0} all-gather-done(%began)
  %alone = f32[4,2]{1,0} all-reduce(%y), channel_id=5, \
replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %loop = (s32[]{:T(128)}, f32[4,2]{1,0}, f32[16,4]{1,0}) while(%t), condition=%condition, \
body=%body
}
"""


def test_forms_of_a_tpu():
    """Pieces of one collective in two fusions, an all-reduce whose result is cut, groups by axes, a
    loop without a count.
    """
    found = {(one.kind, one.bytes, one.group, one.times) for one in plan.collectives(TPU)}
    assert found == {
        ("all-gather", 4 * 16 * 4, 8, 6),
        ("reduce-scatter", (16 * 4 + 8) * 4, 8, 6),
        (
            "collective-permute",
            4 * 2 * 2 * 3 // 8,
            2,
            1,
        ),  # three of eight devices send, one to itself
        ("all-gather", 4 * 16 * 2, 8, 1),
    }


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(InputError, match="this text is not an XLA module"):
        plan.collectives("nothing")
    with pytest.raises(InputError, match="does not state how often its loop 'loop' runs"):
        plan.collectives(TPU.replace("direction=LT", "direction=NE"))


if __name__ == "__main__":
    print(json.dumps(run_all()))
