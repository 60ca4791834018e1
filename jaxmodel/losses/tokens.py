"""The cross entropy of the next token, computed in chunks of positions to bound memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmodel import tree
from jaxmodel.errors import at_least
from jaxmodel.losses.contract import IGNORED, counting, model_inputs, row_weights, weighted_mean
from jaxmodel.models import Model
from jaxmodel.models.checks import runs_on
from jaxmodel.sharding import auto_axes, axes_of, parts

LOGITS = 2**30
"""Bytes of float32 logits that a device computes at once.

Enough that adding up the chunks' gradients of the head, which is limited by memory bandwidth, takes
little time beside the matrix products.
"""


def next_token(
    model: Model,
    params: tree.Params,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    *,
    train: bool = True,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Compute the mean cross entropy of the next token, in nats, over the positions with weight.

    In training, a mixture-of-experts model adds `config.balance` times its load-balancing loss
    (Fedus et al., 2022). `aux["load_balance"]` is a sum over the layers and is divided by their
    number, so that the coefficient means the same at every depth.

    Args:
      model: a decoder, or an encoder with a decoder.
      params: its parameters.
      batch: `targets` `[B, T]`, -100 where there is nothing to predict; optionally `weights`
        `[B, T]` (0 means the same) or `[B]`; and the model's inputs: `tokens` `[B, T]`, `segments`,
        `positions`, `source`.
      rng: for dropout.
      train: False for evaluation, which returns the cross entropy alone.
      chunk: see `cross_entropy`.

    Returns:
      The loss, and the metrics: `weight`, the number of tokens; for a mixture of experts also
      `load_balance`, the mean over the layers, which equals the number of experts per token if all
      experts are used equally.
    """
    out = model.hidden(params, model_inputs(batch, "targets"), rng=rng, train=train)
    targets, weights = counting(batch["targets"], row_weights(batch, batch["targets"].shape))
    loss = weighted_mean(cross_entropy(model, params, out.hidden, targets, chunk=chunk), weights)
    metrics = {"weight": jnp.sum(weights)}
    if "load_balance" not in out.aux:
        return loss, metrics
    balance = out.aux["load_balance"] / model.config.expert_layers
    return loss + model.config.balance * balance if train else loss, {
        **metrics,
        "load_balance": balance,
    }


def cross_entropy(
    model: Model,
    params: tree.Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """Compute `log sum_v exp(z_v) - z_target` with `z = head(hidden)` for each target, in nats.

    Args:
      model: the model whose head is run.
      params: its parameters.
      hidden: what `model.hidden` returns.
      targets: the token that each position should predict; -100 gives 0, any other number that is
        no token gives NaN.
      chunk: the number of positions of a row whose logits exist at once, on each device that the
        mesh splits positions over. `[B, T, V]` never exists, not even in the backward pass, which
        computes each chunk again. T for all at once; by default as many as fit `LOGITS` bytes on a
        device.

    Raises:
      InputError: the chunk is below 1.
    """
    if chunk is not None:
        at_least("chunk", chunk)
    with runs_on(model, params, layers=False):
        return _cross_entropy(model, params, hidden, targets, chunk)


def _cross_entropy(
    model: Model, params: tree.Params, hidden: Array, targets: Array, chunk: int | None
) -> Array:
    def part(params: tree.Params, x: Array, targets: Array) -> Array:
        logits = model.parts.head(params, x)
        known = (targets >= 0) & (targets < logits.shape[-1])
        chosen = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[..., None], axis=-1)[
            ..., 0
        ]
        each = jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.nan)
        return jnp.where(targets == IGNORED, 0.0, each)

    def chunks(params: tree.Params, x: Array, targets: Array) -> Array:
        """Run the chunks one after another; the last is filled up with zeros."""
        (b, t), size = targets.shape, min(chunk or 1, targets.shape[1])
        pieces = lambda a: jnp.moveaxis(
            jnp.pad(a, [(0, 0), (0, -t % size), *[(0, 0)] * (a.ndim - 2)]).reshape(
                b, -1, size, *a.shape[2:]
            ),
            1,
            0,
        )
        # the backward pass computes a chunk's logits again
        one = jax.checkpoint(functools.partial(part, params))
        return jnp.moveaxis(
            jax.lax.map(lambda xs: one(*xs), (pieces(x), pieces(targets))), 0, 1
        ).reshape(b, -1)[:, :t]

    cut = [
        axes_of(letter, model.policy.axes, length)
        for letter, length in zip("BT", targets.shape, strict=True)
    ]
    devices = math.prod(auto_axes()[name] for names in cut for name in names)
    needed = 4 * jax.eval_shape(functools.partial(model.parts.head, params), hidden).size // devices
    if (needed <= LOGITS) if chunk is None else (chunk >= targets.shape[1]):
        return part(params, hidden, targets)
    chunk = chunk or max(
        1, targets.shape[1] * LOGITS // needed // math.prod(auto_axes()[name] for name in cut[1])
    )
    return _on_each_device(chunks, model.rules, cut)(params, hidden, targets)


def _on_each_device(
    run: Callable[..., Array], rules: tree.Rules, cut: Sequence[tuple[str, ...]]
) -> Callable[..., Array]:
    """Run `run(params, x, targets)` on each device's own rows and positions.

    Left to jit, every chunk would gather the head's weights and sum their gradients. Here the
    parameters outside of the layers are gathered once before the first chunk, and their gradients
    are summed (or scattered) once after the last.
    """
    axes = {name for names in cut for name in names}
    rows = P(*cut)
    if not axes:
        return run

    def whole(params: tree.Params, x: Array, targets: Array) -> Array:
        outside = {
            path: leaf
            for path, leaf in tree.flatten(params).items()
            if "blocks" not in path.split("/")
        }
        own = parts(rules, params := tree.unflatten(outside), axes)

        def local(params: tree.Params, x: Array, targets: Array) -> Array:
            return run(jax.tree.map(_gathered, params, own), x, targets)

        across = jax.shard_map(
            local, in_specs=(own, rows, rows), out_specs=rows, axis_names=axes, check_vma=False
        )
        return across(params, x, targets)

    return whole


def _gathered(a: Array, spec: P) -> Array:
    for axis, names in enumerate(spec):
        a = jax.lax.all_gather(a, names, axis=axis, tiled=True) if names else a
    return a
