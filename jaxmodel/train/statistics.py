"""`set_batch_statistics`: what batch norms normalise by in inference, measured on data; and the
same of a run, for `fit`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import axes, tree
from jaxmodel.data import Batches as Stream
from jaxmodel.errors import InputError, at_least
from jaxmodel.losses import Loss
from jaxmodel.models import Model
from jaxmodel.models.model import Inputs
from jaxmodel.ops.norms import Measured
from jaxmodel.progress import progress
from jaxmodel.train.evaluation import Once
from jaxmodel.train.placing import Placed, whole
from jaxmodel.train.state import TrainState, averaged

type Batches = Iterable[Inputs | np.ndarray | Mapping[str, np.ndarray]]
type Sums = dict[
    str, dict[str, Any]
]  # path of a mean -> count, sum, square; of what a module keeps -> count, kept

ROWS = 1024
"""Rows that `fit` measures statistics on."""
_STATE = "state/"  # what a foreign module keeps stands there


def set_batch_statistics(
    model: Model,
    params: tree.Params,
    batches: Batches,
    *,
    passes: int = 1,
    loss: Loss | None = None,
) -> tree.Params:
    """`params` with the mean and the variance of every batch norm's input over all the data.

    They are those of all rows together, whatever batches these come in: not an average that moves
    while the weights do, and no state of the model (Wu & Johnson, 2021). Rows of `weights` 0 do not
    count. Nothing is dropped meanwhile. What reaches a norm depends on how those in front of it
    normalise: in the first pass by each batch itself, as in training; in every further pass by the
    statistics found so far. So one batch of all the data is exact at once, and with smaller ones
    each pass makes another norm exact, from the first on.

    A foreign module (`models.from_linen`, `models.from_nnx`) is run as in training, dropout and
    all. Whatever of its state is a running average, `new = m old + (1 - m) batch`, becomes what the
    average comes to: the mean over the batches, of a variance that of all rows together. Its own
    norms tell which that is and their m, so no module needs to be known. Other state stays.

    Args:
      model: with batch norms: leaves `X/mean` and `X/variance` that its axes call measured, or a
        foreign module with state.
      params: its parameters.
      batches: inputs of `model.apply`, of one shape if possible (each shape compiles once); a list
        if there are several passes. Labels among them are not read, so a training stream serves:
        `(stream.batch(i) for i in range(20))`.
      passes: over the batches; of a foreign module 1.
      loss: shows the batches to the model, as it is held out; None for `model.apply`.

    Returns:
      The tree with other `mean` and `variance` leaves, where they lay.

    Raises:
      InputError: no batch norm in the tree, no batches (or an iterator that is empty in the second
        pass), a norm that is not used, or several passes of a foreign module.

    >>> from jaxmodel.models import resnet
    >>> model = resnet.model(resnet.Config((1,), 2, classes=2, size=4, small=True))
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> pixels = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    >>> final = set_batch_statistics(model, params, [pixels])
    >>> logits = jax.jit(lambda params, train: model.apply(params, pixels, train=train).logits, static_argnums=1)
    >>> bool(jnp.allclose(logits(final, False), logits(params, True), atol=1e-4))  # as in training, of a batch of all data
    True
    """
    at_least("passes", passes)
    tree.check(params)
    norms = _norms(model, params)
    state = _state(params)
    if not norms and not state:
        raise InputError(
            "params: no batch norm is there; a leaf .../variance that the axes call measured, or "
            "the state of a foreign module, is needed"
        )
    if state and passes > 1:
        raise InputError(
            f"passes: {passes} given; a foreign module normalises by each batch, allowed: 1"
        )
    for number in range(passes if norms else 0):
        shown = progress(batches, "batch statistics")
        params = _of_norms(
            _measure(model, loss, norms, number == 0),
            params,
            norms,
            shown,
            number == 0,
            number + 1,
        )
    if state:
        params = _of_module(
            _keep(model, loss, state), params, progress(batches, "batch statistics")
        )
    return params


def of_run(
    model: Model, loss: Loss, stream: Stream, mesh: jax.sharding.Mesh | None, params: tree.Params
) -> Callable[[TrainState], TrainState]:
    """`state -> state` with the statistics of its weights (of the moving average where it has one),
    for `fit`.

    They are measured on the same rows at every step, those of the first `ROWS` of the stream (or of
    all, where it has fewer), as the loss shows them when it is held out: a pure function of the
    weights and the stream, so that a run that is resumed or replayed has the same bits. It costs
    their forward pass. Steps do not read statistics, so when they are set changes nothing else.

    Args:
      model: what is trained.
      loss: of the run.
      stream: what it trains on.
      mesh: where.
      params: its parameters, or their shapes. Where nothing in them is measured, states stay as
        they are.
    """
    norms = _norms(model, params)
    state = _state(params)
    if not norms and not state:
        return lambda current: current
    size = stream.batch_size
    rows = min(ROWS, getattr(stream, "count", ROWS))
    rows = max(rows - rows % size, min(rows, size))
    placed = Placed(Once(stream, rows), mesh)
    trains = axes.trainable(model.axes)
    measure = _measure(model, loss, norms, True) if norms else None
    keep = _keep(model, loss, state) if state else None

    def settled(current: TrainState) -> TrainState:
        judged = averaged(current)
        batches = lambda: (placed.batch(i) for i in range(-(-rows // size)))
        if measure is not None:
            judged = _of_norms(measure, judged, norms, batches(), True)
        if keep is not None:
            judged = _of_module(keep, judged, batches())
        found = tree.flatten(judged)
        params = tree.map_leaves(
            lambda path, leaf: leaf if trains(tree.layer_paths(path)[0]) else found[path],
            current.params,
        )
        return dataclasses.replace(current, params=params)

    return settled


def _norms(model: Model, params: tree.Params) -> tuple[str, ...]:
    """The paths of the batch norms, as `layers.BatchNorm` names its statistics."""
    trains = axes.trainable(model.axes)
    return tuple(
        path.removesuffix("/variance")
        for path in tree.flatten(params)
        if path.endswith("/variance")
        and not path.startswith(_STATE)
        and not trains(tree.layer_paths(path)[0])
    )


def _state(params: tree.Params) -> tuple[str, ...]:
    """What of a foreign module's state may be an average."""
    leaves = tree.flatten(params).items()
    return tuple(
        path
        for path, leaf in leaves
        if path.startswith(_STATE) and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _shown(model: Model, loss: Loss | None, params: tree.Params, batch: Any) -> jax.Array:
    """Something that depends on all that the model gives of a batch."""
    if loss is not None:
        return loss(model, params, batch, None, train=False)[0]
    if isinstance(batch, Mapping) and jnp.ndim(batch.get("weights", 0)) == 1:
        batch = {**batch, "counts": batch["weights"] > 0}
    return jnp.sum(model.apply(params, batch).logits)


# ---------------------------------------------------------------------------------------- our norms


@functools.lru_cache(maxsize=16)
def _measure(
    model: Model, loss: Loss | None, norms: tuple[str, ...], own: bool
) -> Callable[[tree.Params, Any], Sums]:
    """The sums of one batch, by the path of each norm: the gradient of zeros, as `compress.observe`
    takes it.
    """

    @jax.jit
    def measure(params: tree.Params, batch: Any) -> Sums:
        leaves = tree.flatten(params)

        def shown(zeros: Sums) -> jax.Array:
            probed = {
                f"{norm}/mean": Measured(leaves[f"{norm}/mean"], zeros[norm], own=own)
                for norm in norms
            }
            return _shown(model, loss, tree.unflatten({**leaves, **probed}), batch)

        zeros = {}
        for norm in norms:
            zero = jnp.zeros(leaves[f"{norm}/mean"].shape, jnp.float32)
            zeros[norm] = {"count": zero[..., 0], "sum": zero, "square": zero}
        return jax.grad(shown)(zeros)

    return measure


def _of_norms(
    measure: Callable[..., Sums],
    params: tree.Params,
    norms: tuple[str, ...],
    batches: Iterable[Any],
    fresh: bool,
    number: int = 1,
) -> tree.Params:
    """The params with the statistics of one pass; `fresh` where those that stand there are not
    nearly right.
    """
    total = None
    for batch in batches:
        # a first mean to take the sums around: see `ops.norms.Measured`
        if total is None and fresh:
            zeroed = _zeroed(params, norms)
            params = _with(params, _float64(measure(zeroed, batch)), zeroed)
        sums = _float64(measure(params, batch))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise InputError(
            f"batches: there is none in pass {number}; a list of at least one is needed"
        )
    return _with(params, total, params)


def _zeroed(params: tree.Params, norms: Iterable[str]) -> tree.Params:
    """With means of zero, so that what is found does not depend, in its last bits, on what was
    found before.
    """
    means = {f"{norm}/mean" for norm in norms}
    return tree.map_leaves(
        lambda path, leaf: jnp.zeros_like(leaf) if path in means else leaf, params
    )


def _with(
    params: tree.Params, sums: Mapping[str, Mapping[str, Any]], around: tree.Params
) -> tree.Params:
    leaves = tree.flatten(params)
    shifts = tree.flatten(around)
    for norm, one in sums.items():
        if not np.all(one["count"] > 0):
            raise InputError(f"params: the norm {norm!r} was never reached; is it used?")
        count = one["count"][..., None]
        shift = one["sum"] / count
        old = np.asarray(whole(jnp.asarray(shifts[f"{norm}/mean"])), np.float64)
        spread = np.maximum(one["square"] / count - shift**2, 0)
        leaves |= _put(leaves, {f"{norm}/mean": old + shift, f"{norm}/variance": spread})
    return tree.unflatten(leaves)


# ------------------------------------------------------------------------------- of foreign modules


@functools.lru_cache(maxsize=16)
def _keep(
    model: Model, loss: Loss | None, state: tuple[str, ...]
) -> Callable[[tree.Params, Any], Sums]:
    """What the module keeps after a batch in training, times its rows."""

    @jax.jit
    def keep(params: tree.Params, batch: Any) -> Sums:
        leaves = tree.flatten(params)

        def shown(zeros: Sums) -> jax.Array:
            probed = {path: Measured(leaves[path], zeros[path]) for path in state}
            return _shown(model, loss, tree.unflatten({**leaves, **probed}), batch)

        like = lambda path: {
            "count": jnp.zeros(()),
            "kept": jnp.zeros(leaves[path].shape, jnp.float32),
        }
        return jax.grad(shown)({path: like(path) for path in state})

    return keep


def _of_module(
    keep: Callable[..., Sums], params: tree.Params, batches: Iterable[Any]
) -> tree.Params:
    """The params with each running average as what it comes to."""
    total: dict[str, Any] = {}
    factors: dict[str, float] = {}
    rows = 0.0
    start = params
    for batch in map(_counting, batches):

        def kept(params: tree.Params, batch: Any = batch) -> dict[str, Any]:
            found = _float64(keep(params, batch)).items()
            return {path: one["kept"] / np.maximum(one["count"], 1) for path, one in found}

        if not rows:
            factors = _momenta(kept, params)
            start = _filled(params, factors, 0.0)
        after = kept(start)
        size = float(len(jax.tree.leaves(batch)[0]))
        values = {path: after[path] / (1 - m) for path, m in factors.items()}
        rows += size
        for path, value in values.items():
            # a variance is summed as a second moment
            about = values.get(_mean_of(path), np.float64(0)) ** 2
            total[path] = total.get(path, 0.0) + size * (value + about)
    if not rows:
        raise InputError("batches: there is none in pass 1; a list of at least one is needed")
    found = {path: one / rows for path, one in total.items()}
    for path in [path for path in found if _mean_of(path) in found]:
        found[path] = np.maximum(found[path] - found[_mean_of(path)] ** 2, 0)
    leaves = tree.flatten(params)
    return tree.unflatten({**leaves, **_put(leaves, found)})


def _momenta(
    kept: Callable[[tree.Params], dict[str, Any]], params: tree.Params
) -> dict[str, float]:
    """m of each running average: what it keeps of an old value, the same in all of its elements."""
    paths = _state(params)
    before = kept(params)
    after = kept(_moved(params, paths))
    slopes = {path: after[path] - before[path] for path in paths}
    even = lambda slope: (
        bool(slope.size)
        and np.isfinite(slope).all()
        and 0 < np.min(slope) <= np.max(slope) < 1 - 1e-6
    )
    sure = {
        path: 0.0
        for path, slope in slopes.items()
        if even(slope) and np.ptp(slope) < 1e-3 * (1 + np.abs(before[path]).max())
    }
    # exact, whatever stood there
    low, high = (
        kept(_filled(params, sure, 0.0)),
        kept(_filled(params, sure, 1.0)),
    )
    return {path: float(np.median(high[path] - low[path])) for path in sure}


def _moved(params: tree.Params, paths: Iterable[str]) -> tree.Params:
    chosen = set(paths)
    return tree.map_leaves(
        lambda path, leaf: leaf + jnp.ones((), leaf.dtype) if path in chosen else leaf, params
    )


def _filled(params: tree.Params, paths: Iterable[str], value: float) -> tree.Params:
    chosen = set(paths)
    return tree.map_leaves(
        lambda path, leaf: jnp.full_like(leaf, value) if path in chosen else leaf, params
    )


def _mean_of(path: str) -> str:
    """The mean beside a variance:

    `.../running_mean` of `.../running_var`; of other leaves nothing.
    """
    parent, _, name = path.rpartition("/")
    return f"{parent}/{re.sub('variance|var', 'mean', name)}" if "var" in name else ""


def _counting(batch: Any) -> Any:
    """Without the rows of weight 0: the norms of a foreign module would count them."""
    weights = batch.get("weights") if isinstance(batch, Mapping) else None
    if (
        weights is None
        or np.ndim(weights) != 1
        or (isinstance(weights, jax.Array) and not weights.is_fully_addressable)
    ):
        return batch
    counts = np.asarray(weights) > 0
    return batch if counts.all() else {name: np.asarray(a)[counts] for name, a in batch.items()}


# ---------------------------------------------------------------------------------- what they share


def _float64(sums: Sums) -> Mapping[str, Mapping[str, Any]]:
    """On the host, where sums over many batches lose nothing."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), whole(sums))


def _put(leaves: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the dtypes and places of these leaves."""
    return {
        path: jax.device_put(
            np.asarray(value).astype(leaves[path].dtype), getattr(leaves[path], "sharding", None)
        )
        for path, value in values.items()
    }
