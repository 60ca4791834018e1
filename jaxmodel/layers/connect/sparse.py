"""A linear map of which only some blocks are there: a fixed choice of them, or one that is learnt."""

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
from jaxmodel.leaves.block_sparse import largest
from jaxmodel.ops.edges import EdgeBlock, Edges, edges_of


class BlockLinear(nn.Module):
    """`(W * mask) x + b`, where the mask keeps as many blocks in every row of blocks.

    - Fixed: leaf kept `[rows, height, n * width]`, the blocks that are there.
    - Learnt: leaves all `[D, N]` and scores `[rows * N / width]`. The blocks of largest score are
      used, and each score has the gradient of its block's use (Ramanujan et al., 2020). While it is
      learnt it costs as much as a dense map.
    - Settled (see `settle_blocks`): leaf weight `[D, N]`, a `BlockSparse`, or any other leaf.

    Fixed and settled, it costs in proportion to the blocks that are there.

    Each has weight_bias `[D]`.

    Attributes:
      width: D.
      block: height and width of a block, which divide D and N.
      kept: n, blocks in each row of blocks.
      policy: dtypes and placement.
      learnt: whether new leaves learn the mask.
      seed: of the fixed mask.

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
        """Args:
        x: the activation.
        layer: its number, which may be traced; a fixed mask differs by layer.
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
        # shifted by the layer, so that blocks of several layers meet other inputs and yet their
        # layers can be scanned
        return add_bias(
            self, ops.blocks(x, kept, (places + jnp.int32(layer)) % columns, self.policy)
        )

    def edges(self, params: tree.Params, layer: int = 0, features: int | None = None) -> Edges:
        """The connections that are there as a list.

        Args:
          params: those of this layer, fixed, learnt or settled.
          layer: its number.
          features: N, where the leaf does not tell it: of a fixed mask.
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
    """Refuse blocks that do not divide a weight `[out, n]`, or more of them in a row of blocks than
    there are.

    Raises:
      InputError: which.
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
    """Which blocks a fixed mask keeps in each row of blocks: random, each column as often as the
    others or once more.

    >>> block_columns(2, 4, 2, seed=0).shape
    (2, 2)
    """
    words = np.random.Philox(key=np.uint64(seed))
    used = np.zeros(columns, int)
    out = np.zeros((rows, kept), np.int32)
    for row in range(rows):
        # the least used, of equal ones any
        out[row] = np.sort(np.lexsort((words.random_raw(columns), used))[:kept])
        used[out[row]] += 1
    return out


def chosen(scores: Float[Array, "... rows columns"], kept: int) -> Bool[Array, "... rows columns"]:
    """The blocks of largest score in each row of blocks."""
    return largest(jax.lax.stop_gradient(scores), kept)


def dense_form(
    module: BlockLinear, params: tree.Params, layer: int = 0, features: int | None = None
) -> tuple[Float[Array, "D N"], Bool[Array, "rows columns"] | Bool[np.ndarray, "rows columns"]]:
    """The weight of a `BlockLinear` with its zeros in place, and which blocks are there.

    Raises:
      InputError: a fixed mask without `features`.
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
            "features: None given; how many inputs the map has is needed, which the kept blocks "
            "do not tell"
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
    """A leaf `[D, N]` with each block times its use. What is measured is the whole input."""
    if isinstance(w, ops.Probe):
        return dataclasses.replace(w, weight=_used(w.weight, use))
    weight = decode(w)
    tiles = weight.reshape(use.shape[0], -1, use.shape[1], weight.shape[1] // use.shape[1])
    return (tiles * use[:, None, :, None].astype(weight.dtype)).reshape(weight.shape)


def settle_blocks(
    module: BlockLinear, params: tree.Params, layer: int = 0, features: int | None = None
) -> tree.Params:
    """The params of a `BlockLinear` with its blocks in one `BlockSparse` leaf: the same function,
    for storing and running.

    Args:
      module: the layer.
      params: those of one layer, fixed or learnt.
      layer: its number.
      features: N, for a fixed mask.
    """
    weight, keep = dense_form(module, params, layer, features)
    rest = {name: value for name, value in params.items() if name not in ("kept", "all", "scores")}
    return {**rest, "weight": BlockSparse.from_dense(weight, jnp.asarray(keep), block=module.block)}
