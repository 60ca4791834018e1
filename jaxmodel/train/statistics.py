"""`recalibrate_batch_norm`: the statistics of batch norms for inference, measured on data."""

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
from jaxmodel.ops.norms import BatchStatsProbe
from jaxmodel.progress import progress
from jaxmodel.train.evaluation import Once
from jaxmodel.train.placing import ShardedLoader, whole
from jaxmodel.train.state import TrainState, averaged

type Batches = Iterable[Inputs | np.ndarray | Mapping[str, np.ndarray]]
type Sums = dict[
    str, dict[str, Any]
]  # path of a mean -> count, sum, square; path of a module's state -> count, kept

ROWS = 1024
"""The number of rows that `fit` measures statistics on."""
_STATE = "state/"  # the state of a foreign module is there


def recalibrate_batch_norm(
    model: Model,
    params: tree.Params,
    batches: Batches,
    *,
    passes: int = 1,
    loss: Loss | None = None,
) -> tree.Params:
    """Set the mean and variance of every batch norm to those of its input over all the data.

    They are the statistics of all rows together, however these are batched: not an average that
    moves while the weights do, and not a state of the model (Wu & Johnson, 2021). Rows with
    `weights` 0 do not count. Dropout is off. What reaches a norm depends on how the norms before it
    normalise: in the first pass by each batch itself, as in training; in every further pass by the
    statistics found so far. So one batch of all the data is exact at once; with smaller batches
    each pass makes one more norm exact, beginning with the first.

    A foreign module (`models.from_linen`, `models.from_nnx`) is run as in training, with dropout.
    Every running average in its state, `new = m old + (1 - m) batch`, is set to its limit: the mean
    over the batches, or for a variance that of all rows together. Which leaves are averages, and
    their m, is found by running the module, so no kind of module needs to be known. Other state
    stays.

    Args:
      model: a model with batch norms (leaves `X/mean` and `X/variance` that its axes declare as
        statistics), or a foreign module with state.
      params: its parameters.
      batches: inputs of `model.apply`, of one shape if possible (each shape compiles once); a list
        if there are several passes. Labels among them are not read, so a training stream serves:
        `(stream.batch(i) for i in range(20))`.
      passes: the number of passes over the batches; 1 for a foreign module.
      loss: a loss that runs the model on the batches, with `train=False`; None for `model.apply`.

    Returns:
      The tree with new `mean` and `variance` leaves, with the same shardings.

    Raises:
      InputError: there is no batch norm in the tree, there are no batches (or an iterator is empty
        in the second pass), a norm is not used, or several passes are asked of a foreign module.

    >>> from jaxmodel.models import resnet
    >>> model = resnet.model(resnet.Config((1,), 2, classes=2, size=4, small=True))
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> pixels = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    >>> final = recalibrate_batch_norm(model, params, [pixels])
    >>> run = lambda params, train: model.apply(params, pixels, train=train).logits
    >>> logits = jax.jit(run, static_argnums=1)
    >>> # one batch of all data: the same as in training
    >>> bool(jnp.allclose(logits(final, False), logits(params, True), atol=1e-4))
    True
    """
    at_least("passes", passes)
    tree.check(params)
    norms = _norms(model, params)
    state = _state(params)
    if not norms and not state:
        raise InputError(
            "params: there is no batch norm; allowed: a leaf .../variance that the axes declare "
            "measured, or the state of a foreign module"
        )
    if state and passes > 1:
        raise InputError(
            f"passes: {passes} given; allowed: 1, because a foreign module normalises by each batch"
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
    """Return `state -> state` that sets the statistics of the state's weights, for `fit`.

    The weights are those of the moving average if the state has one. The statistics are measured on
    the same rows at every step, the first `ROWS` of the stream (or all, if it has fewer), with the
    loss as in evaluation: a pure function of weights and stream, so a run that is resumed or
    replayed has the same bits. It costs a forward pass. Steps do not read statistics, so setting
    them changes nothing else.

    Args:
      model: the model.
      loss: the loss of the run.
      stream: the training data.
      mesh: the mesh of the run.
      params: the parameters, or their shapes. If they have no statistics, states are not changed.
    """
    norms = _norms(model, params)
    state = _state(params)
    if not norms and not state:
        return lambda current: current
    size = stream.batch_size
    rows = min(ROWS, getattr(stream, "count", ROWS))
    rows = max(rows - rows % size, min(rows, size))
    placed = ShardedLoader(Once(stream, rows), mesh)
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
    """Return the paths of the batch norms, as `layers.BatchNorm` names its statistics."""
    trains = axes.trainable(model.axes)
    return tuple(
        path.removesuffix("/variance")
        for path in tree.flatten(params)
        if path.endswith("/variance")
        and not path.startswith(_STATE)
        and not trains(tree.layer_paths(path)[0])
    )


def _state(params: tree.Params) -> tuple[str, ...]:
    """Return the paths of a foreign module's state that may be averages."""
    leaves = tree.flatten(params).items()
    return tuple(
        path
        for path, leaf in leaves
        if path.startswith(_STATE) and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _shown(model: Model, loss: Loss | None, params: tree.Params, batch: Any) -> jax.Array:
    """Return a value that depends on all outputs of the model for a batch."""
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
    """Return a function for the sums of one batch, by the path of each norm.

    They are the gradient of zeros, as in `compress.observe`.
    """

    @jax.jit
    def measure(params: tree.Params, batch: Any) -> Sums:
        leaves = tree.flatten(params)

        def shown(zeros: Sums) -> jax.Array:
            probed = {
                f"{norm}/mean": BatchStatsProbe(leaves[f"{norm}/mean"], zeros[norm], own=own)
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
    """Return the params with the statistics of one pass.

    `fresh` says that the present statistics are not nearly right.
    """
    total = None
    for batch in batches:
        # a first mean, around which the sums are taken; see `ops.norms.BatchStatsProbe`
        if total is None and fresh:
            # no bit of the result depends on the old statistics
            zeroed = _changed(params, (f"{norm}/mean" for norm in norms), jnp.zeros_like)
            params = _with(params, _float64(measure(zeroed, batch)), zeroed)
        sums = _float64(measure(params, batch))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise InputError(f"batches: none in pass {number}; allowed: a list of at least one")
    return _with(params, total, params)


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
    """Return a function for the module's state after a batch in training, times its rows."""

    @jax.jit
    def keep(params: tree.Params, batch: Any) -> Sums:
        leaves = tree.flatten(params)

        def shown(zeros: Sums) -> jax.Array:
            probed = {path: BatchStatsProbe(leaves[path], zeros[path]) for path in state}
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
    """Return the params with each running average set to its limit."""
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
            start = _changed(params, factors, jnp.zeros_like)
        after = kept(start)
        size = float(len(jax.tree.leaves(batch)[0]))
        values = {path: after[path] / (1 - m) for path, m in factors.items()}
        rows += size
        for path, value in values.items():
            # a variance is summed as a second moment
            about = values.get(_mean_of(path), np.float64(0)) ** 2
            total[path] = total.get(path, 0.0) + size * (value + about)
    if not rows:
        raise InputError("batches: none in pass 1; allowed: a list of at least one")
    found = {path: one / rows for path, one in total.items()}
    for path in [path for path in found if _mean_of(path) in found]:
        found[path] = np.maximum(found[path] - found[_mean_of(path)] ** 2, 0)
    leaves = tree.flatten(params)
    return tree.unflatten({**leaves, **_put(leaves, found)})


def _momenta(
    kept: Callable[[tree.Params], dict[str, Any]], params: tree.Params
) -> dict[str, float]:
    """Return m of each running average: the share of the old value that it keeps everywhere."""
    paths = _state(params)
    before = kept(params)
    after = kept(_changed(params, paths, lambda leaf: leaf + jnp.ones((), leaf.dtype)))
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
    # exact, whatever the old values were
    low = kept(_changed(params, sure, jnp.zeros_like))
    high = kept(_changed(params, sure, jnp.ones_like))
    return {path: float(np.median(high[path] - low[path])) for path in sure}


def _changed(
    params: tree.Params, paths: Iterable[str], change: Callable[[jax.Array], jax.Array]
) -> tree.Params:
    chosen = set(paths)
    return tree.map_leaves(lambda path, leaf: change(leaf) if path in chosen else leaf, params)


def _mean_of(path: str) -> str:
    """Return the path of the mean that belongs to a variance.

    `.../running_mean` belongs to `.../running_var`; for other leaves it is empty.
    """
    parent, _, name = path.rpartition("/")
    return f"{parent}/{re.sub('variance|var', 'mean', name)}" if "var" in name else ""


def _counting(batch: Any) -> Any:
    """Leave out the rows of weight 0, which the norms of a foreign module would count."""
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
    """Move sums to the host as float64, where sums over many batches lose nothing."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), whole(sums))


def _put(leaves: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the dtypes and shardings of these leaves."""
    return {
        path: jax.device_put(
            np.asarray(value).astype(leaves[path].dtype), getattr(leaves[path], "sharding", None)
        )
        for path, value in values.items()
    }
