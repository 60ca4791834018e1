"""The contents of a model: its leaves by path, with shapes, bytes and sharding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxmodel import report, tree
from jaxmodel.errors import InputError
from jaxmodel.models.model import Model
from jaxmodel.report.table import count, size


def summary(model: Model, params: tree.Params | None = None) -> list[dict[str, Any]]:
    """Return a row for each leaf; the layers of a segment share one.

    Args:
      model: any model.
      params: its weights, compressed or not, or their shapes; None for the shapes of `init`.

    Returns:
      Rows `{"path", "layers", "shape", "kind", "parameters", "bytes", "sharding"}`. The shape is
      that of one layer; parameters and bytes are those of all layers. `sharding` has the mesh axes
      of each axis of the shape (None if it is not split); it is None if the model's rules do not
      cover the leaf (a fused one).

    >>> from jaxmodel.models import gpt2
    >>> rows = summary(gpt2.model(gpt2.SIZES["tiny"]))
    >>> row = next(row for row in rows if row["path"] == "blocks/0-2/mlp/up")
    >>> row["shape"], row["layers"], row["parameters"], row["bytes"], row["sharding"]
    ([128, 32], 3, 12288, 49152, ['tensor', 'fsdp'])
    """
    whole: tree.Params = jax.eval_shape(model.init, jax.random.key(0)) if params is None else params
    tree.check(whole)
    try:
        specs = tree.assign(model.rules, whole)
    except InputError:
        specs = {}
    return report.Rows(
        (_row(path, leaf, specs) for path, leaf in tree.flatten(whole).items()), columns()
    )


def columns() -> list[report.Column]:
    """Return the columns of a table of these rows."""
    return [
        report.Column("path"),
        report.Column("layers"),
        report.Column("shape", "shape of one", shape_text, "left"),
        report.Column("kind"),
        report.Column("parameters", format=count),
        report.Column("bytes", "size", size),
        report.Column("sharding", "mesh axes", sharding_text, "left"),
    ]


def outline(model: Model, params: tree.Params) -> dict[str, Any]:
    """Return the tree with a line of text in place of each leaf, for a notebook.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> outline(model, jax.eval_shape(model.init, jax.random.key(0)))["embed"]
    '256 x 32 float32, 32.8 kB, tensor fsdp'
    """
    lines = {}
    for row in summary(model, params):
        times = f"{row['layers']} layers of " if row["layers"] > 1 else ""
        lines[row["path"]] = (
            f"{times}{shape_text(row['shape'])} {row['kind']}, {size(row['bytes'])}, "
            f"{sharding_text(row['sharding'])}"
        )
    return tree.unflatten(lines)


def shape_text(shape: list[int]) -> str:
    """Format `[4, 3]` as `4 x 3`."""
    return " x ".join(map(str, shape)) or "scalar"


def sharding_text(sharding: list[Any] | None) -> str:
    """Format the sharding of a row of `summary`.

    There is one word for each axis of the shape, `-` if it is not split.

    >>> sharding_text(["tensor", None, ["data", "fsdp"]])
    'tensor - data+fsdp'
    >>> sharding_text([None]), sharding_text(None)
    ('everywhere', 'no rule')
    """
    if sharding is None:
        return "no rule"
    if not any(sharding):
        return "everywhere"
    return " ".join("+".join(axes) if isinstance(axes, list) else axes or "-" for axes in sharding)


def _row(path: str, leaf: Any, specs: dict[str, Any]) -> dict[str, Any]:
    layers = tree.layer_paths(path)
    shape = tree.layer_shape(path, leaf)
    found = {specs.get(layer) for layer in layers}
    # rules that differ within a segment would split it before they place it
    spec = found.pop() if len(found) == 1 else None
    return {
        "path": path,
        "layers": len(layers),
        "shape": list(shape),
        "kind": _kind(leaf),
        "parameters": math.prod(leaf.shape),
        "bytes": tree.nbytes(leaf),
        "sharding": None if spec is None else _axes(spec, len(shape)),
    }


def _axes(spec: PartitionSpec, ndim: int) -> list[Any]:
    whole = [*spec, *[None] * (ndim - len(spec))]
    return [list(axes) if isinstance(axes, tuple) else axes for axes in whole]


def _kind(leaf: Any) -> str:
    """Return the dtype of an array, or the class of a compressed leaf.

    The class comes with the static fields that differ from the default, or the bits, and with what
    it is made on.
    """
    if not dataclasses.is_dataclass(leaf):
        return str(leaf.dtype)
    static = {
        f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.metadata.get("static")
    }
    shown = [f"{name}={value}" for name, value in static.items() if value and name != "pad"]
    said = f"{type(leaf).__name__}({', '.join(shown)})"
    base = getattr(leaf, "base", None)
    return said if base is None else f"{said} of {_kind(base)}"
