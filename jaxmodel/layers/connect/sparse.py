"""A linear map with only some of its blocks, which are fixed or learnt."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.connect.full import add_bias
from jaxmodel.layers.leaf import leaf
from jaxmodel.leaves import BlockSparse, decode
from jaxmodel.leaves.largest import largest
from jaxmodel.ops.edges import EdgeBlock, Edges, edges_of


class BlockLinear(nn.Module):
    """A linear map `(W * mask) x + b` that keeps the same number of blocks in every block row.

    - Fixed: the leaf kept `[rows, height, n * width]` holds the kept blocks.
    - Learnt: leaves all `[D, N]` and scores `[rows * N / width]`. The blocks with the largest
      scores are used, and each score has the gradient of its block's use (Ramanujan et al., 2020).
      While the mask is learnt, the map costs as much as a dense one.
    - Settled (see `settle_blocks`): the leaf weight `[D, N]` is a `BlockSparse`, or any other leaf.

    A fixed or settled map costs in proportion to the kept blocks. Each has weight_bias `[D]`.

    Attributes:
      width: D, the number of outputs.
      block: height and width of a block, which divide D and N.
      kept: n, the number of blocks kept in each block row.
      policy: dtypes and placement.
      learnt: whether new leaves learn the mask.
      seed: the seed of the fixed mask.

    >>> x, module = jnp.ones((2, 16)), BlockLinear(8, (4, 4), 1, ops.Policy())
    >>> params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    >>> {name: leaf.shape for name, leaf in params.items()}
    {'kept': (2, 4, 4), 'weight_bias': (8,)}
    """

    width: int
    block: tuple[int, int]
    kept: int
    policy: ops.Policy
    learnt: bool = False
    seed: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B N"], layer: Any = 0) -> Float[Array, "B D"]:
        """Compute the map.

        Args:
          x: the activation.
          layer: the index of the layer, which may be traced; a fixed mask differs by layer.
        """
        if self.has_variable("params", "weight"):
            return add_bias(
                self, ops.einsum("BN,DN->BD", x, self.get_variable("params", "weight"), self.policy)
            )
        (height, width), n = self.block, x.shape[-1]
        check_blocks(self.width, n, self.block, self.kept)
        rows = self.width // height
        columns = n // width
        normal = nn.initializers.normal((self.kept * width) ** -0.5)
        if self.learnt:
            scores = leaf(self, "scores", nn.initializers.normal(0.01), (rows * columns,)).reshape(
                rows, columns
            )
            use = chosen(scores, self.kept).astype(scores.dtype) + (
                scores - jax.lax.stop_gradient(scores)
            )
            weight = leaf(self, "all", normal, (self.width, n))
            return add_bias(self, ops.einsum("BN,DN->BD", x, _used(weight, use), self.policy))
        places = jnp.asarray(block_columns(rows, columns, self.kept, self.seed))
        kept = leaf(self, "kept", normal, (rows, height, self.kept * width))
        # shifted by the layer, so that layers see different inputs and can still be scanned
        return add_bias(
            self,
            ops.block_sparse_matmul(x, kept, (places + jnp.int32(layer)) % columns, self.policy),
        )

    def edges(self, params: tree.Params, layer: int = 0, features: int | None = None) -> Edges:
        """Return the connections as a list.

        Args:
          params: the parameters of this layer, fixed, learnt or settled.
          layer: the index of the layer.
          features: N, needed for a fixed mask, whose leaf does not tell it.
        """
        weight, keep = dense_form(self, params, layer, features)
        height, width = self.block
        tiles = weight.reshape(keep.shape[0], height, keep.shape[1], width)
        blocks = [
            EdgeBlock(tiles[row, :, column], (int(column) * width,), int(row) * height)
            for row, column in np.argwhere(np.asarray(keep))
        ]
        return edges_of([*blocks, EdgeBlock(params["weight_bias"])], weight.shape[1], self.width)


def check_blocks(out: int, n: int, block: tuple[int, int], kept: int) -> None:
    """Refuse blocks that do not divide a weight `[out, n]`, or too many of them.

    Raises:
      InputError: the blocks do not divide the weight, or a block row has fewer than `kept`.
    """
    height, width = block
    if min(block) < 1 or out % height or n % width or not 0 < kept <= n // width:
        most = (
            f", and a row of blocks keeps 1 to {n // width}" if width > 0 and n % width == 0 else ""
        )
        raise InputError(
            f"block, kept: {block}, {kept} given; a block must divide {out} x {n}{most}"
        )


def block_columns(rows: int, columns: int, kept: int, seed: int) -> Int[np.ndarray, "rows kept"]:
    """Choose the blocks that a fixed mask keeps in each block row.

    They are random, but every column is used equally often, or once more.

    >>> block_columns(2, 4, 2, seed=0).shape
    (2, 2)
    """
    words = np.random.Philox(key=np.uint64(seed))
    used = np.zeros(columns, int)
    out = np.zeros((rows, kept), np.int32)
    for row in range(rows):
        # the least used columns; ties are broken at random
        out[row] = np.sort(np.lexsort((words.random_raw(columns), used))[:kept])
        used[out[row]] += 1
    return out


def chosen(scores: Float[Array, "... rows columns"], kept: int) -> Bool[Array, "... rows columns"]:
    """Select the blocks with the largest scores in each block row."""
    return largest(jax.lax.stop_gradient(scores), kept)


def dense_form(
    module: BlockLinear, params: tree.Params, layer: int = 0, features: int | None = None
) -> tuple[Float[Array, "D N"], Bool[Array, "rows columns"] | Bool[np.ndarray, "rows columns"]]:
    """Return the weight of a `BlockLinear` with its zeros in place, and which blocks are kept.

    Raises:
      InputError: the mask is fixed and `features` is missing.
    """
    height, width = module.block
    if "weight" in params:
        weight = decode(params["weight"])
        tiles = weight.reshape(weight.shape[0] // height, height, -1, width)
        return weight, params["weight"].keep() if isinstance(
            params["weight"], BlockSparse
        ) else jnp.any(tiles != 0, axis=(1, 3))
    if "scores" in params:
        weight = decode(params["all"])
        keep = chosen(params["scores"].reshape(weight.shape[0] // height, -1), module.kept)
        return _used(weight, keep.astype(weight.dtype)), keep
    if features is None:
        raise InputError(
            "features: None given; allowed: the number of inputs, which the kept blocks do not "
            "determine"
        )
    kept = decode(params["kept"])
    columns = features // width
    places = (block_columns(kept.shape[0], columns, module.kept, module.seed) + layer) % columns
    rows = np.arange(kept.shape[0])[:, None]
    tiles = kept.reshape(*kept.shape[:2], module.kept, width).swapaxes(1, 2)
    whole = (
        jnp.zeros((kept.shape[0], columns, height, width), kept.dtype).at[rows, places].set(tiles)
    )
    keep = np.zeros((kept.shape[0], columns), bool)
    keep[rows, places] = True
    return whole.swapaxes(1, 2).reshape(module.width, features), keep


def _used(w: Any, use: Float[Array, "rows columns"]) -> Any:
    """Multiply each block of a leaf `[D, N]` with its use.

    A probe still measures the whole input.
    """
    if isinstance(w, ops.Probe):
        return dataclasses.replace(w, weight=_used(w.weight, use))
    weight = decode(w)
    tiles = weight.reshape(use.shape[0], -1, use.shape[1], weight.shape[1] // use.shape[1])
    return (tiles * use[:, None, :, None].astype(weight.dtype)).reshape(weight.shape)


def settle_blocks(
    module: BlockLinear, params: tree.Params, layer: int = 0, features: int | None = None
) -> tree.Params:
    """Store the blocks of a `BlockLinear` in one `BlockSparse` leaf, for storing and running.

    The function stays the same.

    Args:
      module: the layer.
      params: the parameters of one layer, fixed or learnt.
      layer: the index of the layer.
      features: N, for a fixed mask.
    """
    weight, keep = dense_form(module, params, layer, features)
    rest = {name: value for name, value in params.items() if name not in ("kept", "all", "scores")}
    return {**rest, "weight": BlockSparse.from_dense(weight, jnp.asarray(keep), block=module.block)}
