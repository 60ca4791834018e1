"""Gradients between the devices of the data axis in fewer bytes: as int8, or the largest few with
the rest remembered.

    step = make_step(model, loss, optimizer, exchange=Exchange("int8"))
    state = init_state(params, optimizer, exchange=Exchange("int8"))

Each device takes the gradient of its own rows (of all its micro-batches, one after the other) and
then they exchange once a step, in a `shard_map` over the data axis; the other axes of the mesh stay
as they are, so what is cut over `fsdp` or `tensor` is exchanged in its parts. Bytes of a step among
n devices, by the table of `jaxmodel.plan.collectives`, where a plain all-reduce of G values has 8
G:

- "int8": `2 G (1 + 4 / block)`, about 0.26 of it. Each device sends every other its part in int8,
  with a scale for each block of a row; sums what it got in float32; and sends the sums to all, in
  int8 again. Both roundings are at random with an exact mean, so the gradient is right on average
  and nothing needs to be remembered.
- "top_k": `6 n share G` (8 from rows of 65,536 on). Each device sends the largest values of each
  row and adds what it did not send to its next gradient (error feedback: Stich et al., 2018), which
  lies in `state.extra["residual"]`, 4 bytes a weight and device.

Leaves of less than `smallest` values and vectors are summed in float32. As in every data-parallel
run, what is not a sum over rows (a load balance) and all randomness is that of each device's own
rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Integer

from jaxmodel import tree
from jaxmodel.errors import InputError, at_least, unknown
from jaxmodel.optim.rounding import dither, group_of
from jaxmodel.sharding import auto_axes, parts
from jaxmodel.train.gradients import GradientFn

P = jax.P
KINDS = ("int8", "top_k")
# what the rounding folds into the step's key; see `models.model` for the other numbers
_KEY = 2**32 - 6


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the gradients of the data axis are summed.

    Attributes:
      kind: of `KINDS`: "int8" or "top_k".
      share: of "top_k": of the values of a row, at least one.
      smallest: leaves with fewer values a layer are summed as they are.
      axis: of the mesh. Where the mesh has it not, nothing is changed.

    Raises:
      InputError: an unknown kind, or a share that is not above 0 and at most 1.
    """

    kind: str = "int8"
    share: float = 0.01
    smallest: int = 4096
    axis: str = "data"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("gradient_compression", self.kind, KINDS)
        if not 0 < self.share <= 1:
            raise InputError(f"share: {self.share} given; allowed: above 0 and at most 1")
        at_least("smallest", self.smallest)

    def residual(self, trains: tree.Params) -> tree.Params | None:
        """What a state remembers at the start: for each large leaf float32 zeros with an axis of
        devices in front; None if nothing.
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
        """The gradient function with its sums taken so: `(trains, batch, rng, residual) ->
        (((value, metrics), grads), residual)`.

        Args:
          run: a gradient function whose metrics have `weight`, what its value is a mean over.
          rules: the model's, path -> `PartitionSpec`; gradients lie as the parameters do while they
            are exchanged.

        Raises:
          InputError: when called, "top_k" without a residual.
        """

        def whole(trains: Any, batch: Mapping[str, Any], rng: Any, residual: Any = None) -> Any:
            devices = auto_axes().get(self.axis, 1)
            if devices == 1:
                return run(trains, batch, rng), residual
            if auto_axes().get("pipeline", 1) > 1:
                raise InputError(
                    "mesh: with stages of a pipeline gradients cannot be exchanged so; leave out "
                    "one of both"
                )
            if self.kind == "top_k" and residual is None:
                raise InputError(
                    "exchange: the state has no residual; make it by init_state(exchange=...), on "
                    "the mesh in use"
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
        """On one device of the axis."""
        place = jax.lax.axis_index(self.axis)
        rng = jax.random.fold_in(rng, place)
        (value, metrics), grads = run(trains, batch, rng)
        weight = metrics["weight"].astype(jnp.float32)
        total = jax.lax.psum(weight, self.axis)
        part = weight / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        mean = lambda a: jax.lax.psum(a.astype(jnp.float32) * part, self.axis)
        value = mean(value)
        others = {name: mean(metric) for name, metric in metrics.items() if name != "weight"}
        flat = tree.flatten(grads)
        shares = {path: g.astype(jnp.float32) * part for path, g in flat.items()}
        memory = (
            {} if residual is None else {path: e[0] for path, e in tree.flatten(residual).items()}
        )
        large = [path for path, grad in flat.items() if self._large(path, grad)]

        def summed(
            grads: dict[str, Array], memory: dict[str, Array], key: Any
        ) -> tuple[dict[str, Array], dict[str, Array]]:
            before = jnp.zeros(())
            sums = {}
            for i, (path, g) in enumerate(grads.items()):
                # one after the other: simulated devices that run independent collectives in another
                # order each wait for ever
                g, _ = jax.lax.optimization_barrier((g, before))
                if path not in large:
                    g = jax.lax.psum(g, self.axis)
                elif self.kind == "int8":
                    g = sum_int8(g, self.axis, devices, jax.random.fold_in(key, i))
                else:
                    g, memory[path] = sum_top_k(
                        g + memory[path], self.axis, max(1, round(self.share * g.shape[-1]))
                    )
                sums[path] = before = g
            return sums, memory

        if places:  # the partitioner would gather what is cut over the other axes
            specs = {path: places[path] for path in shares}, {path: places[path] for path in memory}
            rest = {name for spec in places.values() for entry in spec for name in _names(entry)}
            summed = jax.shard_map(
                summed, in_specs=(*specs, P()), out_specs=specs, axis_names=rest, check_vma=False
            )
        sums, memory = summed(shares, memory, jax.random.fold_in(rng, _KEY))
        grads = tree.unflatten({path: g.astype(flat[path].dtype) for path, g in sums.items()})
        memory = (
            None
            if residual is None
            else tree.unflatten({path: e[None] for path, e in memory.items()})
        )
        return ((value, {**others, "weight": total}), grads), memory


def residual_shardings(
    residual: tree.Params, placed: tree.Params, mesh: Any, axis: str = "data"
) -> tree.Params:
    """Where a residual lies: its first axis along `axis`, the others as the parameter lies."""
    where = tree.flatten(placed)

    def one(path: str, _: Any) -> jax.sharding.NamedSharding:
        spec = where[path].spec if isinstance(where[path], jax.sharding.NamedSharding) else P()
        return jax.sharding.NamedSharding(mesh, P(axis if axis in mesh.shape else None, *spec))

    return tree.map_leaves(one, residual)


def _places(trains: tree.Params, rules: tree.Rules, manual: str) -> dict[str, Any]:
    """The spec of each leaf on the axes of the mesh that no `shard_map` cuts; nothing where none
    cuts any.
    """
    axes = {name for name, length in auto_axes().items() if length > 1 and name != manual}
    if not axes:
        return {}
    # what gradients have
    shapes = tree.map_leaves(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trains)
    found = tree.flatten(parts(rules, shapes, axes))
    return found if any(entry for spec in found.values() for entry in spec) else {}


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


# ----------------------------------------------------------------------------------------- the sums


def sum_int8(
    x: Float[Array, "..."], axis: str, devices: int, key: jax.Array
) -> Float[Array, "..."]:
    """The sum over an axis of a `shard_map`, sent as int8, on average exact.

    Args:
      x: a matrix or several behind each other.
      axis: manual.
      devices: its length.
      key: of this device and array.
    """
    at, length = _axis_to_cut(x.shape, devices)
    padded = jnp.pad(x, [(0, -length % devices if i == at else 0) for i in range(x.ndim)])
    # piece i has every devices-th entry from i on, so that an axis that is cut over the rest of the
    # mesh stays cut
    parts = padded.reshape(*x.shape[:at], -1, devices, *x.shape[at + 1 :])
    codes, scale = _codes(jnp.moveaxis(parts, at + 1, 0), jax.random.fold_in(key, 0))
    codes, scale = (jax.lax.all_to_all(a, axis, 0, 0, tiled=True) for a in (codes, scale))
    codes, scale = _codes(jnp.sum(_values(codes, scale), axis=0), jax.random.fold_in(key, 1))
    codes, scale = (jax.lax.all_gather(a, axis) for a in (codes, scale))
    whole = jnp.moveaxis(_values(codes, scale), 0, at + 1).reshape(padded.shape)
    return jax.lax.slice_in_dim(whole, 0, length, axis=at)


def sum_top_k(
    x: Float[Array, "... n"], axis: str, k: int
) -> tuple[Float[Array, "... n"], Float[Array, "... n"]]:
    """The sum over an axis of the k largest values of each row, and what this device did not send.

    Args:
      x: rows.
      axis: manual.
      k: at most n.
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
    """The first axis before the last that the devices divide, or else the longest of these, and its
    length.
    """
    axes = range(len(shape) - 1)
    at = next((i for i in axes if shape[i] % devices == 0), max(axes, key=lambda i: shape[i]))
    return at, shape[at]


def _codes(
    x: Float[Array, "... n"], key: jax.Array
) -> tuple[Int8[Array, "... g b"], Float[Array, "... g"]]:
    """int8 codes of blocks of the last axis, rounded at random, and their scales."""
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
