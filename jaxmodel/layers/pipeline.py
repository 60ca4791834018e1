"""Pipeline parallelism: stages of layers on the mesh axis `pipeline`, and micro-batches.

Outside of the layers, `pipeline` is one more batch axis (see `sharding.BATCH_AXES`), so embedding,
head and loss are split over it and never computed twice. The rows are gathered before the first
stage and scattered after the last.

GPipe (Huang et al., 2019): with S stages and M micro-batches, stage s runs micro-batch m in tick
`m + s`. The backward pass is derived by autodiff and runs the same way in reverse. A stage is idle
in S - 1 of the M + S - 1 ticks.

The axis `data` is handled manually too, so that the gradients of a stage's layers are accumulated
locally over the micro-batches and summed over `data` once. Arrays that are split along `fsdp` are
gathered for every micro-batch: less memory, more traffic.

Bytes that a device sends on average, where `act` is the size of the activations of a whole batch,
`B T D` in `policy.activation_dtype`: from stage to stage `(S - 1)/S act` forward and as much
backward (nothing in ticks without data); an all-gather of `act` (and of other arrays with rows:
rotary tables, segments) before the stages, a reduce-scatter of `act` after them, and the reverse of
each backward. With `data`, `act` is a device's own part, and the gradients of its layers are
summed. So that nothing is sent needlessly, the first and the last S - 2 ticks are unrolled; those
between them are one scan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.errors import InputError
from jaxmodel.sharding import BATCH_AXES, auto_axes

P = jax.P
AXIS = "pipeline"

type Stage = Callable[[Any, Array, Any, Any, Any], tuple[Array, dict[str, Array]]]
"""`stage(layers, x, context, place, key) -> (x, aux)`; `place` is the index of the stage."""


def gpipe(
    stage: Stage,
    layers: Any,
    x: Float[Array, "B ..."],
    context: Any,
    rng: Array | None = None,
    microbatches: int = 0,
) -> tuple[Float[Array, "B ..."], dict[str, Array]]:
    """Run all layers, those of each stage on its own devices.

    Args:
      stage: the function of one stage.
      layers: leaves `[L, ...]`.
      x: activations.
      context: arrays `[B, ...]`, which are cut into micro-batches too, and others, which every
        micro-batch gets whole.
      rng: a key, from which each micro-batch and each device along `data` gets its own.
      microbatches: see `ops.Policy`.

    Returns:
      The activations, and the mean over the micro-batches (and over `data`) of the aux values,
      summed over the stages.

    Raises:
      InputError: layers, rows or micro-batches cannot be divided evenly.
    """
    axes = auto_axes()
    stages = axes[AXIS]
    data = tuple(name for name in ("data",) if axes.get(name, 1) > 1)
    rows = x.shape[0]
    count = micro_batches(
        jax.tree.leaves(layers)[0].shape[0], rows, stages, microbatches, axes.get("data", 1)
    )

    def run(layers: Any, x: Array, context: Any) -> tuple[Array, dict[str, Array]]:
        place = jax.lax.axis_index(AXIS).astype(jnp.int32)
        parts = micro(gathered(x), count)
        of_part = parted(context, is_cut, count)

        def tick(
            arrived: Array, t: Any, hops: Hops
        ) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            m = jnp.clip(t - place, 0, count - 1)
            x = jnp.where(place == 0, parts[jnp.minimum(t, count - 1)], arrived)
            y, aux = stage(layers, by_rows(x), of_part(m), place, key_of(rng, m, data))
            busy = (t >= place) & (t - place < count)
            aux = jax.tree.map(lambda a: jnp.where(busy, a, jnp.zeros_like(a)), aux)
            y = by_rows(y)
            return jax.lax.ppermute(y, AXIS, hops) if hops else jnp.zeros_like(y), (y, aux)

        _, (found, aux) = in_ticks(
            tick,
            jnp.zeros_like(parts[0]),
            [_hops(t, stages, count) for t in range(count + stages - 1)],
        )
        out = jnp.where(place == stages - 1, found[stages - 1 :], jnp.zeros_like(parts))
        total = jax.tree.map(
            lambda a: jax.lax.pmean(jax.lax.psum(jnp.sum(a, axis=0), AXIS) / count, data), aux
        )
        return by_rows(jax.lax.psum_scatter(joined(out, stages), AXIS, scatter_dimension=0)), total

    is_cut = jax.tree.map(lambda a: a.ndim > 0 and a.shape[0] == rows, context)
    cut = P((AXIS, *data))
    specs = jax.tree.map(lambda has_rows: cut if has_rows else P(), is_cut)
    across = jax.shard_map(
        run,
        in_specs=(P(AXIS), cut, specs),
        out_specs=(cut, P()),
        axis_names={AXIS, *data},
        check_vma=False,
    )
    x, aux = across(layers, by_rows(x), context)
    return by_rows(x), aux


def micro_batches(layers: int, rows: int, stages: int, wanted: int, data: int = 1) -> int:
    """Return the number of micro-batches.

    Args:
      layers: the number of layers of the model.
      rows: the number of rows of the batch.
      stages: the number of stages.
      wanted: see `ops.Policy.microbatches`.
      data: the number of devices along `data`, which share the rows of each micro-batch.

    Raises:
      InputError: the stages do not divide the layers, the micro-batches do not divide the rows, or
        the stages do not divide the micro-batches.
    """
    count = wanted or stages
    if layers % stages:
        raise InputError(
            f"mesh: pipeline = {stages} does not divide the {layers} layers into stages"
        )
    if count % stages or rows % (count * data):
        allowed = [n for n in range(stages, rows + 1, stages) if rows % (n * data) == 0]
        places = f"{stages} stages" + (f" and {data} places along 'data'" if data > 1 else "")
        none = f"no number is possible; give a multiple of {stages * data} rows"
        shown = f"allowed: {', '.join(map(str, allowed))}" if allowed else none
        raise InputError(f"policy.microbatches: {count} given for {rows} rows in {places}; {shown}")
    return count


# ----------------------------------------------------------- inside of the shard_map, for schedules

type Hops = list[tuple[int, int]]


def gathered(rows: Array) -> Array:
    """Gather `[B/S, ...]` of each device to `[S, B/S, ...]` on all.

    The second axis stays split as it was.
    """
    return by_rows(jax.lax.all_gather(by_rows(rows), AXIS), 1)


def micro(blocks: Array, count: int) -> Array:
    """Reshape `[S, B/S, ...]` to `[M, B/M, ...]`.

    A micro-batch takes every (M/S)th row of a block, so that rows stay on their devices.
    """
    stages, rows, *rest = blocks.shape
    each = count // stages
    parts = jnp.moveaxis(by_rows(blocks.reshape(stages, rows // each, each, *rest), 1), 2, 1)
    return by_rows(parts.reshape(count, rows // each, *rest), 1)


def by_rows(x: Array, axis: int = 0) -> Array:
    """Constrain an axis of rows to the usual sharding of rows.

    Otherwise XLA may shard what passes between stages like weights, or gather it.
    """
    axes = {name: n for name, n in auto_axes().items() if name in BATCH_AXES}
    if not axes or x.shape[axis] % math.prod(axes.values()):
        return x
    rows = tuple(name for name in BATCH_AXES if name in axes)
    spec = [rows if i == axis else P.UNCONSTRAINED for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def key_of(rng: Array | None, m: Any, data: tuple[str, ...]) -> Array | None:
    """Return the key of a micro-batch for the devices at one index along `data`."""
    if rng is None:
        return None
    rng = jax.random.fold_in(rng, m)
    return jax.random.fold_in(rng, jax.lax.axis_index(data)) if data else rng


def joined(parts: Array, stages: int) -> Array:
    """Join micro-batches again: the inverse of `micro`."""
    count, rows, *rest = parts.shape
    each = count // stages
    blocks = jnp.moveaxis(by_rows(parts, 1).reshape(stages, each, rows, *rest), 1, 2)
    return by_rows(by_rows(blocks, 1).reshape(stages, rows * each, *rest), 1)


def parted(tree: Any, is_cut: Any, count: int) -> Callable[[Any], Any]:
    """Return a function from the index of a micro-batch to its part of a tree.

    Leaves that are not marked in `is_cut` are passed whole.
    """
    ready = jax.tree.map(lambda a, cut: micro(gathered(a), count) if cut else a, tree, is_cut)
    return lambda m: jax.tree.map(lambda a, cut: a[m] if cut else a, ready, is_cut)


def in_ticks(
    tick: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, hops: list[Any]
) -> tuple[Any, Any]:
    """Run `tick(carry, t, hops[t])` for each t.

    Neighbouring ticks with the same hops, which must be static, share one scan.

    Returns:
      The carry, and the outputs of the ticks, stacked.
    """
    found: list[Any] = []
    for same, run in itertools.groupby(enumerate(hops), key=lambda each: each[1]):
        times = [t for t, _ in run]
        if len(times) == 1:
            carry, one = tick(carry, times[0], same)
            found.append(jax.tree.map(lambda a: a[None], one))
        else:
            carry, many = jax.lax.scan(
                lambda c, t, same=same: tick(c, t, same), carry, jnp.asarray(times, jnp.int32)
            )
            found.append(many)
    return carry, jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *found)


def _hops(t: int, stages: int, count: int) -> Hops:
    """Return which stages send data to the next one after a tick."""
    return [(s, s + 1) for s in range(stages - 1) if 0 <= t - s < count]
