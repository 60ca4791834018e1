"""Factories that turn a function of rows into a `Loss` with weights, smoothing and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.data.augment.base import field_of
from jaxmodel.errors import InputError
from jaxmodel.losses.classes import softmax_cross_entropy
from jaxmodel.losses.contract import Loss, counting, model_inputs, only, row_weights, weighted_mean
from jaxmodel.losses.labels import distribution, smooth
from jaxmodel.losses.values import squared_error
from jaxmodel.models import Model

type PerExampleLoss = Callable[[Array, Array], Array]
"""`each(logits, labels) -> values`, with one value for each row."""


def supervised(
    each: PerExampleLoss = softmax_cross_entropy,
    *,
    smoothing: float = 0.0,
    means: Float[Array, "_ _"] | None = None,
    class_weights: Float[Array | np.ndarray, " C"] | None = None,
) -> Loss:
    """Make a classification loss: `sum_i w_i each(z_i, t_i) / sum_i w_i`.

    The batch has `labels` (classes `[B]` or distributions `[B, C]`), optionally `weights` `[B]`,
    and the model's inputs. A weight of 0 marks a row that only fills up the batch; its label does
    not matter. The weight w_i of a row is its weight in the batch times
    `sum_c t_c class_weights_c`, or 0 if its label is -100. Any other label that is not a class
    makes the loss NaN, and `fit` then names it.

    Args:
      each: a function of logits and labels, one of `jaxmodel.losses` or your own; bind its settings
        with `functools.partial`.
      smoothing: the share of each label that is spread over other classes, in training only; see
        `smooth`.
      means: the distribution `[C, C]` to spread towards for each class, see
        `online_label_smoothing`; None for the uniform one.
      class_weights: the weight of each class; see `balanced_weights` and `effective_weights`.

    Returns:
      The loss. Its metrics are `weight` and `accuracy`, the weighted share of rows whose largest
      logit is that of the label (of a distribution: its most likely class).

    >>> import jax
    >>> from jaxmodel.models import mlp
    >>> model = mlp.model(mlp.Config(2, (3,), 4))
    >>> batch = {"features": jnp.ones((3, 2)), "labels": jnp.array([0, 1, 3])}
    >>> loss = supervised(smoothing=0.1, class_weights=np.array([1.0, 1.0, 1.0, 0.5]))
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> value, metrics = jax.jit(lambda batch: loss(model, params, batch))(batch)
    >>> float(metrics["weight"]), bool(value > 0)
    (2.5, True)
    """

    def loss(
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        logits = _outputs(model, params, batch, rng, train, "labels")
        labels, weights = counting(batch["labels"], row_weights(batch, logits.shape[:-1]))
        t = distribution(labels, logits.shape[-1])
        if class_weights is not None:
            weights = weights * _of_classes(t, class_weights)
        right = jnp.argmax(logits, axis=-1) == jnp.argmax(t, axis=-1)
        metrics = {
            "weight": jnp.sum(weights),
            "accuracy": weighted_mean(right.astype(jnp.float32), weights),
        }
        values = each(logits, smooth(t, smoothing, means) if smoothing and train else t)
        return weighted_mean(values, weights), metrics

    return loss


def classification(
    model: Model,
    params: tree.Params,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    *,
    train: bool = True,
    smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Compute the mean cross entropy over the rows, in nats: `supervised()`.

    Args:
      model: a model with logits `[B, C]`.
      params: its parameters.
      batch: `labels` `[B]` or `[B, C]`, optionally `weights` `[B]`, and the model's inputs. See
        `supervised` for labels that are not classes.
      rng: for dropout.
      train: False for evaluation, without smoothing.
      smoothing: the share of each label that is spread over all classes (Szegedy et al., 2015).

    Returns:
      The loss, and the metrics `weight`, the number of rows, and `accuracy`, the share of rows
      whose largest logit is that of the label.
    """
    return supervised(smoothing=smoothing)(model, params, batch, rng, train=train)


def regression(each: PerExampleLoss = squared_error, *, target: str = "targets") -> Loss:
    """Make a regression loss: the weighted mean over rows of `each(outputs, batch[target])`.

    The weights are the batch's `weights` `[B]`, or ones.

    Args:
      each: a function of outputs and targets, one of `jaxmodel.losses` or your own; bind its
        settings with `functools.partial`.
      target: the field of the batch that the outputs are compared with.
        `regression(partial(kl_divergence, temperature=2.0), target="teacher")` is distillation from
        a batch that holds the teacher's logits.

    Returns:
      The loss. Its only metric is `weight`, the number of rows.

    >>> import jax
    >>> from jaxmodel.models import mlp
    >>> model = mlp.model(mlp.Config(2, (3,), 4))
    >>> batch = {"features": jnp.zeros((3, 2)), "targets": jnp.full((3, 4), 2.0)}
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> value, _ = jax.jit(lambda batch: regression()(model, params, batch))(batch)
    >>> float(value)  # the biases are 0 at the start
    4.0
    """

    def loss(
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        outputs = _outputs(model, params, batch, rng, train, target)
        targets = batch[target]
        if "weights" in batch:
            targets = only(targets, batch["weights"])  # an unknown target may be NaN
        values = each(outputs, targets)
        weights = row_weights(batch, values.shape)
        return weighted_mean(values, weights), {"weight": jnp.sum(weights)}

    return loss


def _outputs(
    model: Model,
    params: tree.Params,
    batch: Mapping[str, Array],
    rng: Array | None,
    train: bool,
    target: str,
) -> Array:
    field_of(batch, target)
    return model.apply(params, model_inputs(batch, target), rng=rng, train=train).logits


def _of_classes(t: Float[Array, "... C"], class_weights: Any) -> Float[Array, "..."]:
    if np.shape(class_weights) != t.shape[-1:]:
        raise InputError(
            f"class_weights: the shape {list(np.shape(class_weights))} given; allowed: "
            f"{list(t.shape[-1:])}"
        )
    return jnp.einsum(
        "...c,c->...", t, jnp.asarray(class_weights, jnp.float32), precision="highest"
    )
