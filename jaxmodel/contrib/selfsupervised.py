"""Learning from data alone: a task made of the batch (Noroozi & Favaro, 2016, call it the pretext),
and a loss that judges it.

A task is `task(key, batch) -> batch`, as an augmentation is, and `pretext` makes a loss of both,
for `fit` as any other:

    masked tokens of an encoder        pretext(next_token, augment.SpanMasking(...))      (Devlin et al., 2019)
    spans of an encoder with decoder   pretext(next_token, augment.SpanCorruption(...))   (Raffel et al., 2020)
    a disturbed order, to be put back  pretext(next_token, restored(LocalShuffle(), "tokens"))
    noise, to be taken away            pretext(regression(), restored(augment.Noise(0.3)))
    hidden patches of an image         pretext(regression(patch_error), masked_patches(...)) (Xie et al., 2022)
    two views of a row are alike       pretext(contrastive(), two_views(...))             (SimCLR: Chen et al., 2020)

Patches and views need another head than classes do: `with_projection` puts any model of rows, such
as an `mlp`, on the body of another. What was learnt is then `without_projection(params)`, and
`replace_head` gives it classes.

>>> from jaxmodel.data import augment
>>> from jaxmodel.models import lenet, mlp
>>> from jaxmodel.losses import contrastive
>>> body, views = lenet.model(lenet.SIZES["tiny"]), augment.parse("random_resized_crop() | noise(0.1)")
>>> model = with_projection(body, mlp.model(mlp.Config(64, (32,), 16)))
>>> params, batch = jax.jit(model.init)(jax.random.key(0)), {"pixels": jnp.ones((4, 16, 16, 1))}
>>> loss = pretext(contrastive(), two_views(views))
>>> bool(jax.jit(lambda key: loss(model, params, batch, key)[0])(jax.random.key(1)) > 0)
True
>>> sorted(without_projection(params)) == sorted(name for name in body.init(jax.random.key(0)) if not name.startswith("head"))
True
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.adapt.finetune import HEAD
from jaxmodel.axes import Axes
from jaxmodel.data.augment.base import images, row_keys, row_weights, uniforms
from jaxmodel.errors import InputError, at_least
from jaxmodel.losses import Loss
from jaxmodel.models import Model, Parts

type Augment = Callable[[Any, Mapping[str, Any]], dict[str, Any]]

PROJECTION = "projection"
"""Where the leaves of the head stand that `with_projection` adds."""
_TASK = 2**32 - 8  # what a task folds into the step's key; see `models.model` for the other numbers


def pretext(loss: Loss, task: Augment, *, seed: int = 0) -> Loss:
    """A loss of what a task makes of the batch; a held-out loss always has the same task.

    Args:
      loss: of the batch that the task makes.
      task: `task(key, batch) -> batch`, drawn in training from the step's key. What `fit` has as
        `augment` comes in front of it.
      seed: of the task where the loss is held out, or has no key.
    """

    def made(
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        key = jax.random.key(seed) if rng is None or not train else jax.random.fold_in(rng, _TASK)
        return loss(model, params, task(key, batch), rng, train=train)

    return made


# ---------------------------------------------------------------------------------------- the tasks


def two_views(augment: Augment, name: str = "pixels") -> Augment:
    """Each row twice, each time augmented for itself: `views` `[B, 2, ...]`, as `contrastive` reads
    them.

    Args:
      augment: of both views; SimCLR's has crops, colours and blur.
      name: the field that views are of.

    >>> from jaxmodel.data.augment import Noise
    >>> two_views(Noise(0.1))(jax.random.key(0), {"pixels": jnp.zeros((3, 4, 4, 1))})["views"].shape
    (3, 2, 4, 4, 1)
    """

    def task(key: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        views = [
            augment(jax.random.fold_in(key, i), {name: _field(batch, name)})[name] for i in range(2)
        ]
        return {**batch, "views": jnp.stack(views, axis=1)}

    return task


def restored(corrupt: Augment, name: str = "pixels", *, flat: bool = False) -> Augment:
    """To undo a corruption: `targets` is what the field was, the field what has become of it
    (Vincent et al., 2008).

    Args:
      corrupt: `corrupt(key, batch)`, such as noise, a missing square, another order.
      name: the field.
      flat: whether the model reads rows of numbers, `features` `[B, N]`, and gives such; then the
        targets are such too.

    >>> from jaxmodel.data.augment import Cutout
    >>> made = restored(Cutout(3), flat=True)(jax.random.key(0), {"pixels": jnp.ones((2, 4, 4, 1))})
    >>> made["features"].shape, float(made["targets"].min()), float(made["features"].min())
    ((2, 16), 1.0, 0.0)
    """

    def task(key: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        clean = _field(batch, name)
        made = corrupt(key, batch)
        if not flat:
            return {**made, "targets": clean}
        rest = {other: a for other, a in made.items() if other != name}
        return {
            **rest,
            "features": made[name].reshape(len(clean), -1),
            "targets": clean.reshape(len(clean), -1),
        }

    return task


def masked_patches(patch: int, rate: float = 0.6) -> Augment:
    """A share of an image's patches is hidden (zero), and to be told from the others: masked image
    modelling (Xie et al., 2022).

    Adds `targets` `[B, T, patch * patch * C]`, what the patches were, and `weights` `[B, T]`, 1 (or
    the row's) where one is hidden: so `regression(patch_error)` is of these alone. Of each image
    `round(rate T)` patches are hidden, all choices being as likely.

    Args:
      patch: their side in pixels, which divides the image's.
      rate: share of the patches, above 0 and below 1.

    Raises:
      InputError: a rate out of range; when called, images that the patches do not divide.

    >>> made = masked_patches(2, 0.5)(jax.random.key(0), {"pixels": jnp.ones((3, 4, 4, 1))})
    >>> made["targets"].shape, made["weights"].sum(axis=1).tolist(), float(made["pixels"].mean())
    ((3, 4, 4), [2.0, 2.0, 2.0], 0.5)
    """
    at_least("patch", patch)
    if not 0 < rate < 1:
        raise InputError(f"rate: {rate} given; allowed: above 0 and below 1")

    def task(key: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        pixels = images(batch)
        rows, height, width, channels = pixels.shape
        if height % patch or width % patch:
            raise InputError(
                f"patch: {patch} given; allowed: a divisor of the image's {height} x {width} pixels"
            )
        down = height // patch
        across = width // patch
        drawn = uniforms(row_keys(key, rows), down * across)
        rank = jnp.argsort(jnp.argsort(drawn, axis=1), axis=1)
        hidden = rank < max(1, min(down * across - 1, round(rate * down * across)))
        cut = pixels.reshape(rows, down, patch, across, patch, channels)
        shown = jnp.where(
            hidden.reshape(rows, down, 1, across, 1, 1), jnp.zeros((), pixels.dtype), cut
        )
        targets = cut.transpose(0, 1, 3, 2, 4, 5).reshape(rows, down * across, -1)
        weights = hidden.astype(jnp.float32) * row_weights(batch, rows)[:, None]
        return {
            **batch,
            "pixels": shown.reshape(pixels.shape),
            "targets": targets,
            "weights": weights,
        }

    return task


def patch_error(
    outputs: Float[Array, "B T P"], targets: Float[Array, "B T P"]
) -> Float[Array, "B T"]:
    """The mean of `(x - y)^2` over a patch, for `regression`.

    >>> patch_error(jnp.zeros((1, 2, 3)), jnp.full((1, 2, 3), 2.0)).tolist()
    [[4.0, 4.0]]
    """
    return jnp.mean((outputs.astype(jnp.float32) - targets.astype(jnp.float32)) ** 2, axis=-1)


def _field(batch: Mapping[str, Any], name: str) -> Array:
    if name not in batch:
        raise InputError(
            f"batch: {', '.join(sorted(batch)) or 'nothing'} given; {name!r} is needed"
        )
    return jnp.asarray(batch[name])


# ----------------------------------------------------------------------------------------- the head


def with_projection(model: Model, head: Model, *, tokens: int = 0) -> Model:
    """The body of a model with another model as its head, whose leaves stand under `projection`.

    The head reads what the model's own would: `[B, D]`, or the mean over what lies between (places
    of an image, tokens). Of a classifier's head nothing is left.

    Args:
      model: the body.
      head: of one input, rows of D numbers, such as an `mlp`; its outputs are the logits.
      tokens: the head reads each of the last `tokens` positions of `[B, T, D]` by itself, where a
        `vit` has its patches; 0 for the mean.

    Returns:
      A model. Equal arguments give the same one.

    Raises:
      InputError: a head of several inputs; when called, one for rows of another width.
    """
    if len(head.inputs(1, 1)) != 1:
        raise InputError(
            f"head: it reads {', '.join(head.inputs(1, 1))}; needed is a model of one input, such "
            f"as an mlp"
        )
    at_least("tokens", tokens, 0)
    return _projected(model, head, tokens)


def without_projection(params: tree.Params) -> tree.Params:
    """The leaves of the body: what `with_projection` added is left out."""
    tree.check(params)
    return {name: node for name, node in params.items() if name != PROJECTION}


@functools.lru_cache(maxsize=64)
def _projected(model: Model, head: Model, tokens: int) -> Model:
    ((name, reads),) = head.inputs(1, 1).items()
    width = math.prod(reads.shape[1:])

    def top(params: tree.Params, x: Array, rng: Any = None, train: bool = False) -> Array:
        if x.shape[-1] != width:
            raise InputError(
                f"head: it reads {width} numbers; needed are the {x.shape[-1]} of what the "
                f"model's own head reads"
            )
        if tokens and (x.ndim != 3 or x.shape[1] < tokens):
            raise InputError(f"tokens: {tokens} given; the model's body gives {list(x.shape)}")
        between = tuple(range(1, x.ndim - 1))
        rows = (
            x[:, -tokens:].reshape(-1, width)
            if tokens
            else jnp.mean(x.astype(jnp.float32), axis=between)
        )
        out = head.apply(params[PROJECTION], {name: rows}, rng=rng, train=train).logits
        return out.reshape(x.shape[0], tokens, -1) if tokens else out

    def init(key: Array) -> tree.Params:
        own, other = jax.random.split(key)
        body = {
            path: leaf
            for path, leaf in tree.flatten(model.init(own)).items()
            if not HEAD.fullmatch(path)
        }
        return {**tree.unflatten(body), PROJECTION: head.init(other)}

    of_head = head.axes.under(PROJECTION, model.axes.highest + 1)
    own = model.axes
    rules = tuple(
        (tree.optional(pattern), *rest) for pattern, *rest in (*of_head.rules, *own.rules)
    )
    axes = Axes(rules, (*own.sizes, *of_head.sizes), own.shared, (*own.ordered, *of_head.ordered))  # pyright: ignore
    again = lambda policy: _projected(model.with_policy(policy), head.with_policy(policy), tokens)
    parts = Parts(model.parts.embed, model.parts.block, top)
    return Model(
        model.config, model.policy, init, parts, model.inputs, None, axes, with_policy=again
    )
