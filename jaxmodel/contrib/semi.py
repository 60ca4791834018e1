"""Semi-supervised learning: losses for `fit` over batches of `data.WithUnlabelled`.

The unlabelled rows are the fields `unlabelled_NAME` `[B, each, ...]` of the batch, where NAME is an
input of the model. The loss is

    sum_i w_i (each(z_i, t_i) + weight ramp(step) mean_j u_ij) / sum_i w_i

where u_ij is the loss of the j-th unlabelled row that belongs to row i. So, like other losses, it
is a mean over the labelled rows, and micro-batches add up to the whole batch. In training the views
are made here, from the step's key. Labelled rows and the student's views pass through the model as
one batch, so that batch norm sees both. In evaluation only the labelled rows count.

>>> from jaxmodel.data import augment
>>> strong = augment.parse("random_crop(2) | rand_augment(2, 9) | cutout(14)")
>>> loss = fixmatch(augment.RandomCrop(2), strong)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodel import tree
from jaxmodel.data.augment.base import Augment
from jaxmodel.data.paired import UNLABELLED
from jaxmodel.errors import FROM_ZERO, SHARE, InputError, at_least, within
from jaxmodel.losses import Loss, softmax_cross_entropy, supervised
from jaxmodel.losses.contract import counting, row_weights, weighted_mean
from jaxmodel.losses.factory import PerExampleLoss
from jaxmodel.losses.labels import distribution
from jaxmodel.models import Model
from jaxmodel.rng import fold
from jaxmodel.train.state import TrainState, averaged

type Ramp = Callable[[Array], Array]
"""`ramp(step) -> factor` of the unlabelled rows.

For example `functools.partial(linear_ramp, begin=100, end=600)`.
"""
type _Inputs = dict[str, Array]


# --------------------------------------------------------------------------------------- the losses


def fixmatch(
    weak: Augment | None,
    strong: Augment | None,
    *,
    threshold: float = 0.95,
    weight: float = 1.0,
    ramp: Ramp | None = None,
    align: bool = False,
    each: PerExampleLoss = softmax_cross_entropy,
) -> Loss:
    """Make the FixMatch loss, which labels a strong view by a confident prediction on a weak view.

    `u = 1[max q >= threshold] each(z_strong, argmax q)` with `q = softmax(z_weak)`, without
    gradient and without dropout (Sohn et al., 2020). Labelled rows get the weak augmentation.

    Args:
      weak: `augment(key, batch)`, such as flips and crops; None for the rows as they are.
      strong: the strong augmentation, such as RandAugment with cutout.
      threshold: the smallest probability that counts as confident, 0 to 1.
      weight: the weight of the unlabelled rows.
      ramp: see `Ramp`.
      align: divide q by its mean over the batch and normalise it again. If all classes are equally
        frequent, this keeps one class from taking the rows of another (Berthelot et al., 2020, who
        align to a running mean). The loss of a row then depends on the others, so small
        micro-batches change it.
      each: the loss of one row, labelled or not; see `supervised`.

    Returns:
      The loss. Its metrics are `weight`, `accuracy` (of the labelled rows), `unlabelled_loss` (u,
      before its weight) and `confident` (the share of unlabelled rows that reach the threshold).

    Raises:
      InputError: a threshold outside of 0 to 1, or a negative weight.
    """
    return _semi(_own_labels(weak, strong, threshold, each, align), weak, each, weight, ramp)


def pseudo_label(
    augment: Augment | None = None,
    *,
    threshold: float = 0.0,
    weight: float = 3.0,
    ramp: Ramp | None = None,
    each: PerExampleLoss = softmax_cross_entropy,
) -> Loss:
    """Make a loss that takes the model's prediction for a row as its label (Lee, 2013).

    Unlike in `fixmatch`, predictions are for the rows without augmentation, and by default every
    row counts. The weight should rise during training:
    `ramp=functools.partial(linear_ramp, begin=100, end=600)`.

    Args:
      augment: the augmentation of the rows that the model learns from, labelled or not; None for
        dropout alone.
      threshold: the smallest probability that counts, 0 to 1; 0 for every row.
      weight: the weight of the unlabelled rows after the ramp.
      ramp: see `Ramp`.
      each: see `fixmatch`.
    """
    return _semi(_own_labels(None, augment, threshold, each, False), augment, each, weight, ramp)


def mean_teacher(
    noise: Augment | None = None,
    *,
    weight: float = 100.0,
    ramp: Ramp | None = None,
    each: PerExampleLoss = softmax_cross_entropy,
) -> Loss:
    """Make the mean teacher loss, by which a student agrees with the moving average of itself.

    `u = mean_c (softmax(z)_c - softmax(z')_c)^2`, where z is the student's output and z' the
    teacher's, each for a view of its own (Tarvainen & Valpola, 2017). The teacher is
    `state.extra["average"]`: train with `TrainConfig(ema_decay=0.99)`, which also evaluates it.

    Args:
      noise: `augment(key, batch)` for labelled and unlabelled rows; None for dropout alone, which
        the teacher does not have.
      weight: the weight of the unlabelled rows after the ramp.
      ramp: see `Ramp`; the authors use `functools.partial(sigmoid_ramp, steps=...)`.
      each: the loss of one labelled row.

    Returns:
      The loss. Its metrics are `weight`, `accuracy`, `unlabelled_loss` and `agree`, the share of
      unlabelled rows for which both predict the same class.

    Raises:
      InputError: a negative weight; when called, a state without an average.
    """

    def term(
        model: Model, params: tree.Params, rows: _Inputs, key: Array, state: TrainState | None
    ) -> _Term:
        if state is None or "average" not in state.extra:
            raise InputError(
                "average: 0 given; allowed: a decay such as 0.99, because the teacher is the "
                "moving average"
            )
        taught = _said(model, averaged(state), _seen(noise, fold(key, "teacher"), rows))

        def value(z: Array) -> tuple[Array, dict[str, Array]]:
            same = (jnp.argmax(z, axis=-1) == jnp.argmax(taught, axis=-1)).astype(jnp.float32)
            far = jax.nn.softmax(z.astype(jnp.float32), axis=-1) - jax.nn.softmax(taught, axis=-1)
            return jnp.mean(far**2, axis=-1), {"agree": same}

        return _seen(noise, fold(key, "student"), rows), value

    return _semi(term, noise, each, weight, ramp)


def pseudo_labels(
    logits: Float[np.ndarray, "N C"], threshold: float = 0.95
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Select the rows with confident predictions, as labels for another round of training.

    Args:
      logits: outputs for all unlabelled rows.
      threshold: the smallest probability that counts as confident, 0 to 1.

    Returns:
      Indices of the M rows, ascending, and their labels, int32.

    >>> rows, labels = pseudo_labels(np.log(np.array([[0.97, 0.03], [0.6, 0.4], [0.01, 0.99]])))
    >>> rows.tolist(), labels.tolist()
    ([0, 2], [0, 1])
    """
    _check_threshold(threshold)
    wide = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    rows = np.flatnonzero((wide / wide.sum(axis=-1, keepdims=True)).max(axis=-1) >= threshold)
    return rows, np.argmax(logits[rows], axis=-1).astype(np.int32)


# ---------------------------------------------------------------------------------------- the ramps


def linear_ramp(step: Int[Array, ""], begin: int, end: int) -> Float[Array, ""]:
    """Return 0 up to step `begin`, 1 from step `end` on, and a line in between (Lee, 2013).

    >>> [float(linear_ramp(jnp.int32(step), 10, 20)) for step in (5, 10, 15, 30)]
    [0.0, 0.0, 0.5, 1.0]
    """
    if not 0 <= begin < end:
        raise InputError(f"begin, end: {begin}, {end} given; allowed: 0 <= begin < end")
    return jnp.clip((step.astype(jnp.float32) - begin) / (end - begin), 0, 1)


def sigmoid_ramp(step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """Return `exp(-5 (1 - min(1, step / steps))^2)` (Laine & Aila, 2017).

    >>> [round(float(sigmoid_ramp(jnp.int32(step), 10)), 4) for step in (0, 5, 10, 30)]
    [0.0067, 0.2865, 1.0, 1.0]
    """
    at_least("steps", steps)
    return jnp.exp(-5 * (1 - jnp.minimum(step.astype(jnp.float32) / steps, 1)) ** 2)


# ---------------------------------------------------------------------------------- what they share

type _Term = tuple[_Inputs, Callable[[Array], tuple[Array, dict[str, Array]]]]
"""The student's views, and a function from its logits to the loss and metrics of each view."""
type _MakeTerm = Callable[[Model, tree.Params, _Inputs, Array, TrainState | None], _Term]


def _own_labels(
    first: Augment | None,
    second: Augment | None,
    threshold: float,
    each: PerExampleLoss,
    align: bool,
) -> _MakeTerm:
    """Make a term that labels the second view by a confident prediction on the first."""
    _check_threshold(threshold)

    def term(
        model: Model, params: tree.Params, rows: _Inputs, key: Array, state: TrainState | None
    ) -> _Term:
        seen = _seen(first, fold(key, "first view"), rows)
        q = jax.nn.softmax(_said(model, jax.lax.stop_gradient(params), seen), axis=-1)
        if align:
            counts = jnp.broadcast_to(rows.get("counts", jnp.ones(len(q), bool)), len(q))
            q = q / jnp.maximum(jnp.mean(q, axis=0, keepdims=True, where=counts[:, None]), 1e-6)
            q = q / jnp.sum(q, axis=-1, keepdims=True)
        sure = (jnp.max(q, axis=-1) >= threshold).astype(jnp.float32)
        labels = jnp.argmax(q, axis=-1)
        return _seen(second, fold(key, "second view"), rows), lambda z: (
            sure * each(z, labels),
            {"confident": sure},
        )

    return term


def _semi(
    term: _MakeTerm,
    augment: Augment | None,
    each: PerExampleLoss,
    weight: float,
    ramp: Ramp | None,
) -> Loss:
    """Make the loss of the labelled rows, augmented by `augment`, and of `term` for the others."""
    within("weight", weight, FROM_ZERO)
    heldout = supervised(each)

    def loss(
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
        state: TrainState | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        if not train:
            labelled = {name: a for name, a in batch.items() if not name.startswith(UNLABELLED)}
            return heldout(model, params, labelled, rng, train=False)
        if rng is None:
            raise InputError(
                "rng: None given; allowed in training: a key, to draw views of the rows"
            )
        if ramp is not None and state is None:
            raise InputError(
                "ramp: it needs the step of the training state; allowed: in make_step and fit, "
                "which pass the state"
            )
        inputs, rows, count = _parted(batch)
        key = fold(rng, "views")
        views, value = term(model, params, rows, key, state)
        own = _seen(augment, fold(key, "labelled"), inputs)
        # a field without unlabelled rows is not an input of the model
        both = {name: jnp.concatenate([own[name], views[name]]) for name in own if name in views}
        z = model.apply(params, both, rng=rng, train=True).logits
        labelled, (values, metrics) = z[:count], value(z[count:])

        # labels of rows that only fill up the batch do not matter
        labels, weights = counting(batch["labels"], row_weights(batch, (count,)))
        t = distribution(labels, z.shape[-1])
        right = (jnp.argmax(labelled, axis=-1) == jnp.argmax(t, axis=-1)).astype(jnp.float32)
        mean = lambda values: weighted_mean(jnp.mean(values.reshape(count, -1), axis=1), weights)
        factor = jnp.float32(weight) if ramp is None or state is None else weight * ramp(state.step)
        found = {name: mean(a) for name, a in metrics.items()} | {"unlabelled_loss": mean(values)}
        total = weighted_mean(each(labelled, t), weights) + factor * found["unlabelled_loss"]
        return total, {
            "weight": jnp.sum(weights),
            "accuracy": weighted_mean(right, weights),
            **found,
        }

    return loss


def _parted(batch: Mapping[str, Array]) -> tuple[_Inputs, _Inputs, int]:
    """Split a batch into its labelled rows, its unlabelled rows as `[B * each, ...]`, and B."""
    aside = ("labels", "weights")
    rows = {
        name.removeprefix(UNLABELLED): a for name, a in batch.items() if name.startswith(UNLABELLED)
    }
    if "labels" not in batch or not rows:
        given = ", ".join(batch) or "nothing"
        raise InputError(
            f"batch: {given} given; 'labels' and '{UNLABELLED}...' are needed, see data.Paired"
        )
    inputs = {
        name: a
        for name, a in batch.items()
        if not name.startswith(UNLABELLED) and name not in aside
    }
    flat = {name: a.reshape(-1, *a.shape[2:]) for name, a in rows.items() if name not in aside}
    # an unlabelled row counts if the labelled row that it belongs to does
    if "weights" in batch:
        inputs["counts"] = batch["weights"] > 0
        flat["counts"] = jnp.repeat(
            inputs["counts"], len(next(iter(flat.values()))) // len(batch["labels"])
        )
    return inputs, flat, len(batch["labels"])


def _seen(augment: Augment | None, key: Array, rows: _Inputs) -> _Inputs:
    return rows if augment is None else augment(key, rows)


def _check_threshold(threshold: float) -> None:
    within("threshold", threshold, SHARE)


def _said(model: Model, params: tree.Params, rows: _Inputs) -> Float[Array, "N C"]:
    """Compute logits without dropout; in training, batch norm can only use the batch itself."""
    return model.apply(params, rows, rng=None, train=True).logits.astype(jnp.float32)
