"""Self-supervised learning: a pretext task made from the batch, and a loss for it.

The term is from Noroozi & Favaro, 2016. A task is `task(key, batch) -> batch`, like an
augmentation. `pretext` combines it with a loss into one that `fit` takes:

    masked tokens of an encoder       pretext(next_token, augment.SpanMasking(...))
    spans, encoder with decoder       pretext(next_token, augment.SpanCorruption(...))
    restoring a shuffled order        pretext(next_token, restored(LocalShuffle(), "tokens"))
    denoising                         pretext(regression(), restored(augment.Noise(0.3)))
    masked patches of an image        pretext(regression(patch_error), masked_patches(...))
    two similar views of a row        pretext(contrastive(), two_views(...))

Sources: Devlin et al., 2019 (masked tokens), Raffel et al., 2020 (spans), Xie et al., 2022
(patches), Chen et al., 2020 (SimCLR, views).

Patches and views need another head than classes do: `with_projection` puts any model of rows, such
as an `mlp`, on the body of another. Afterwards `without_projection(params)` returns the trained
body, and `replace_head` gives it classes.

>>> from jaxmodel.data import augment
>>> from jaxmodel.models import lenet, mlp
>>> from jaxmodel.losses import contrastive
>>> body = lenet.model(lenet.SIZES["tiny"])
>>> views = augment.parse("random_resized_crop() | noise(0.1)")
>>> model = with_projection(body, mlp.model(mlp.Config(64, (32,), 16)))
>>> params, batch = jax.jit(model.init)(jax.random.key(0)), {"pixels": jnp.ones((4, 16, 16, 1))}
>>> loss = pretext(contrastive(), two_views(views))
>>> bool(jax.jit(lambda key: loss(model, params, batch, key)[0])(jax.random.key(1)) > 0)
True
>>> own = jax.jit(body.init)(jax.random.key(0))
>>> sorted(without_projection(params)) == sorted(name for name in own if name[:4] != "head")
True
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.axes import Axes, heads
from jaxmodel.data.augment.base import Augment, field_of, images, row_keys, row_weights, uniforms
from jaxmodel.errors import InputError, at_least
from jaxmodel.losses import Loss
from jaxmodel.models import Model, Parts
from jaxmodel.rng import fold

PROJECTION = "projection"
"""The subtree with the leaves of the head that `with_projection` adds."""


def pretext(loss: Loss, task: Augment, *, seed: int = 0) -> Loss:
    """Make a loss that applies a task to the batch first.

    In evaluation the task is always drawn from the same seed.

    Args:
      loss: the loss of the batch that the task returns.
      task: `task(key, batch) -> batch`, in training with the step's key. The `augment` of `fit`
        comes before it.
      seed: the seed of the task in evaluation, or if the loss gets no key.
    """

    def made(
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        key = jax.random.key(seed) if rng is None or not train else fold(rng, "task")
        return loss(model, params, task(key, batch), rng, train=train)

    return made


# ---------------------------------------------------------------------------------------- the tasks


def two_views(augment: Augment, name: str = "pixels") -> Augment:
    """Make a task that augments each row twice independently: `views` `[B, 2, ...]`.

    `contrastive` reads them.

    Args:
      augment: the augmentation of both views; SimCLR's has crops, colours and blur.
      name: the field to make views of.

    >>> from jaxmodel.data.augment import Noise
    >>> two_views(Noise(0.1))(jax.random.key(0), {"pixels": jnp.zeros((3, 4, 4, 1))})["views"].shape
    (3, 2, 4, 4, 1)
    """

    def task(key: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        views = [
            augment(jax.random.fold_in(key, i), {name: field_of(batch, name)})[name]
            for i in range(2)
        ]
        return {**batch, "views": jnp.stack(views, axis=1)}

    return task


def restored(corrupt: Augment, name: str = "pixels", *, flat: bool = False) -> Augment:
    """Make a task that corrupts a field and keeps the original as `targets` (Vincent et al., 2008).

    Args:
      corrupt: `corrupt(key, batch)`, such as noise, a missing square or another order.
      name: the field.
      flat: for models from rows of numbers to rows of numbers: put the field as `features` `[B, N]`
        and flatten the targets too.

    >>> from jaxmodel.data.augment import Cutout
    >>> made = restored(Cutout(3), flat=True)(jax.random.key(0), {"pixels": jnp.ones((2, 4, 4, 1))})
    >>> made["features"].shape, float(made["targets"].min()), float(made["features"].min())
    ((2, 16), 1.0, 0.0)
    """

    def task(key: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        clean = field_of(batch, name)
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
    """Make a task that hides some patches of an image: masked image modelling (Xie et al., 2022).

    Hidden patches are zero, and the model predicts them from the others. The task adds `targets`
    `[B, T, patch * patch * C]`, the original patches, and `weights` `[B, T]`, which are 1 (or the
    row's weight) for hidden patches and 0 for others. So `regression(patch_error)` counts hidden
    patches alone. In each image `round(rate T)` patches, chosen uniformly, are hidden.

    Args:
      patch: side of a patch in pixels, a divisor of the image's.
      rate: share of the patches to hide, above 0 and below 1.

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
    """Compute the mean of `(x - y)^2` over each patch, for `regression`.

    >>> patch_error(jnp.zeros((1, 2, 3)), jnp.full((1, 2, 3), 2.0)).tolist()
    [[4.0, 4.0]]
    """
    x, y = outputs.astype(jnp.float32), targets.astype(jnp.float32)
    return jnp.mean(optax.losses.squared_error(x, y), axis=-1)


# ----------------------------------------------------------------------------------------- the head


def with_projection(model: Model, head: Model, *, tokens: int = 0) -> Model:
    """Put another model as the head on the body of a model, with its leaves under `projection`.

    The new head reads what the model's own head would: `[B, D]`, the mean over the axes between
    (positions of an image, tokens). The leaves of the old head are dropped.

    Args:
      model: the body.
      head: a model with one input, rows of D numbers, such as an `mlp`; its outputs are the logits.
      tokens: the head reads each of the last `tokens` positions of `[B, T, D]` by itself, which in
        a `vit` are the patches; 0 for the mean.

    Returns:
      A model. Equal arguments give the same one.

    Raises:
      InputError: a head with several inputs; when called, a head for rows of another width.
    """
    if len(head.inputs(1, 1)) != 1:
        raise InputError(
            f"head: it reads {', '.join(head.inputs(1, 1))}; allowed: a model of one input, such "
            "as an mlp"
        )
    at_least("tokens", tokens, 0)
    return _projected(model, head, tokens)


def without_projection(params: tree.Params) -> tree.Params:
    """Return the leaves of the body, without those that `with_projection` added."""
    tree.check(params)
    return {name: node for name, node in params.items() if name != PROJECTION}


@functools.lru_cache(maxsize=64)
def _projected(model: Model, head: Model, tokens: int) -> Model:
    ((name, reads),) = head.inputs(1, 1).items()
    width = math.prod(reads.shape[1:])

    def top(params: tree.Params, x: Array, rng: Any = None, train: bool = False) -> Array:
        if x.shape[-1] != width:
            raise InputError(
                f"head: it reads {width} numbers; allowed: {x.shape[-1]}, as the model's own head"
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
        whole = model.init(own)
        head_leaves = heads(model.axes, whole)
        body = {path: leaf for path, leaf in tree.flatten(whole).items() if path not in head_leaves}
        return {**tree.unflatten(body), PROJECTION: head.init(other)}

    of_head = head.axes.under(PROJECTION, model.axes.highest + 1)
    own = model.axes
    rules = tuple(
        (tree.optional(pattern), *rest) for pattern, *rest in (*of_head.rules, *own.rules)
    )
    ordered, fixed = (*own.ordered, *of_head.ordered), (*own.fixed, *of_head.fixed)
    axes = Axes(rules, (*own.sizes, *of_head.sizes), own.shared, ordered, fixed)  # pyright: ignore
    again = lambda policy: _projected(model.with_policy(policy), head.with_policy(policy), tokens)
    parts = Parts(model.parts.embed, model.parts.block, top)
    return Model(
        model.config, model.policy, init, parts, model.inputs, None, axes, with_policy=again
    )
