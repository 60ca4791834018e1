"""The product with a weight of which only some blocks are there: work in proportion to the blocks
that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_product(
    x: Float[Array, "... in"],
    w: Any,
    columns: Int[Array, "rows n"],
    width: int,
    run: Callable[[Array, Any], Array],
) -> Float[Array, "... out"]:
    """`y_r = w_r @ x[columns_r]` for each row of blocks r, one after the other.

    x is turned once so that a block of it is contiguous, and each step is one product of matrices
    that fit a cache. (Measured on a CPU against one batched product of gathered blocks: forward 2
    to 4 times faster, and nothing of the size of `rows * n * width` exists. The backward pass
    gathers again rather than keep what was gathered.)

    Args:
      x: the activation.
      w: a pytree with rows in front, each `[height, n * width]`: the kept blocks side by side.
      columns: which block of x each of them meets.
      width: of a block.
      run: (gathered `[n * width, B]`, w of a row) -> `[height, B]`.
    """
    lead = x.shape[:-1]
    size = x.shape[-1]
    turned = x.reshape(-1, size).T.reshape(size // width, width, -1)

    @jax.checkpoint
    def one(turned: Array, row: Any, places: Array) -> Array:
        return run(turned[places].reshape(-1, turned.shape[-1]), row)

    _, y = jax.lax.scan(lambda _, xs: (None, one(turned, *xs)), None, (w, columns))
    return y.reshape(-1, y.shape[-1]).T.reshape(*lead, -1)


def beside(blocks: Float[Array, "rows n height width"]) -> Float[Array, "rows height beside"]:
    """The blocks of each row side by side."""
    return jnp.swapaxes(blocks, 1, 2).reshape(blocks.shape[0], blocks.shape[2], -1)
