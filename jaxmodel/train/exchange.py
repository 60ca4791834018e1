"""Gradient compression over the data axis: as int8, or the largest values with error feedback.

    step = make_step(model, loss, optimizer, exchange=Exchange("int8"))
    state = init_state(params, optimizer, exchange=Exchange("int8"))

Each device computes the gradient of its own rows (of all its micro-batches, one after another).
The devices exchange gradients once per step, in a `shard_map` over the data axis. The other axes of
the mesh are not affected: what is split over `fsdp` or `tensor` is exchanged shard by shard. Bytes
of a step among n devices, by the table of `jaxmodel.plan.collectives`, where a plain all-reduce of
G values takes 8 G:

- "int8": `2 G (1 + 4 / block)`, about 0.26 of 8 G. Each device sends every other device its part in
  int8, with a scale for each block of a row; sums what it received in float32; and sends the sums
  to all, in int8 again. Both roundings are stochastic with an exact mean, so the gradient is right
  on average and no error needs to be remembered.
- "top_k": `6 n share G` (8 for rows of 65,536 or more). Each device sends the largest values of
  each row and adds what it did not send to its next gradient (error feedback: Stich et al., 2018).
  That residual is in `state.extra["residual"]`, 4 bytes for each weight and device.

Vectors and leaves of fewer than `smallest` values are summed in float32. As in every data-parallel
run, what is not a sum over rows (a load balance) and all randomness are those of each device's own
rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int8, Integer

from jaxmodel import tree
from jaxmodel.errors import FACTOR, InputError, at_least, one_of, within
from jaxmodel.optim.rounding import dither, group_of
from jaxmodel.rng import fold
from jaxmodel.sharding import auto_axes, names_of, parts
from jaxmodel.train.gradients import GradientFn

P = jax.P
KINDS = ("int8", "top_k")


@dataclasses.dataclass(frozen=True)
class GradientCompression:
    """A way to sum gradients over the data axis.

    Attributes:
      kind: "int8" or "top_k".
      share: the share of the values of a row that "top_k" sends, at least one value.
      smallest: leaves with fewer values per layer are summed in float32.
      axis: the mesh axis. If the mesh lacks it, nothing changes.

    Raises:
      InputError: the kind is unknown, or the share is not above 0 and at most 1.
    """

    kind: str = "int8"
    share: float = 0.01
    smallest: int = 4096
    axis: str = "data"

    def __post_init__(self) -> None:
        one_of("gradient_compression", self.kind, KINDS)
        within("share", self.share, FACTOR)
        at_least("smallest", self.smallest)

    def residual(self, trains: tree.Params) -> tree.Params | None:
        """Return the initial residual of a state.

        It is float32 zeros for each large leaf, with a leading axis of devices; None if none is
        needed.
        """
        devices = auto_axes().get(self.axis, 1)
        if self.kind == "int8" or devices == 1:
            return None
        large = {
            path: leaf for path, leaf in tree.flatten(trains).items() if self._large(path, leaf)
        }
        return tree.unflatten(
            {path: jnp.zeros((devices, *leaf.shape), jnp.float32) for path, leaf in large.items()}
        )

    def __call__(self, run: GradientFn, rules: tree.Rules) -> Callable[..., Any]:
        """Return a gradient function with compressed sums.

        Its signature is `(trains, batch, rng, residual) -> (((value, metrics), grads), residual)`.

        Args:
          run: a gradient function whose value is a mean over the `weight` in its metrics.
          rules: the model's rules, path -> `PartitionSpec`; gradients are placed like the
            parameters during the exchange.

        Raises:
          InputError: when called, the kind is "top_k" and there is no residual.
        """

        def whole(trains: Any, batch: Mapping[str, Any], rng: Any, residual: Any = None) -> Any:
            devices = auto_axes().get(self.axis, 1)
            if devices == 1:
                return run(trains, batch, rng), residual
            if auto_axes().get("pipeline", 1) > 1:
                raise InputError(
                    "mesh: gradient compression cannot be combined with pipeline stages; leave "
                    "out one of the two"
                )
            if self.kind == "top_k" and residual is None:
                raise InputError(
                    "exchange: the state has no residual; make the state with "
                    "init_state(exchange=...), on the mesh in use"
                )
            places = _places(trains, rules, self.axis)
            rows = jax.tree.map(lambda a: P(self.axis) if a.ndim else P(), dict(batch))
            across = jax.shard_map(
                lambda *args: self._local(run, devices, places, *args),
                in_specs=(P(), rows, P(), P(self.axis)),
                out_specs=(P(), P(self.axis)),
                axis_names={self.axis},
                check_vma=False,
            )
            return across(trains, dict(batch), rng, residual)

        return whole

    def _large(self, path: str, leaf: Any) -> bool:
        shape = tree.layer_shape(path, leaf)
        return len(shape) > 1 and math.prod(shape) >= self.smallest

    def _local(
        self,
        run: GradientFn,
        devices: int,
        places: Any,
        trains: Any,
        batch: Any,
        rng: Any,
        residual: Any,
    ) -> Any:
        """Run on one device of the axis."""
        place = jax.lax.axis_index(self.axis)
        rng = jax.random.fold_in(rng, place)
        (value, metrics), grads = run(trains, batch, rng)
        weight = metrics["weight"].astype(jnp.float32)
        total = jax.lax.psum(weight, self.axis)
        part = weight / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        mean = lambda a: jax.lax.psum(a.astype(jnp.float32) * part, self.axis)
        value = mean(value)
        others = {name: mean(metric) for name, metric in metrics.items() if name != "weight"}
        shares = {path: g.astype(jnp.float32) * part for path, g in tree.flatten(grads).items()}
        memory = {path: e[0] for path, e in tree.flatten(residual or {}).items()}
        key = fold(rng, "exchange")
        large = {path for path, g in shares.items() if self._large(path, g)}
        summed = functools.partial(self._summed, devices=devices, large=large)
        if places:  # else the partitioner would gather what is split over the other axes
            specs = {path: places[path] for path in shares}, {path: places[path] for path in memory}
            rest = {name for spec in places.values() for entry in spec for name in names_of(entry)}
            summed = jax.shard_map(
                summed, in_specs=(*specs, P()), out_specs=specs, axis_names=rest, check_vma=False
            )
        sums, memory = summed(shares, memory, key)
        grads = optax.tree.cast_like(tree.unflatten(sums), grads)
        kept = {path: e[None] for path, e in memory.items()}
        residual = None if residual is None else tree.unflatten(kept)
        return ((value, {**others, "weight": total}), grads), residual

    def _summed(
        self,
        grads: dict[str, Array],
        memory: dict[str, Array],
        key: jax.Array,
        devices: int,
        large: set[str],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the sums over the axis, and what this device did not send.

        The gradients are perhaps cut over other axes of the mesh; `large` names those that are
        compressed.
        """
        before = jnp.zeros(())
        sums = {}
        memory = dict(memory)
        for path, g in grads.items():
            # one after another: simulated devices deadlock if they run independent
            # collectives in different orders
            g, _ = jax.lax.optimization_barrier((g, before))
            if path not in large:
                g = jax.lax.psum(g, self.axis)
            elif self.kind == "int8":
                g = sum_int8(g, self.axis, devices, fold(key, path))
            else:
                k = max(1, round(self.share * g.shape[-1]))
                g, memory[path] = sum_top_k(g + memory[path], self.axis, k)
            sums[path] = before = g
        return sums, memory


def residual_shardings(
    residual: tree.Params, placed: tree.Params, mesh: Any, axis: str = "data"
) -> tree.Params:
    """Return the sharding of a residual: devices along `axis`, the other axes as the parameter."""
    where = tree.flatten(placed)

    def one(path: str, _: Any) -> jax.sharding.NamedSharding:
        spec = where[path].spec if isinstance(where[path], jax.sharding.NamedSharding) else P()
        return jax.sharding.NamedSharding(mesh, P(axis if axis in mesh.shape else None, *spec))

    return tree.map_leaves(one, residual)


def _places(trains: tree.Params, rules: tree.Rules, manual: str) -> dict[str, Any]:
    """Return the spec of each leaf on the mesh axes that no `shard_map` handles.

    The result is empty if no leaf is split over them.
    """
    axes = {name for name, length in auto_axes().items() if length > 1 and name != manual}
    if not axes:
        return {}
    # the shapes of the gradients
    shapes = tree.map_leaves(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trains)
    found = tree.flatten(parts(rules, shapes, axes))
    return found if any(entry for spec in found.values() for entry in spec) else {}


# ----------------------------------------------------------------------------------------- the sums


def sum_int8(
    x: Float[Array, "..."], axis: str, devices: int, key: jax.Array
) -> Float[Array, "..."]:
    """Sum over an axis of a `shard_map` in int8; the sum is exact on average.

    Args:
      x: a matrix, or a stack of matrices.
      axis: the axis, which must be manual.
      devices: the length of the axis.
      key: the random key of this device and array.
    """
    at, length = _axis_to_cut(x.shape, devices)
    padded = jnp.pad(x, [(0, -length % devices if i == at else 0) for i in range(x.ndim)])
    # piece i takes every devices-th entry from i on, so an axis that is split over other mesh axes
    # stays split
    parts = padded.reshape(*x.shape[:at], -1, devices, *x.shape[at + 1 :])
    codes, scale = _codes(jnp.moveaxis(parts, at + 1, 0), fold(key, "parts"))
    codes, scale = (jax.lax.all_to_all(a, axis, 0, 0, tiled=True) for a in (codes, scale))
    codes, scale = _codes(jnp.sum(_values(codes, scale), axis=0), fold(key, "sum"))
    codes, scale = (jax.lax.all_gather(a, axis) for a in (codes, scale))
    whole = jnp.moveaxis(_values(codes, scale), 0, at + 1).reshape(padded.shape)
    return jax.lax.slice_in_dim(whole, 0, length, axis=at)


def sum_top_k(
    x: Float[Array, "... n"], axis: str, k: int
) -> tuple[Float[Array, "... n"], Float[Array, "... n"]]:
    """Sum the k largest values of each row over an axis.

    Returns:
      The sum, and what this device did not send.

    Args:
      x: the rows.
      axis: the axis, which must be manual.
      k: the number of values to send, at most n.
    """
    _, place = jax.lax.top_k(jnp.abs(x), k)
    values = jnp.take_along_axis(x, place, axis=-1)
    rest = jnp.put_along_axis(x, place, jnp.zeros((), x.dtype), axis=-1, inplace=False)
    index = place.astype(jnp.uint16 if x.shape[-1] <= 2**16 else jnp.int32)
    values, index = (jax.lax.all_gather(a, axis) for a in (values, index))
    values, index = (jnp.moveaxis(a, 0, -2).reshape(*x.shape[:-1], -1) for a in (values, index))

    def spread(values: Array, index: Array) -> Array:
        return jnp.zeros(x.shape[-1], x.dtype).at[index.astype(jnp.int32)].add(values)

    for _ in range(x.ndim - 1):
        spread = jax.vmap(spread)
    return spread(values, index), rest


def _axis_to_cut(shape: tuple[int, ...], devices: int) -> tuple[int, int]:
    """Return an axis before the last, and its length.

    It is the first one that the devices divide, or else the longest.
    """
    axes = range(len(shape) - 1)
    at = next((i for i in axes if shape[i] % devices == 0), max(axes, key=lambda i: shape[i]))
    return at, shape[at]


def _codes(
    x: Float[Array, "... n"], key: jax.Array
) -> tuple[Int8[Array, "... g b"], Float[Array, "... g"]]:
    """Return int8 codes of blocks of the last axis, stochastically rounded, and their scales."""
    block = group_of(x.shape[-1], (256, 128, 64, 32)) or x.shape[-1]
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1) / 127, jnp.finfo(jnp.float32).tiny)
    codes = jnp.floor(blocks / scale[..., None] + dither(key, blocks.shape))
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scale


def _values(
    codes: Integer[Array, "... g b"], scale: Float[Array, "... g"]
) -> Float[Array, "... n"]:
    values = codes.astype(jnp.float32) * scale[..., None]
    return values.reshape(*values.shape[:-2], -1)
