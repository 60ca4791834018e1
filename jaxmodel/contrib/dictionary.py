"""Steps beside the loss of a sparse autoencoder: unit columns, new starts for dead features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed
from jaxmodel.models import Model
from jaxmodel.ops.norms import on_last
from jaxmodel.train.state import TrainState

READS = ("encoder", "code", "weight")
BIAS = ("encoder", "code", "weight_bias")
WRITES = ("decoder", "out", "weight")


def count_active(model: Model, params: tree.Params, batch: Mapping[str, Array]) -> Int[Array, " Z"]:
    """Count for each feature of the code the rows of a batch in which it is above zero.

    The counts of several batches can be added.
    """
    return jnp.sum(
        model.hidden(params, {"features": batch["features"]}).hidden > 0, axis=0, dtype=jnp.int32
    )


def unit_dictionary(params: tree.Params) -> tree.Params:
    """Scale the columns of the decoder, what each feature writes, to unit length.

    Apply it after each step. Without it the L1 norm of the code can fall at no cost, by small codes
    and large columns (Bricken et al., 2023).
    """
    columns = _plain(params)["decoder"]["out"]["weight"]
    length = jnp.linalg.norm(columns.astype(jnp.float32), axis=0, keepdims=True)
    return _put(params, WRITES, (columns / jnp.maximum(length, 1e-12)).astype(columns.dtype))


def revive(
    state: TrainState,
    model: Model,
    batch: Mapping[str, Array],
    dead: Bool[Array, " Z"],
    key: Key[Array, ""],
    *,
    scale: float = 0.5,
) -> TrainState:
    """Give each dead feature a new start: resampling (Bricken et al., 2023).

    Rows of the batch are drawn with a probability proportional to their squared loss. A dead
    feature is set to read and write what the reconstruction of its row misses: that direction
    becomes the column of the decoder and, at `scale` times the mean length of the rows of living
    features, the row of the encoder. Its bias is zero. The optimiser's moments of these weights are
    reset to zero. Living features do not change.

    Args:
      state: a state whose params are those of a sparse autoencoder without hidden layers.
      model: a model of `jaxmodel.models.autoencoder`.
      batch: `features` `[B, N]`; with more rows the new features differ more.
      dead: the features to revive, such as `count_active(...) == 0` over many batches.
      key: for the draws.
      scale: length of the encoder's new rows; Bricken et al. use 0.2 with an L1 norm. With a small
        one, new features are seldom among the k largest; with a large one they displace good ones.

    Raises:
      InputError: hidden layers, or compressed weights.
    """
    params = _plain(state.params)
    x = batch["features"].astype(jnp.float32)
    missed = x - model.apply(params, {"features": x}).logits
    loss = jnp.sum(missed**2, axis=-1)
    rows = jax.random.categorical(key, 2 * jnp.log(jnp.maximum(loss, 1e-30)), shape=dead.shape)
    new = missed[rows] / jnp.maximum(jnp.sqrt(loss[rows]), 1e-12)[:, None]  # [Z, N]
    reads = params["encoder"]["code"]["weight"]
    writes = params["decoder"]["out"]["weight"]
    lengths = jnp.linalg.norm(reads.astype(jnp.float32), axis=-1)
    living = jnp.sum(jnp.where(dead, 0.0, lengths)) / jnp.maximum(
        jnp.sum(~dead, dtype=jnp.float32), 1.0
    )
    length = scale * jnp.where(jnp.any(~dead), living, 1.0)

    shapes = {READS: reads.shape, BIAS: dead.shape, WRITES: writes.shape}

    def renewed(
        path: tuple[str, ...], leaf: Any, values: Mapping[tuple[str, str, str], Array | float]
    ) -> Any:
        for name, value in values.items():
            if path[-3:] == name and leaf.shape == shapes[name]:
                where = (
                    on_last(dead, 2) if name == WRITES else dead.reshape(-1, *[1] * (leaf.ndim - 1))
                )
                return jnp.where(where, jnp.asarray(value, leaf.dtype), leaf)
        return leaf

    values = {READS: length * new, BIAS: jnp.zeros(dead.shape), WRITES: new.T}
    zeros = dict.fromkeys(values, 0.0)
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: renewed(_names(path), leaf, zeros), state.opt_state
    )
    params = tree.map_leaves(
        lambda path, leaf: renewed(tuple(path.split("/")), leaf, values), params
    )
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def _plain(params: tree.Params) -> tree.Params:
    """Check that params are those of one linear encoder and one linear decoder, and return them."""
    tree.check(params)
    leaves = tree.flatten(params)
    missing = [
        name
        for name in map("/".join, (READS, BIAS, WRITES))
        if isinstance(leaves.get(name), Compressed | None)
    ]
    hidden = [name for name in leaves if "hidden_" in name]
    if missing or hidden:
        raise InputError(
            f"params: {[*missing, *hidden][0]} is missing, compressed or superfluous; allowed: the "
            "plain weights of an encoder and a decoder"
        )
    return params


def _put(params: tree.Params, name: tuple[str, ...], leaf: Float[Array, "N Z"]) -> tree.Params:
    return tree.map_leaves(lambda path, old: leaf if path == "/".join(name) else old, params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
