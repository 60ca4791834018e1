"""Training of weights that are `QTensor` leaves, without a float copy of them.

It uses the parts of any run. The gradient of a compressed leaf comes from a probe, in bfloat16
(`gradients.value_and_grad`). The optimiser sees the array that the leaf stands for (`dense`), so
any optimiser works. Its update is added a layer at a time and stochastically rounded to codes, with
an exact mean (`apply_updates`). A run only has to declare that such leaves train:

    params = quantize_weights(params, [(".*(norm/.*|_bias)|positions", None), (".*", 8)])
    state = init_state(params, optimizer("adamw8", 1e-3), trainable=[(".*", True)])

A weight then takes 1 byte of codes, 2 bytes of 8-bit moments, a tenth of a byte of scales and,
during a step, 2 bytes of gradient: 5 bytes, where float32 Adam takes 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed, QTensor, decode
from jaxmodel.leaves.leaf import check_weights
from jaxmodel.optim.rounding import moved, rounded
from jaxmodel.rng import fold, number
from jaxmodel.sharding import auto_axes


def quantize_weights(
    params: tree.Params, rules: tree.Rules, group: int | None = None
) -> tree.Params:
    """Quantise leaves to train on, with each weight rounded to the nearest code.

    Args:
      params: a tree of plain arrays.
      rules: path -> bits, 2 to 8, or None for leaves that are not quantised.
      group: the number of weights of a row that share a scale; None for the longest of 128, 64 and
        32 that divides a row, else one scale per row.

    Raises:
      InputError: the bits are not allowed, or a leaf is not a plain matrix.

    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((256, 64)), "up_bias": jnp.zeros(256)}
    >>> params = quantize_weights(params, [(".*_bias", None), (".*", 8)])
    >>> params["up"].shape, params["up"].packed.dtype, params["up"].scale.shape
    ((256, 64), dtype('int8'), (256, 1))
    """
    tree.check(params)
    params, bits = tree.match(rules, params)

    def one(path: str, leaf: Any) -> Any:
        if bits[path] is None:
            return leaf
        if not isinstance(bits[path], int) or not 2 <= bits[path] <= 8:
            raise InputError(f"bits: {bits[path]!r} given for {path!r}; allowed: 2 to 8, or None")
        if isinstance(leaf, Compressed) or len(tree.layer_shape(path, leaf)) < 2:
            raise InputError(
                f"rules: the leaf {path!r} of shape {leaf.shape} is not a plain matrix; give it "
                "None"
            )
        check_weights(leaf, f"rules: the leaf {path!r}")
        return jax.jit(rounded, static_argnums=(1, 2))(leaf, group, bits[path])

    return tree.map_leaves(one, params)


def dense(params: Any) -> Any:
    """Return a tree with the arrays that its compressed leaves stand for, for an optimiser.

    Under jit, arrays that are not used are not made.
    """
    return jax.tree.map(decode, params, is_leaf=_is_compressed)


def apply_updates(params: tree.Params, updates: Any, key: jax.Array) -> tree.Params:
    """Compute `p + u` of every leaf, in its dtype.

    The new codes of compressed leaves are stochastically rounded.

    Args:
      params: the parameters that train.
      updates: arrays with the shapes of the leaves.
      key: the random key of this step.

    Raises:
      InputError: a compressed leaf cannot be trained.
    """
    paths, leaves, places = flat(params)
    new = []
    for path, leaf, update in zip(paths, leaves, places.flatten_up_to(updates), strict=True):
        if not _is_compressed(leaf):
            new.append((leaf.astype(jnp.float32) + update.astype(jnp.float32)).astype(leaf.dtype))
            continue
        if not isinstance(leaf, QTensor):
            raise InputError(
                f"trainable: a {type(leaf).__name__} leaf cannot be trained with rounding; "
                "allowed: arrays, QTensor"
            )
        new += by_layer(path, lambda *args: (moved(*args),), key, (leaf,), update)
    return jax.tree.unflatten(places, new)


def flat(params: Any) -> tuple[list[str], list[Any], Any]:
    """Return paths, leaves (compressed ones whole) and structure of any pytree."""
    found, places = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_compressed)
    return (
        [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found],
        [leaf for _, leaf in found],
        places,
    )


def by_layer[T: tuple[Any, ...]](
    path: str, function: Callable[..., T], key: jax.Array, arrays: T, *others: Any
) -> T:
    """Run `function(*arrays, *others, key)`, layer by layer if the leaf of this path is a stack.

    The function returns new arrays. They are written in place where possible, so the extra memory
    is that of one layer. This is not done where a mesh splits the layers into stages. Each layer's
    key is folded from its path, so it is the same however layers are stacked.
    """
    if not tree.is_stacked(path) or len(arrays[0].shape) < 3 or auto_axes().get("pipeline", 1) > 1:
        return function(*arrays, *others, fold(key, path))
    numbers = jnp.array([number(layer) for layer in tree.layer_paths(path)], jnp.uint32)

    def body(i: jax.Array, arrays: T) -> T:
        here = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), (*arrays, *others)
        )
        new = function(*here, jax.random.fold_in(key, numbers[i]))
        return jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), arrays, new
        )

    return jax.lax.fori_loop(0, arrays[0].shape[0], body, arrays)


def _is_compressed(node: Any) -> bool:
    return isinstance(node, Compressed)
