"""Parameter trees: paths, rules, segments of equal layers, partition, sizes, fingerprints.

Params are a plain nested `dict`. Whatever is not a dict is a leaf: a `jax.Array` or a compressed
leaf (any pytree that has `shape` and `dtype`, see `jaxmodel.leaves`). A leaf's path joins the keys
with `/`.

Segments. Where layers repeat, the dict under the key `blocks` maps a *segment* of equal layers to
their stacked leaves: in `{"blocks": {"0-28": ..., "29": ...}}` every leaf under `0-28` has a
leading axis of 29 layers and the leaves under `29` have none. Rules never see segments: they see
the path of one layer (`blocks/7/attn/q`). If rules give the layers of a segment different values,
the segment is split, and `stack` joins equal neighbours again.

The law of segments. Only the key `blocks` makes them, at any depth: `encoder/blocks/0-5/q` and
`decoder/blocks/0-2/q` are two stacks of one tree, and `experts/0/up` is a plain path whose key
happens to be a number. Under `blocks` either all keys are segments (`7`, `3-5`) that share no
layer, or none is. Blocks inside of a segment are an error: a leaf has at most one axis of layers.
So all functions here take whole trees and not the dict under `blocks`, except `segments` and
`depth`.

Rules. An ordered list `[(pattern, value), ...]`. A pattern is a regular expression that must match
the whole path; the first match wins. A leaf that no rule covers is an error, and so is a rule that
decides nothing, unless its pattern is `optional(...)` or the closing catch-all `.*`.

>>> params = {"embed": jnp.ones((5, 2)), "blocks": {"0-3": {"up": jnp.ones((4, 3, 2))}}}
>>> params, bits = match([("embed", 8), ("blocks/[01]/.*", 8), (".*", 4)], params)
>>> bits
{'embed': 8, 'blocks/0-1/up': 8, 'blocks/2-3/up': 4}
>>> list(flatten(stack(params)))
['embed', 'blocks/0-3/up']
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel.errors import InputError

type Leaf = Any  # a jax.Array or a compressed leaf
type Params = dict[str, Any]
type Rules = Sequence[tuple[str, Any]]
type Trains = Rules | Callable[[str], bool] | None  # which leaves train, see `partition`

BLOCKS = "blocks"
"""The key whose children are segments of layers."""

_DEEPEST = 100
_SEGMENT = re.compile(r"(\d+)(?:-(\d+))?")


class optional(str):
    """A rule's pattern that may match nothing: `(optional("head"), P("tensor", None))`."""

    __slots__ = ()


# -------------------------------------------------------------------------------------------- paths


def is_leaf(node: Any) -> bool:
    """Return whether a node of a parameter tree is a leaf: everything but a dict is."""
    return not isinstance(node, dict)


def flatten(params: Any) -> dict[str, Leaf]:
    """Return all leaves by path, segments in the order of depth and other keys in that of the dict.

    `unflatten` is its inverse.

    Raises:
      InputError: a dict under a key `blocks` breaks the law of segments (see above), or the tree
        contains a list, a tuple, None, a key that is not a string or has a `/`, an empty dict, or
        itself.
    """
    return dict(_walk(params, ()))


def unflatten(leaves: Mapping[str, Leaf]) -> Params:
    """Return the nested dict whose `flatten` is `leaves`."""
    root: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
            if is_leaf(node):
                raise InputError(
                    f"params: {path!r} given, though {key!r} in it is a leaf; allowed: a dict or "
                    f"a leaf"
                )
        if last in node:
            raise InputError(
                f"params: {path!r} given, though there is more below it; allowed: a dict or a leaf"
            )
        node[last] = leaf
    return root


def check(params: Any) -> None:
    """Refuse anything that is not a tree of weights, before it is used.

    JAX would end the process at a dict that contains itself.

    Raises:
      InputError: as for `flatten`, or a leaf that is not an array of real numbers, such as complex
        ones (the imaginary part would be lost) or texts.

    >>> check({"w": jnp.ones(3, jnp.complex64)})
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: params: 'w' has the dtype complex64; allowed: real numbers
    """
    for path, leaf in flatten(params).items():
        layer_shape(path, leaf)
        for part in jax.tree.leaves(leaf):
            kind = getattr(part, "dtype", type(part))
            real = jnp.issubdtype(kind, jnp.number) and not jnp.issubdtype(
                kind, jnp.complexfloating
            )
            if not (real or kind == jnp.bool_ or jnp.issubdtype(kind, jax.dtypes.prng_key)):
                raise InputError(
                    f"params: {path!r} has the dtype {jnp.dtype(kind).name}; allowed: real numbers"
                )


def map_leaves(fn: Callable[[str, Leaf], Leaf], params: Params) -> Params:
    """Replace every leaf of `params` by `fn(path, leaf)`."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(params).items()})


def _walk(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Leaf]]:
    if is_leaf(node):
        if type(node) in (list, tuple, type(None)):
            where = repr("/".join(keys)) if keys else "the whole"
            raise InputError(
                f"params: {where} is a {type(node).__name__}; allowed: dicts of dicts and arrays"
            )
        yield "/".join(keys), node
        return
    for key in node:
        if not isinstance(key, str) or "/" in key:
            raise InputError(
                f"params: {'/'.join(keys) or 'the whole'} has the key {key!r}; allowed: strings "
                "without '/'"
            )
    if len(keys) > _DEEPEST or (keys and not node):
        what = (
            f"is nested deeper than {_DEEPEST} levels, or contains itself"
            if node
            else "is an empty dict"
        )
        raise InputError(
            f"params: {'/'.join(keys[:4])!r} {what}; allowed: dicts of dicts and arrays"
        )
    for key in _segments_at(keys, node) or node:
        yield from _walk(node[key], (*keys, key))


# ----------------------------------------------------------------------------------------- segments


def span(key: str) -> range | None:
    """Return the layers of a segment's key, or None for any other key.

    `"3-5"` is `range(3, 6)`, `"7"` is `range(7, 8)`.
    """
    found = _SEGMENT.fullmatch(key)
    if not found:
        return None
    first = int(found[1])
    return range(first, int(found[2] or first) + 1)


def segment_key(layers: range) -> str:
    """Return the key of a segment, the inverse of `span`."""
    return f"{layers.start}" if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"


def is_stacked(path: str) -> bool:
    """Return whether the leaf at this path has a leading axis of layers."""
    keys = path.split("/")
    return (at := _segment_place(keys)) is not None and len(_span(keys[at])) > 1


def segments(node: Params) -> list[str]:
    """Return the segments in the dict under a key `blocks`, in the order of depth.

    Raises:
      InputError: a key is not a segment, or they do not cover 0, 1, 2, ... without gap or overlap.
    """
    keys = _segments_at((BLOCKS,), node)
    edges = [0, *(_span(key).stop for key in keys)]
    if not keys or any(_span(key).start != start for key, start in zip(keys, edges, strict=False)):
        raise InputError(
            f"segments: {keys or list(node)} must cover the layers from 0 on without gap or overlap"
        )
    return keys


def _segments_at(keys: tuple[str, ...], node: Params) -> list[str]:
    """Return the segments of the dict at a path by depth, none if it is a plain dict.

    This and `_segment_place` are the law of segments. A part of a tree (see `partition`) may lack
    some segments, which `segments` does not allow.
    """
    if keys[-1:] != (BLOCKS,) or all(span(key) is None for key in node):
        return []
    where = "/".join(keys)
    for key in node:
        layers = span(key)
        # no segment at all, an empty one (1-0), or of another form (3-3, 01)
        if not layers or segment_key(layers) != key:
            raise InputError(
                f"{where}: the key {key!r} is not a segment of layers, as its neighbours are; "
                "allowed: such as '7', '3-5'"
            )
    found = sorted(node, key=lambda key: _span(key).start)
    for one, following in itertools.pairwise(found):
        if _span(following).start < _span(one).stop:
            raise InputError(
                f"{where}: the segments {one!r} and {following!r} overlap; allowed: each layer once"
            )
    _segment_place([*keys, found[0]])
    return found


def _segment_place(keys: Sequence[str]) -> int | None:
    """Return which of a path's keys is the segment."""
    found = [i for i in range(1, len(keys)) if keys[i - 1] == BLOCKS and span(keys[i]) is not None]
    if len(found) > 1:
        raise InputError(
            f"{'/'.join(keys)}: blocks inside of blocks; allowed: one segment of layers in a path"
        )
    return found[0] if found else None


def depth(node: Params) -> int:
    """Return the number of layers in the dict under a key `blocks`."""
    return _span(segments(node)[-1]).stop


def layer_paths(path: str) -> list[str]:
    """Return the path of each layer that a leaf's path stands for.

    >>> layer_paths("blocks/0-2/attn/q")
    ['blocks/0/attn/q', 'blocks/1/attn/q', 'blocks/2/attn/q']
    """
    keys = path.split("/")
    if (at := _segment_place(keys)) is None:
        return [path]
    return ["/".join([*keys[:at], str(layer), *keys[at + 1 :]]) for layer in _span(keys[at])]


def layer_shape(path: str, leaf: Leaf) -> tuple[int, ...]:
    """Return the shape of one layer's leaf, without the leading axis of a stacked segment."""
    if not hasattr(leaf, "shape"):
        raise InputError(
            f"params: {path!r} is a {type(leaf).__name__}; allowed: arrays and compressed leaves"
        )
    return tuple(leaf.shape[1:] if is_stacked(path) else leaf.shape)


def layer_slice(node: Any, layers: range, part: range) -> Any:
    """Return the layers `part` of a segment with `layers`; a single layer has no leading axis."""
    start = part.start - layers.start
    stop = part.stop - layers.start
    if len(layers) == 1:
        return node
    if len(part) == 1:
        return jax.tree.map(lambda a: a[start], node)
    return node if len(part) == len(layers) else jax.tree.map(lambda a: a[start:stop], node)


def split(params: Params, values: Mapping[str, Any]) -> Params:
    """Split each segment where neighbouring layers have different values.

    Args:
      params: the tree.
      values: a value for every layer path (`blocks/7/attn/q`); compared by `==`.
    """

    def cut(node: Any, keys: tuple[str, ...]) -> Any:
        if is_leaf(node):
            return node
        if not (found := _segments_at(keys, node)):
            return {key: cut(child, (*keys, key)) for key, child in node.items()}
        out: Params = {}
        for key in found:
            layers = _span(key)
            by_leaf = [
                [values[layer] for layer in layer_paths(path)]
                for path, _ in _walk(node[key], (*keys, key))
            ]
            signature = [[of_layers[i] for of_layers in by_leaf] for i in range(len(layers))]
            starts = [i for i in range(len(layers)) if i == 0 or signature[i] != signature[i - 1]]
            for start, stop in itertools.pairwise([*starts, len(layers)]):
                out[segment_key(layers[start:stop])] = layer_slice(
                    node[key], layers, layers[start:stop]
                )
        return out

    return cut(params, ())


def unstack(params: Params) -> Params:
    """Every layer in a segment of its own, so that leaf paths are layer paths."""
    return split(params, {path: path for path in _all_layer_paths(params)})


def stack(params: Params) -> Params:
    """Join neighbouring segments whose layers are equal.

    Structure, static fields, shapes and dtypes must agree.
    """

    def join(node: Any, keys: tuple[str, ...]) -> Any:
        if is_leaf(node):
            return node
        if not (found := _segments_at(keys, node)):
            return {key: join(child, (*keys, key)) for key, child in node.items()}
        runs: list[list[str]] = []
        for key in found:
            if runs and _joins(runs[-1], key, node):
                runs[-1].append(key)
            else:
                runs.append([key])
        return {
            segment_key(range(_span(run[0]).start, _span(run[-1]).stop)): _join(
                [(_span(key), node[key]) for key in run]
            )
            for run in runs
        }

    # This checks inside of the segments too, which nothing else here does.
    flatten(params)
    return join(params, ())


def _join(parts: list[tuple[range, Any]]) -> Any:
    if len(parts) == 1:
        return parts[0][1]
    lifted = [
        jax.tree.map(lambda a: a[None], node) if len(layers) == 1 else node
        for layers, node in parts
    ]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *lifted)


def _joins(run: list[str], key: str, node: Params) -> bool:
    return _span(run[-1]).stop == _span(key).start and _signature(run[0], node) == _signature(
        key, node
    )


def _signature(key: str, node: Params) -> tuple[Any, ...]:
    """Return what must be equal for two layers to share a stack."""
    leaves, structure = jax.tree.flatten(node[key])
    lead = int(len(_span(key)) > 1)
    return structure, [(a.shape[lead:], a.dtype) for a in leaves]


def _span(key: str) -> range:
    layers = span(key)
    assert layers is not None, key
    return layers


def _all_layer_paths(params: Params) -> list[str]:
    return [layer for path in flatten(params) for layer in layer_paths(path)]


# -------------------------------------------------------------------------------------------- rules


def assign(rules: Rules, params: Params) -> dict[str, Any]:
    """Return the value that the first matching rule gives to each layer path.

    Raises:
      InputError: a leaf that no rule covers, or a rule that decides nothing and is neither
        `optional` nor a closing `.*`.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((pattern, re.compile(pattern), value))
        except re.error as error:
            raise InputError(
                f"rules: {str(pattern)!r} is not a regular expression: {error}"
            ) from None
    values: dict[str, Any] = {}
    winners: set[int] = set()
    for path in _all_layer_paths(params):
        for i, (_, regex, value) in enumerate(compiled):
            if regex.fullmatch(path):
                values[path] = value
                winners.add(i)
                break
        else:
            patterns = ", ".join(repr(str(pattern)) for pattern, _ in rules) or "none"
            raise InputError(f"rules: no rule covers the leaf {path!r}; rules: {patterns}")
    for i, (pattern, regex, _) in enumerate(compiled):
        closing = i + 1 == len(compiled) and pattern == ".*"
        if i in winners or closing or isinstance(pattern, optional):
            continue
        if any(regex.fullmatch(path) for path in values):
            raise InputError(
                f"rules: {str(pattern)!r} decides nothing: earlier rules match all of its leaves"
            )
        close = difflib.get_close_matches(
            re.sub(r"[\\^$()]|\.\*|\.\+", "", pattern), list(values), n=3, cutoff=0.0
        )
        raise InputError(f"rules: {str(pattern)!r} matches no leaf; nearest: {', '.join(close)}")
    return values


def match(rules: Rules, params: Params) -> tuple[Params, dict[str, Any]]:
    """Split the segments by the rules; return the tree and the value of each of its leaves by path.

    Raises:
      InputError: as for `assign`.
    """
    by_layer = assign(rules, params)
    params = split(params, by_layer)
    return params, {path: by_layer[layer_paths(path)[0]] for path in flatten(params)}


def partition(params: Params, rules: Trains = None) -> tuple[Params, Params]:
    """Split a tree into what trains and what is frozen; `combine` is the inverse.

    Args:
      params: the tree.
      rules: path -> bool (whether the leaf trains). Without rules every plain floating-point array
        trains, and no compressed or integer leaf. A function of layer paths, such as
        `axes.trainable(model.axes)`, can exclude some of these arrays.

    Returns:
      Two trees with disjoint paths. A segment is split between layers that differ.
    """
    if rules is None or callable(rules):
        among = rules or (lambda path: True)
        chosen = {
            path: _is_float_array(leaf) and among(layer_paths(path)[0])
            for path, leaf in flatten(params).items()
        }
    else:
        params, chosen = match(rules, params)
    leaves = flatten(params)
    trains = {path: leaf for path, leaf in leaves.items() if chosen[path]}
    frozen = {path: leaf for path, leaf in leaves.items() if not chosen[path]}
    return unflatten(trains), unflatten(frozen)


def combine(*parts: Params) -> Params:
    """Unite trees with disjoint paths, the inverse of `partition`."""
    out: dict[str, Leaf] = {}
    for part in parts:
        for path, leaf in flatten(part).items():
            if path in out:
                raise InputError(f"combine: the leaf {path!r} is in two of the trees")
            out[path] = leaf
    return unflatten(out)


def _is_float_array(leaf: Leaf) -> bool:
    return jax.tree.structure(leaf).num_nodes == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)


# -------------------------------------------------------------------------------------------- sizes


def nbytes(params: Any) -> int:
    """Return the bytes of all buffers of a tree or leaf, with packed codes, scales and masks."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))


def count(params: Params) -> int:
    """Return the number of weights that the leaves represent, compressed or not."""
    return sum(math.prod(leaf.shape) for leaf in flatten(params).values())


def cast(params: Params, dtype: Any) -> Params:
    """Cast plain floating-point leaves to a dtype; integer and compressed leaves do not change."""
    return map_leaves(lambda _, leaf: leaf.astype(dtype) if _is_float_array(leaf) else leaf, params)


def fingerprint(params: Params) -> str:
    """Return the SHA-256 of paths, static fields, dtypes, shapes and bytes of a tree.

    It does not depend on how layers are stacked.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(unstack(jax.device_get(params))).items()):
        arrays, structure = jax.tree.flatten(leaf)
        digest.update(f"{path} {structure}".encode())
        for array in arrays:
            digest.update(f" {array.dtype} {array.shape} ".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
