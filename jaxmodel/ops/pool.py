"""Pooling of images: the largest or the mean value of each window.

The gradient of XLA's own windowed reductions is a scatter, which took three quarters of a training
step of a small network on a CPU (135 ms against 35 ms). Here a maximum is taken over strided
slices, one for each position in a window, and a mean is taken over axes of its own; XLA fuses both.
(A maximum over such axes has a slower gradient too: 61 against 50 ms of processor time in that
step.)
"""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.errors import InputError


def max_pool(
    x: Float[Array, "B Y X D"],
    kernel: tuple[int, int],
    stride: tuple[int, int] | None = None,
    pad: int = 0,
) -> Float[Array, "B P Q D"]:
    """Return the largest value of each window.

    Args:
      x: images.
      kernel: the sides of a window.
      stride: the distance between two windows; None for windows side by side. Rows and columns at
        the end that fill no window are left out.
      pad: the number of rows and columns of padding on each side; a padded value is never the
        largest.

    Raises:
      InputError: an image smaller than a window.
    """
    stride = kernel if stride is None else stride
    if pad:
        x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-jnp.inf)
    counts = _counts(x, kernel, stride)

    def part(i: int, j: int) -> Array:
        """Return the elements at this position of all windows."""
        rows, columns = (
            slice(at, at + s * (n - 1) + 1, s)
            for at, s, n in zip((i, j), stride, counts, strict=True)
        )
        return x[:, rows, columns]

    return functools.reduce(
        jnp.maximum, (part(i, j) for i, j in itertools.product(*map(range, kernel)))
    )


def avg_pool(x: Float[Array, "B Y X D"], kernel: tuple[int, int]) -> Float[Array, "B P Q D"]:
    """Return the mean of each window, in x's dtype.

    Windows lie side by side. Rows and columns at the end that fill no window are left out.

    Args:
      x: images.
      kernel: the sides of a window.

    Raises:
      InputError: an image smaller than a window.
    """
    (p, q), (y, z) = _counts(x, kernel, kernel), kernel
    windows = x[:, : p * y, : q * z].reshape(x.shape[0], p, y, q, z, x.shape[-1])
    return jnp.mean(windows.astype(jnp.float32), axis=(2, 4)).astype(x.dtype)


def _counts(
    x: Float[Array, "B Y X D"], kernel: tuple[int, int], stride: tuple[int, int]
) -> list[int]:
    """Return the number of windows along each side."""
    counts = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel, stride, strict=True)]
    if min(counts) < 1:
        raise InputError(
            f"kernel: {kernel} given for images of {x.shape[1:3]}; a window must fit into an image"
        )
    return counts
