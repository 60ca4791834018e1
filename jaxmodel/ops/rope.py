"""Rotary position embedding (Su et al., 2021), in the half-split order of HF weights."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodel.errors import InputError, one_of

KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A scaling of rotary frequencies, for a longer context than that of the training.

    Attributes:
      kind: "linear" (Chen et al., 2023): all are divided by `factor`; "dynamic" (bloc97
        and emozilla, 2023): the base grows with rows longer than the context; "llama3" (Llama 3.1,
        2024): only those whose wavelength exceeds the context, with a smooth transition; "yarn"
        (Peng et al., 2023): by the number of rotations in the context, with sharpened scores;
        "longrope" (Ding et al., 2024): each by its own divisor, from one of two lists, with
        sharpened scores.
      factor: the ratio of the new context length to that of the training.
      context: the context length of the training, in tokens; all kinds but "linear" need it.
      low: llama3: a wave that fits the context fewer times than this is scaled fully.
      high: llama3: a wave that fits the context more often than this is not scaled.
      fast: yarn: a dimension with more rotations than this in the context is not scaled.
      slow: yarn: a dimension with fewer rotations than this is scaled fully.
      sharpen: yarn and longrope: the factor of sine and cosine; None for `0.1 ln(factor) + 1`
        (yarn) and `sqrt(1 + ln(factor) / ln(context))` (longrope).
      truncate: yarn: whether the limits of the transition are rounded to whole dimensions.
      near: longrope: the divisors for rows that fit the context of the training.
      far: longrope: the divisors for longer rows. (So the content of a cache changes its meaning
        when a row grows beyond the context of the training; with "dynamic" too.)
    """

    kind: str
    factor: float
    context: int = 0
    low: float = 1.0
    high: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    sharpen: float | None = None
    truncate: bool = True
    near: tuple[float, ...] = ()
    far: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        one_of("rope scaling", self.kind, KINDS)
        if self.factor < 1 or (self.kind != "linear" and self.context < 1):
            raise InputError(
                f"rope scaling: factor {self.factor}, context {self.context}; allowed: at least 1 "
                "for each"
            )
        if self.kind == "llama3" and not self.low < self.high:
            raise InputError(f"rope scaling: low {self.low} must be below high {self.high}")

        if self.kind == "longrope" and (
            min(self.near + self.far, default=0) <= 0 or len(self.near) != len(self.far)
        ):
            raise InputError(
                f"rope scaling: {len(self.near)} near and {len(self.far)} far divisors; allowed: "
                "the same number of each, all above 0"
            )

    def apply(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """Return the scaled frequencies.

        For "longrope" they are `[2, f]`, near and far; for "dynamic" those of rows that fit the
        context.
        """
        if self.kind == "dynamic":
            return frequency
        if self.kind == "longrope":
            if len(self.near) != len(frequency):
                raise InputError(
                    f"rope scaling: {len(self.near)} divisors; allowed: {len(frequency)}, one for "
                    "each frequency"
                )
            return frequency / np.array([self.near, self.far])
        slower = frequency / self.factor
        if self.kind == "linear":
            return slower
        if self.kind == "llama3":
            fits = self.context * frequency / (2 * math.pi)
            kept = np.clip((fits - self.low) / (self.high - self.low), 0.0, 1.0)
        else:
            width = 2 * len(frequency)

            def place(turns: float) -> float:
                return width * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(base))

            first = place(self.fast)
            last = place(self.slow)
            first, last = (math.floor(first), math.ceil(last)) if self.truncate else (first, last)
            first = max(first, 0)
            last = min(last, width - 1)
            last = last + 0.001 if first == last else last
            kept = 1 - np.clip((np.arange(len(frequency)) - first) / (last - first), 0.0, 1.0)
        return slower * (1 - kept) + frequency * kept

    @property
    def gain(self) -> float:
        """The factor of sine and cosine."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.sharpen is not None or self.factor == 1:
            return 1.0 if self.sharpen is None else self.sharpen
        return (
            0.1 * math.log(self.factor) + 1
            if self.kind == "yarn"
            else (1 + math.log(self.factor) / math.log(self.context)) ** 0.5
        )


def rope_frequencies(width: int, base: float) -> np.ndarray:
    """Return the frequencies of a head, `base^(-2i / width)`, in float64 and without scaling.

    >>> rope_frequencies(4, 100.0).tolist()
    [1.0, 0.1]
    """
    return base ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def rope_tables(
    positions: Int[Array, "B T"], width: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T f"], Float[Array, "B T f"]]:
    """Return the sine and cosine of every position, computed once per step and used in all layers.

    Args:
      positions: the positions of the tokens.
      width: the width of a head; there are `f = width / 2` frequencies.
      base: the base of the frequencies.
      scaling: see `RopeScaling`.
    """
    frequency = rope_frequencies(width, base)
    if scaling is not None:
        frequency = scaling.apply(frequency, base)
    waves = jnp.asarray(frequency, jnp.float32)
    if scaling is not None and scaling.kind == "longrope":
        beyond = jnp.max(positions, axis=1, keepdims=True) >= scaling.context
        waves = jnp.where(beyond[..., None], waves[None, None, 1], waves[None, None, 0])
    elif scaling is not None and scaling.kind == "dynamic":
        length = jnp.max(positions, axis=1, keepdims=True).astype(jnp.float32) + 1.0
        beyond = jnp.maximum(length / scaling.context, 1.0) - 1.0
        # a base that is c^(d / (d - 2)) times as large, as powers of the frequencies
        powers = -np.arange(0, width, 2, dtype=np.float32)[None, None] / max(width - 2, 1)
        waves = waves[None, None] * (scaling.factor * beyond + 1.0)[..., None] ** powers
    else:
        waves = waves[None, None]
    angle = positions[..., None].astype(jnp.float32) * waves
    gain = 1.0 if scaling is None else scaling.gain
    return jnp.sin(angle) * gain, jnp.cos(angle) * gain


def rotate(x: Float[Array, "B T N h"], tables: tuple[Array, Array]) -> Float[Array, "B T N h"]:
    """Rotate queries or keys by the tables of their positions.

    Components after the first `2 f` are not rotated.
    """
    sin, cos = (table[:, :, None, :] for table in tables)
    half = sin.shape[-1]
    wide = x.astype(jnp.float32)
    first = wide[..., :half]
    second = wide[..., half : 2 * half]
    rest = wide[..., 2 * half :]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
    ).astype(x.dtype)
