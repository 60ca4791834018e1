"""The part of the batches that only judges: cut off, its loss, and what a report says of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import tree
from jaxmodel.compress.gradients import Loss, default
from jaxmodel.errors import InputError
from jaxmodel.evaluate.perplexity import bootstrap, token_nll
from jaxmodel.layers.moe import real_tokens
from jaxmodel.leaves.sparse import expand
from jaxmodel.models import Model
from jaxmodel.models.model import Inputs
from jaxmodel.sharding import auto_axes

BLOCK = 32
"""Neighbouring predictions that are resampled together, for intervals."""


def hold_out(batches: Iterable[Inputs], part: float) -> tuple[list[Inputs], list[Inputs]]:
    """Return the batches to learn from, and the last ones, to judge by.

    Of a single batch the last rows are held out, unless it lies on a mesh.

    Args:
      batches: at least one.
      part: of the batches, at least one of them if it is above 0 and there are two.

    Raises:
      InputError: no batches, or a part that leaves none.
    """
    if not 0 <= part < 1:
        raise InputError(f"held_out: {part} given; allowed: from 0, below 1")
    given = list(batches)
    if not given:
        raise InputError("batches: none given; allowed: at least one")
    if len(given) == 1 and part and not auto_axes():
        rows = len(jax.tree.leaves(given[0])[0])
        if rows > 1:
            at = rows - min(max(1, round(rows * part)), rows - 1)
            cut = lambda of: jax.tree.map(lambda array: array[of], given[0])
            return [cut(slice(None, at))], [cut(slice(at, None))]
    count = min(max(1, round(len(given) * part)), len(given) - 1) if part else 0
    return given[: len(given) - count], given[len(given) - count :]


def protocol_of(kept: Sequence[Inputs], held: Sequence[Inputs]) -> dict[str, Any]:
    """Return what was measured: the fingerprint of the data, its context and sizes."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves([*kept, *held]):
        if getattr(array, "is_fully_addressable", True):
            plain = np.asarray(array)
            digest.update(f"{plain.dtype} {plain.shape}".encode() + plain.tobytes())
    first = _named(kept[0])
    tokens = first.get("tokens")

    def size(batches: Sequence[Inputs]) -> int:
        total = 0
        for batch in map(_named, batches):
            real = real_tokens(batch)
            shown = next(iter(batch.values())) if "tokens" not in batch else batch["tokens"]
            count = math.prod(jnp.shape(shown)[: 2 if "tokens" in batch else 1])
            total += count if real is None else int(jnp.sum(real))
        return total

    return {
        "data": digest.hexdigest(),
        "context": None if tokens is None else int(jnp.shape(tokens)[1]),
        "tokens": size(kept),
        "held_out_tokens": size(held),
    }


def losses_of(
    versions: Sequence[tuple[Model, tree.Params]], held: Sequence[Inputs], loss: Loss | None
) -> dict[str, Any] | None:
    """Return the loss of a model before and after on held-out batches.

    Args:
      versions: the model and its parameters, before and after.
      held: the batches.
      loss: see `calibrate`.

    Returns:
      `before`, `after` and `change`, each with its mean and 95 % interval over blocks of tokens (or
      over batches; None for a single one), and the number of predictions. None if there are no
      batches, or they hold nothing that a loss compares with.
    """
    if not held:
        return None
    model, _ = versions[0]
    named = [_named(batch) for batch in held]
    texts = loss is None and model.continues and all(list(one) == ["tokens"] for one in named)
    if texts and len({one["tokens"].shape[1] for one in named}) == 1:
        windows = np.concatenate([np.asarray(one["tokens"]) for one in named])
        if windows.shape[1] < 2:
            return None
        found = [token_nll(model, expand(params), windows) for model, params in versions]
    else:
        run = default if loss is None else loss
        try:
            found = [_means(model, params, named, run) for model, params in versions]
        except InputError:
            if loss is not None:
                raise
            return None
    before, after = found
    each = {"before": before, "after": after, "change": after - before}
    rows, width = before.shape
    some = rows * max(1, width // BLOCK) > 1
    return {
        **{
            name: {
                "mean": float(np.mean(values, dtype=np.float64)),
                "interval": list(bootstrap(values, block=BLOCK)) if some else None,
            }
            for name, values in each.items()
        },
        "predictions": int(before.size) if texts else None,
    }


def _means(model: Model, params: tree.Params, batches: Sequence[Any], loss: Loss) -> np.ndarray:
    """Return the loss of each batch, `[batches, 1]`."""

    @jax.jit
    def mean(params: tree.Params, batch: Any) -> jax.Array:
        found = loss(model, params, batch, None, train=False)
        return found[0] if isinstance(found, tuple) else found

    return np.array([[float(mean(expand(params), batch))] for batch in batches])


def _named(batch: Inputs) -> Mapping[str, Any]:
    return batch if isinstance(batch, Mapping) else {"tokens": batch}
