"""Gradients of a loss as statistics of the weights: what a change of each would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import losses, ops, tree
from jaxmodel.compress.observe import Stats, matrices
from jaxmodel.data.augment.base import IGNORED
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed
from jaxmodel.models import Model, check_params
from jaxmodel.ops.probe import GRADIENT
from jaxmodel.progress import progress

FISHER = "fisher"
OF_LOSS = (GRADIENT, FISHER)
"""The statistics that are gradients of a loss."""

type Loss = Callable[..., tuple[jax.Array, Mapping[str, Any]]]


def observe_gradients(
    model: Model,
    params: tree.Params,
    batches: Iterable[Any],
    paths: str = ".*",
    loss: Loss | None = None,
) -> Stats:
    """Sum the gradients of a loss by the weights of every matrix, and their squares, over batches.

    Args:
      model: the model whose loss it is.
      params: plain leaves, or compressed ones, whose gradient is that of the weight that they
        stand for.
      batches: of the loss; of one shape if possible (each shape compiles once).
      paths: regular expression of the layer paths to measure.
      loss: as for training: `(model, params, batch, rng, *, train) -> (mean, metrics)`; None for
        what the batch asks for (see `losses.default_loss`), of tokens alone the next one's.

    Returns:
      Path of a leaf -> `gradient`, the sum over the batches of the gradient of their mean loss, and
      `fisher`, the sum of its squares; both float32 and like the weight. `fisher` is the diagonal
      of the empirical Fisher information if each batch has one row. Divide by the number of batches
      for means.

    Raises:
      InputError: no matrix matches `paths`, there are no batches, the batches are not those of the
        loss, or a gradient is not finite.

    >>> from jaxmodel.models import llama
    >>> model = llama.model(llama.SIZES["tiny"])
    >>> tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    >>> found = observe_gradients(model, jax.jit(model.init)(jax.random.key(0)), [tokens], ".*/up")
    >>> found["blocks/0-2/mlp/up"]["fisher"].shape
    (3, 64, 32)
    """
    params, wanted = matrices(params, paths)
    run = default if loss is None else loss

    @jax.jit
    def gradient(params: tree.Params, batch: Any) -> dict[str, jax.Array]:
        leaves = tree.flatten(params)
        zeros = {path: jnp.zeros(leaves[path].shape, jnp.float32) for path in wanted}

        def mean(zeros: dict[str, jax.Array]) -> jax.Array:
            moved = {path: _moved(leaves[path], zeros[path]) for path in wanted}
            return run(model, tree.unflatten({**leaves, **moved}), batch, None, train=False)[0]

        return jax.grad(mean)(zeros)

    check_params(model, params)
    total: Stats | None = None
    for batch in progress(batches, "gradients"):
        found = gradient(params, batch)
        total = _with_squares(found) if total is None else _added(total, found)
    if total is None:
        raise InputError("batches: none given; allowed: at least one")
    for path, size in _sizes(total).items():
        if not np.isfinite(np.asarray(size)):
            raise InputError(
                f"observe_gradients: the gradient of {path!r} is not finite; a weight or a batch "
                "contains NaN or infinity"
            )
    return total


@jax.jit
def _with_squares(found: dict[str, jax.Array]) -> Stats:
    return {path: {GRADIENT: g, FISHER: g**2} for path, g in found.items()}


@jax.jit
def _added(total: Stats, found: dict[str, jax.Array]) -> Stats:
    return jax.tree.map(jnp.add, total, _with_squares(found))


@jax.jit
def _sizes(total: Stats) -> dict[str, jax.Array]:
    return {path: jnp.sum(of[FISHER]) for path, of in total.items()}


def _moved(leaf: Any, zeros: jax.Array) -> Any:
    """Return a leaf whose gradient is that for the zeros."""
    if isinstance(leaf, Compressed):
        return ops.Probe(leaf, {GRADIENT: zeros})
    return leaf + zeros.astype(leaf.dtype)


def default(
    model: Model, params: tree.Params, batch: Any, rng: Any = None, *, train: bool = False
) -> tuple[jax.Array, Mapping[str, Any]]:
    """Return the loss that fits a batch: `losses.default_loss`, or of tokens alone the next one's.

    Raises:
      InputError: the batch has nothing that a loss compares with.
    """
    batch = dict(batch) if isinstance(batch, Mapping) else {next(iter(model.inputs(1, 1))): batch}
    if model.continues and not {"targets", "labels"} & batch.keys():
        tokens = batch["tokens"]
        counts = jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1
        if "mask" in batch:
            counts = counts & jnp.roll(batch["mask"].astype(jnp.bool_), -1, axis=1)
        batch["targets"] = jnp.where(counts, jnp.roll(tokens, -1, axis=1), IGNORED)
    return losses.default_loss(model, batch)(model, params, batch, rng, train=train)
