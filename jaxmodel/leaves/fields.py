"""The static fields of a tree's compressed leaves, as JSON stored beside its arrays.

A checkpoint of arrays (orbax) does not hold static fields: restored into a tree that says 2 bits
where 4 were stored, the same bytes silently become other weights. So write
`json.dumps(static_fields(params))` beside the checkpoint, and call `check_fields` on the tree that
it is restored into.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxmodel import tree
from jaxmodel.errors import InputError, nearest
from jaxmodel.leaves.leaf import to_tensors

FORMAT = 1


def static_fields(params: tree.Params) -> dict[str, Any]:
    """Return what must be stored as JSON beside the arrays of a tree.

    Args:
      params: a tree of arrays or of shape structs, stacked in any way.

    Returns:
      A dict with `format`; `leaves`, the fields of each compressed leaf by layer path, as
      `to_tensors` returns them; and `leaves_sha256`, their digest. Tuples are lists, as JSON reads
      them back.
    """
    fields = {path: one for path, one in _fields(params).items() if one is not None}
    return {"format": FORMAT, "leaves": fields, "leaves_sha256": digest(fields)}


def check_fields(params: tree.Params, stored: Mapping[str, Any]) -> None:
    """Check that the fields in `stored` belong to the leaves of `params`.

    Args:
      params: a tree of arrays or of shape structs; it may be stacked in another way than the stored
        one.
      stored: what `static_fields` returned, read back from JSON.

    Raises:
      InputError: `stored` has another format, was changed since, or belongs to other leaves.
    """
    if stored.get("format") != FORMAT:
        raise InputError(
            f"fields: format {stored.get('format')!r} is not supported; allowed: {FORMAT}"
        )
    saved = stored.get("leaves")
    if not isinstance(saved, dict) or digest(saved) != stored.get("leaves_sha256"):
        raise InputError(
            "fields: the static fields of the leaves have changed since they were written "
            "(leaves_sha256)"
        )
    here = _fields(params)
    for path in [*here, *saved]:
        if path not in here:
            close = ", ".join(nearest(path, here)) or "none"
            raise InputError(
                f"fields: the compressed leaf {path!r} was stored, but the tree lacks it; nearest: "
                f"{close}"
            )
        if saved.get(path) != here[path]:
            raise InputError(
                f"fields: {path!r} was stored as {_words(saved.get(path))}; the tree has "
                f"{_words(here[path])} there"
            )


def digest(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the fields as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _fields(params: tree.Params) -> dict[str, Any]:
    """Return the fields of all leaves by layer path, None for a plain array."""
    tree.check(params)
    found = {
        layer: to_tensors(leaf)[1]
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
    }
    return json.loads(json.dumps(found))


def _words(fields: Mapping[str, Any] | None) -> str:
    return "a plain array" if fields is None else json.dumps(fields)
