"""Images as sequences of patches."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf
from jaxmodel.ops.norms import on_last
from jaxmodel.sharding import constrain


class Patches(nn.Module):
    """A linear map of each patch of an image, a class token, and learnt positions.

    Leaves: patch `[D, C * patch * patch]`, patch_bias `[D]`, class `[D]`, positions
    `[grid * grid (+ 1), D]`. For an image of another size the positions are interpolated (bicubic);
    rows and columns that fill no patch are ignored (Dosovitskiy et al., 2020).

    Attributes:
      width: D of new leaves.
      patch: the side of a patch in pixels.
      grid: the number of patches along each side of the images that positions are learnt for.
      class_token: whether there is a class token, before the patches.
      bias: whether the map has a bias.
      init_scale: standard deviation of new weights.
      policy: dtypes and placement.
    """

    width: int
    patch: int
    grid: int
    class_token: bool
    bias: bool
    init_scale: float
    policy: ops.Policy

    @nn.compact
    def __call__(self, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B T D"]:
        """Return the tokens of each image."""
        normal = nn.initializers.normal(self.init_scale)
        side = (self.patch, self.patch)
        batch = pixels.shape[0]
        channels = pixels.shape[-1]
        kernel = leaf(self, "patch", normal, (self.width, channels * self.patch**2))
        y = ops.conv(pixels, kernel, self.policy, kernel=side, stride=side, padding="VALID")
        rows, columns = y.shape[1:3]
        y = y.reshape(batch, -1, y.shape[-1])
        if self.bias:
            y = y + on_last(
                leaf(self, "patch_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype),
                y.ndim,
            )
        if self.class_token:
            first = on_last(leaf(self, "class", normal, y.shape[-1:]).astype(y.dtype), y.ndim)
            y = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, y.shape[-1])), y], axis=1)
        learnt = self.grid**2 + self.class_token
        alike = (rows, columns) == (self.grid, self.grid)
        table = leaf(self, "positions", normal, (learnt, y.shape[-1]))
        places = jnp.broadcast_to(
            jnp.arange(learnt, dtype=jnp.int32), (batch if alike else 1, learnt)
        )
        positions = ops.embed(table, places, self.policy, "SD")
        if not alike:
            split = int(self.class_token)
            between = _between(positions[0, split:], self.grid, (rows, columns)).astype(y.dtype)[
                None
            ]
            positions = jnp.concatenate([positions[:, :split], between], axis=1)
        return constrain(y + positions, "BTD", self.policy.axes)


def _between(table: Float[Array, "N D"], grid: int, size: tuple[int, int]) -> Float[Array, "M D"]:
    """Interpolate the positions of a square grid at the patch centres of another grid."""
    square = table.astype(jnp.float32).reshape(grid, grid, -1)
    down, across = (jnp.asarray(_weights(grid, n)) for n in size)
    return jnp.einsum(
        "yY,xX,YXD->yxD", down, across, square, precision=jax.lax.Precision.HIGHEST
    ).reshape(-1, table.shape[-1])


@functools.cache
def _weights(before: int, after: int, a: float = -0.75) -> np.ndarray:
    """Return `[after, before]`, the weight of each old position for each new one.

    It is cubic convolution (Keys, 1981). Beyond the ends the last value is repeated, and there is
    no anti-aliasing when the grid shrinks, as in torch's `interpolate`.
    """
    at = (np.arange(after) + 0.5) * before / after - 0.5
    weights = np.zeros((after, before), np.float32)
    for step in (-1, 0, 1, 2):
        old = np.floor(at) + step
        x = np.abs(at - old)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        np.add.at(
            weights,
            (np.arange(after), np.clip(old, 0, before - 1).astype(int)),
            np.where(x <= 1, near, far),
        )
    return weights
