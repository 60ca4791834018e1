"""One forward, one backward (Narayanan et al., 2019): a pipeline that keeps few micro-batches.

It keeps at most S of them, for S stages.

GPipe (`layers.pipeline`, which a model runs by itself if the mesh has `pipeline`) finishes all
forward passes before the first backward pass begins, so it keeps activations of all M
micro-batches. Here the loss of a micro-batch is computed at the last stage as soon as it arrives,
and its gradient travels back at once. Stage s runs micro-batch m forward in slot `2 m + s` and
backward in slot `2 m + 2 S - 1 - s`; in every slot it does one or the other. In between it keeps
the inputs of the stage, for at most S - s micro-batches, and computes the rest again.

Bytes that a device sends on average are those of GPipe from stage to stage, `(S - 1)/S act` each
way, where `act` includes the few numbers of `aux`. Only the batch itself, mostly integers, is
gathered, so that each stage has its rows. The gradients of the parameters outside of the layers
(embedding, head) are summed over the stages: `2 G_outside`. Over `data` all gradients are summed
once, those of the layers as `2 G_layers / S`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.layers import pipeline as stages_of
from jaxmodel.layers.repeat import one_segment, stage_of
from jaxmodel.leaves import Compressed
from jaxmodel.losses import Loss
from jaxmodel.models import Model, Output
from jaxmodel.models.model import begin, with_hidden
from jaxmodel.sharding import auto_axes
from jaxmodel.train.gradients import GradientFn

P = jax.P
AXIS = stages_of.AXIS

type Payload = tuple[
    jax.Array, dict[str, jax.Array]
]  # what passes from stage to stage: activations, and the aux values so far


class _Begun(Exception):
    """Raised to stop a loss where it runs the model; it holds the arguments."""


def one_forward_one_backward(
    model: Model, loss: Loss, frozen: tree.Params | None = None
) -> GradientFn:
    """Return the gradient function of a loss by this schedule, on a mesh with `pipeline`.

    It is `run(trains, batch, rng)`. The loss must be a mean over the `weight` in its metrics and
    run the model once. Losses and gradients are then those of the whole batch, except that values
    which are no sum over rows (a load balance) and all randomness are those of each micro-batch.

    Args:
      model: the model to train: embedding, one segment of equal layers, head.
      loss: see `jaxmodel.losses`. It may only read parameters outside of the layers: no penalties.
      frozen: the parameters that do not train.

    Raises:
      InputError: when called: the mesh or the model is not suitable, sizes cannot be divided
        evenly, or the loss runs the model twice or reads layers.

    Returns:
      What `jax.value_and_grad(..., has_aux=True)` of the loss returns.
    """

    def run(
        trains: tree.Params, batch: Mapping[str, Any], rng: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], tree.Params]:
        axes = auto_axes()
        stages = axes.get(AXIS, 1)
        data = tuple(name for name in ("data",) if axes.get(name, 1) > 1)
        fixed = frozen or {}
        if packed := [
            path for path, leaf in tree.flatten(trains).items() if isinstance(leaf, Compressed)
        ]:
            raise InputError(
                f"trainable: the compressed {packed[0]!r} cannot train in this schedule; use GPipe"
            )
        _check(model, tree.combine(trains, fixed), axes)
        whole = dict(batch)
        rows = whole[
            next((name for name in model.inputs(1, 1) if name in whole), next(iter(whole)))
        ].shape[0]
        layers = tree.depth(tree.combine(trains, fixed)["blocks"])
        count = stages_of.micro_batches(
            layers, rows, stages, model.policy.microbatches, axes.get("data", 1)
        )
        is_cut = jax.tree.map(lambda a: a.ndim > 0 and a.shape[0] == rows, whole)

        def on_stage(
            trains: tree.Params, frozen: tree.Params, whole: dict[str, Any], rng: Any
        ) -> Any:
            schedule = _Schedule(
                model,
                loss,
                frozen,
                stages,
                count,
                data,
                rng,
                stages_of.parted(whole, is_cut, count),
            )
            grads, sums = schedule.run(trains)
            sums = jax.lax.psum(sums, (AXIS, *data))
            share = 1 / jnp.maximum(sums["weight"], jnp.finfo(jnp.float32).tiny)

            def summed(path: str, g: Any) -> Any:
                over = (*data,) if tree.is_stacked(path) else (AXIS, *data)
                return ((jax.lax.psum(g, over) if over else g) * share).astype(g.dtype)

            sums = {
                name: value if name == "weight" else value * share for name, value in sums.items()
            }
            return sums, tree.map_leaves(summed, grads)

        specs = lambda params: tree.map_leaves(
            lambda path, _: P(AXIS) if tree.is_stacked(path) else P(), params
        )
        rows_of = jax.tree.map(lambda has_rows: P((AXIS, *data)) if has_rows else P(), is_cut)
        across = jax.shard_map(
            on_stage,
            in_specs=(specs(trains), specs(fixed), rows_of, P()),
            out_specs=(P(), specs(trains)),
            axis_names={AXIS, *data},
            check_vma=False,
        )
        sums, grads = across(trains, fixed, whole, rng)
        return (sums.pop("loss"), sums), grads

    return run


class _Elsewhere:
    """A placeholder for the parameters of the layers where the loss is computed.

    They are spread over all stages, so the loss must not read them.
    """

    def __getattr__(self, name: str) -> Any:
        raise InputError(
            "loss: it reads the parameters of all layers (a penalty?), but a pipeline stage has "
            "only its own"
        )


def _check(model: Model, params: tree.Params, axes: Mapping[str, int]) -> None:
    if axes.get(AXIS, 1) < 2:
        raise InputError(
            f"mesh: this schedule needs an axis 'pipeline' of 2 or more; there are "
            f"{dict(axes) or 'none'}"
        )
    if axes.get("sequence", 1) > 1:
        raise InputError(
            "mesh: a ring over 'sequence' needs all stages at once; use GPipe, whose stages all "
            "do the same"
        )
    if axes.get("tensor", 1) > 1 and (
        rows := [name for name in ("fsdp", "expert") if axes.get(name, 1) > 1]
    ):
        # the gathers of embedding and loss: tables split over `tensor`, ids split over another axis
        raise InputError(
            f"mesh: beside 'tensor', {rows[0]!r} ends in a failed assertion of XLA inside of this "
            f"schedule; use 'data', or GPipe"
        )
    elsewhere = [
        path
        for path in tree.flatten(params)
        if tree.is_stacked(path) and not path.startswith("blocks/")
    ]
    if model.parts.block is None or elsewhere:
        what = f"{elsewhere[0]!r} belongs to another stack" if elsewhere else "it has none"
        raise InputError(
            f"model: one forward, one backward needs one stack of layers, 'blocks'; {what}"
        )
    one_segment(params["blocks"])


@dataclasses.dataclass
class _Schedule:
    """The work of one stage, inside of the `shard_map`."""

    model: Model
    loss: Loss
    frozen: tree.Params
    stages: int
    count: int
    data: tuple[str, ...]
    rng: Any
    part: Any  # index of a micro-batch -> its batch

    def __post_init__(self) -> None:
        self.place = jax.lax.axis_index(AXIS).astype(jnp.int32)
        self.last = self.place == self.stages - 1

    def key(self, m: Any) -> Any:
        return stages_of.key_of(self.rng, m, self.data)

    # ------------------------------------------------------------------------------ one micro-batch

    def begun(
        self, params: tree.Params, m: Any
    ) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array], Any, bool]:
        """Return the arguments with which the loss runs the model.

        They are the embedded inputs, context, aux, key, and whether it trains.
        """

        def hidden(
            params: Any, inputs: Any, cache: Any = None, rng: Any = None, train: bool = False
        ) -> Output:
            raise _Begun(*begin(self.model, params, inputs, rng, train), rng, train)

        try:
            self.loss(with_hidden(self.model, hidden), params, self.part(m), self.key(m))
        except _Begun as found:
            return found.args  # pyright: ignore[reportReturnType]
        raise InputError(
            "loss: it does not run the model's layers (`model.hidden` or `model.apply`)"
        )

    def forward(self, trains: tree.Params, given: Payload, m: Any) -> Payload:
        params = tree.combine(trains, self.frozen)
        # the embedding itself is not used, so it is not computed
        _, context, first_aux, rng, train = self.begun(params, m)
        first = self.place == 0
        x = jax.lax.cond(
            first, lambda: stages_of.by_rows(self.begun(params, m)[0]), lambda: given[0]
        )
        policy = self.model.policy
        stage = stage_of(self.model.parts.block, train, policy.remat, policy.unroll)  # pyright: ignore[reportArgumentType]
        y, aux = stage(one_segment(params["blocks"]), x, context, self.place, rng)
        here = {
            name: jnp.where(first, value, jnp.zeros_like(value))
            for name, value in first_aux.items()
        }
        total = {
            name: sum((d[name] for d in (given[1], here) if name in d), aux.get(name, 0.0))
            for name in {**here, **aux}
        }
        return stages_of.by_rows(y), {
            name: jnp.asarray(value, jnp.float32) for name, value in total.items()
        }

    def judged(
        self, trains: tree.Params, found: Payload, m: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss times its weight, which has the gradient, and all values to be summed."""
        calls = []

        def hidden(*args: Any, **options: Any) -> Output:
            calls.append(1)
            return Output(hidden=found[0], aux=dict(found[1]))

        params = {**tree.combine(trains, self.frozen), "blocks": _Elsewhere()}
        value, metrics = self.loss(
            with_hidden(self.model, hidden), params, self.part(m), self.key(m)
        )
        if len(calls) != 1:
            raise InputError(
                f"loss: it runs the model {len(calls)} times; one forward, one backward needs one "
                f"that does so once"
            )
        weight = jax.lax.stop_gradient(metrics.get("weight", jnp.ones(()))).astype(jnp.float32)
        sums = {
            name: jax.lax.stop_gradient(metric).astype(jnp.float32) * weight
            for name, metric in metrics.items()
        }
        return value * weight, {
            **sums,
            "loss": jax.lax.stop_gradient(value) * weight,
            "weight": weight,
        }

    def backward(
        self, trains: tree.Params, given: Payload, g: Payload, m: Any
    ) -> tuple[tree.Params, Payload, dict[str, Any]]:
        def whole(
            trains: tree.Params, given: Payload
        ) -> tuple[tuple[Payload, jax.Array], dict[str, jax.Array]]:
            found = self.forward(trains, given, m)
            zeros = optax.tree.zeros_like(jax.eval_shape(lambda: self.judged(trains, found, m)))
            value, sums = jax.lax.cond(
                self.last, lambda: self.judged(trains, found, m), lambda: zeros
            )
            return (found, value), sums

        (_, value), pull, sums = jax.vjp(whole, trains, given, has_aux=True)
        d_trains, d_given = pull((g, jnp.ones_like(value)))
        return d_trains, d_given, sums

    # ---------------------------------------------------------------------------------- all of them

    def run(self, trains: tree.Params) -> tuple[tree.Params, dict[str, jax.Array]]:
        """Return the sums over micro-batches of weighted gradients and values of the loss."""
        nothing = self._payload(trains)
        shapes = jax.eval_shape(lambda: self.backward(trains, nothing, nothing, 0))
        kept = jax.tree.map(lambda a: jnp.zeros((self.stages, *a.shape), a.dtype), nothing)
        totals = optax.tree.zeros_like((shapes[0], shapes[2]))
        pairs = [
            tuple(self._hops(slot) for slot in (tick, tick + 1))
            for tick in range(0, 2 * (self.count + self.stages - 1), 2)
        ]

        def tick(carry: Any, t: Any, hops: Any) -> tuple[Any, tuple[()]]:
            for i in (0, 1):
                kept, totals, arrived, came_back = carry
                kept, totals, ahead, back = self._slot(
                    trains, 2 * t + i, kept, totals, arrived, came_back, nothing
                )
                carry = kept, totals, _send(ahead, hops[i][0]), _send(back, hops[i][1])
            return carry, ()

        (_, totals, _, _), _ = stages_of.in_ticks(tick, (kept, totals, nothing, nothing), pairs)
        return totals

    def _slot(
        self,
        trains: Any,
        slot: Any,
        kept: Any,
        totals: Any,
        arrived: Payload,
        came_back: Payload,
        nothing: Payload,
    ) -> tuple[Any, Any, Payload, Payload]:
        ahead, back = self._twice(slot, self.place)
        is_ahead = self._is_busy(ahead)
        is_back = self._is_busy(back)

        def idle(kept: Any, totals: Any) -> Any:
            return kept, totals, nothing, nothing

        def forward(kept: Any, totals: Any) -> Any:
            m = ahead // 2
            kept = jax.tree.map(lambda all_, a: all_.at[m % self.stages].set(a), kept, arrived)
            found = jax.lax.cond(
                self.last, lambda: nothing, lambda: self.forward(trains, arrived, m)
            )
            return kept, totals, found, nothing

        def backward(kept: Any, totals: Any) -> Any:
            m = back // 2
            given = jax.tree.map(lambda a: a[m % self.stages], kept)
            d_trains, d_given, sums = self.backward(trains, given, came_back, m)
            return kept, jax.tree.map(jnp.add, totals, (d_trains, sums)), nothing, d_given

        # over all stages: what no stage does in this slot is left out of the program
        some_ahead, some_back = self._busy(slot)
        run = lambda kept, totals: (
            jax.lax.cond(is_back, backward, idle, kept, totals) if some_back else idle(kept, totals)
        )
        return (
            jax.lax.cond(is_ahead, forward, run, kept, totals) if some_ahead else run(kept, totals)
        )

    def _busy(self, slot: Any) -> tuple[bool, bool]:
        """Return whether any stage runs forward in a slot, and whether any runs backward.

        Both are true if the index of the slot is traced.
        """
        if not isinstance(slot, int):
            return True, True
        stages = [self._twice(slot, place) for place in range(self.stages)]
        return any(self._is_busy(a) for a, _ in stages), any(self._is_busy(b) for _, b in stages)

    def _twice(self, slot: Any, place: Any) -> tuple[Any, Any]:
        """Return twice the micro-batch that a stage runs forward in a slot, and backward.

        An odd number, or one outside of the batch, means none.
        """
        return slot - place, slot + place - (2 * self.stages - 1)

    def _is_busy(self, twice: Any) -> Any:
        return (twice % 2 == 0) & (twice >= 0) & (twice < 2 * self.count)

    def _hops(self, slot: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Return which stages send ahead after a slot, and which send back."""
        busy = [tuple(map(self._is_busy, self._twice(slot, s))) for s in range(self.stages)]
        ahead = tuple((s, s + 1) for s in range(self.stages - 1) if busy[s][0])
        return ahead, tuple((s, s - 1) for s in range(1, self.stages) if busy[s][1])

    def _payload(self, trains: tree.Params) -> Payload:
        """Return zeros in the shape of what passes from stage to stage."""
        x = jax.eval_shape(lambda: self.begun(tree.combine(trains, self.frozen), 0)[0])
        zeros = jnp.zeros(x.shape, x.dtype)
        aux = jax.eval_shape(lambda: self.forward(trains, (zeros, {}), 0)[1])
        return zeros, optax.tree.zeros_like(aux)


def _send(payload: Payload, pairs: tuple[tuple[int, int], ...]) -> Payload:
    if not pairs:
        return optax.tree.zeros_like(payload)
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, pairs), payload)
