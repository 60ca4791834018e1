"""Losses: `loss(model, params, batch, rng, *, train=True) -> (mean, metrics)`.

A loss is a weighted mean over rows or tokens. `metrics["weight"]`, which is always there, is the
sum of the weights: the number of tokens for `next_token`, of rows for `classification`, or a sum of
class weights where those are used. Every other metric is a mean over the same weights. So the loss
and the metrics of a batch are the means over its parts, weighted by `weight`, and a step may take a
batch in parts and combine them. (This holds only approximately where rows interact: negatives of a
contrastive loss, the load balance of experts.)

With `train=False` a loss is computed as for evaluation: without dropout, label smoothing, load
balance or penalty.

Settings are keyword arguments, bound by `functools.partial`, or arguments of a factory that returns
a loss. A new classification loss needs only one function of logits and labels, which returns a
value for each row:

>>> import functools
>>> robust = supervised(functools.partial(generalized_cross_entropy, q=0.7), smoothing=0.1)
>>> distilled = regression(functools.partial(kl_divergence, temperature=2.0), target="teacher")
"""

from jaxmodel import moved
from jaxmodel.losses.chosen import default_loss
from jaxmodel.losses.classes import (
    focal,
    generalized_cross_entropy,
    kl_divergence,
    softmax_cross_entropy,
    symmetric_cross_entropy,
)
from jaxmodel.losses.contract import Loss, row_weights, weighted_mean
from jaxmodel.losses.factory import classification, regression, supervised
from jaxmodel.losses.labels import balanced_weights, effective_weights, smooth
from jaxmodel.losses.penalties import regularized
from jaxmodel.losses.reconstruction import autoencoder
from jaxmodel.losses.tokens import cross_entropy, next_token
from jaxmodel.losses.values import absolute_error, huber, squared_error
from jaxmodel.losses.views import contrastive, nt_xent

__all__ = [
    "Loss",
    "absolute_error",
    "autoencoder",
    "balanced_weights",
    "classification",
    "contrastive",
    "cross_entropy",
    "default_loss",
    "effective_weights",
    "focal",
    "generalized_cross_entropy",
    "huber",
    "kl_divergence",
    "next_token",
    "nt_xent",
    "regression",
    "regularized",
    "row_weights",
    "smooth",
    "softmax_cross_entropy",
    "squared_error",
    "supervised",
    "symmetric_cross_entropy",
    "weighted_mean",
]

moved.attach(__name__)
