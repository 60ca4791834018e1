"""Augmentations, pure functions `augment(key, batch) -> batch` that run jitted and on a mesh.

An augmentation is a frozen record of settings. It changes the fields that it knows (`pixels`
`[B, Y, X, C]` from 0 to 1 and `labels`, or `tokens` and their fields) and passes on the others. Row
i draws from `fold_in(key, i)`, so the result does not depend on how a mesh splits the rows. Only
mixing moves data between devices.

>>> import jax, jax.numpy as jnp
>>> from jaxmodel.data.augment.geometric import HorizontalFlip
>>> augment = RandomCrop(4) | HorizontalFlip() | Cutout(8)  # or chain(...), parse(str(augment))
>>> batch = {"pixels": jnp.ones((2, 28, 28, 1)), "labels": jnp.array([3, 8])}
>>> jax.jit(augment)(jax.random.key(0), batch)["pixels"].shape
(2, 28, 28, 1)
"""

from jaxmodel import moved
from jaxmodel.data.augment import colour  # noqa: F401, its members have names in texts too
from jaxmodel.data.augment.base import Augment, Augmentation, chain, members, parse
from jaxmodel.data.augment.damage import Cutout, Noise
from jaxmodel.data.augment.geometric import RandomCrop
from jaxmodel.data.augment.mixing import CutMix, Mixup
from jaxmodel.data.augment.policies import AugMix, RandAugment
from jaxmodel.data.augment.text import SpanCorruption, SpanMasking

__all__ = [
    "AugMix",
    "Augment",
    "Augmentation",
    "CutMix",
    "Cutout",
    "Mixup",
    "Noise",
    "RandAugment",
    "RandomCrop",
    "SpanCorruption",
    "SpanMasking",
    "chain",
    "members",
    "parse",
]

moved.attach(__name__)
