"""What each layer of a model costs when it alone is compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import report, tree
from jaxmodel.errors import InputError
from jaxmodel.evaluate.perplexity import bootstrap, token_nll
from jaxmodel.leaves import Compressed, decode
from jaxmodel.models import Model
from jaxmodel.progress import bar
from jaxmodel.report import plot

COLUMNS = (
    report.Column("layer"),
    report.Column("version"),
    report.Column("nll_change", "change of\nthe loss", "{:+.5f}".format),
    report.Column("nll_change_interval", "95 %", lambda pair: f"{pair[0]:+.5f} to {pair[1]:+.5f}"),
)
"""The columns of a table of sensitivities."""


def sensitivity(
    model: Model,
    params: tree.Params,
    versions: Mapping[str, Callable[[], tree.Params]],
    windows: np.ndarray,
    *,
    seed: int = 0,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the loss when one layer has the weights of a compressed model, and the others not.

    What is measured are the changed weights: that a compressed layer may also round its input when
    it runs is left out.

    Args:
      model: a decoder.
      params: its parameters.
      versions: name, such as "4 bits" -> a function that makes the compressed parameters, called
        when it is their turn.
      windows: tokens `[N, T]` to score (see `evaluate.perplexity`).
      seed: of the bootstrap intervals.
      on_row: called with each row as soon as it is complete.

    Returns:
      A row for each version and layer: `version`, `layer` (`blocks/3`, or the path of a leaf that
      stands outside of the layers), `nll_change` (nats a token) and `nll_change_interval`.

    Raises:
      InputError: no decoder, windows that cannot be scored, or a version in which nothing changed.

    >>> from jaxmodel.compress import apply
    >>> from jaxmodel.models import llama
    >>> model = llama.model(llama.SIZES["tiny"])
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> small = lambda: apply([("blocks/.*/(up|down)", "rtn(2)"), (".*", "")], params)[0]
    >>> rows = sensitivity(model, params, {"2 bits": small}, np.arange(32).reshape(2, 16))
    >>> [row["layer"] for row in rows]
    ['blocks/0', 'blocks/1', 'blocks/2']
    """
    if not model.continues:
        raise InputError(
            f"model: {model.family or 'it'} does not continue texts; allowed: a decoder"
        )
    plain = tree.map_leaves(
        lambda _, leaf: decode(leaf) if isinstance(leaf, Compressed) else leaf, params
    )
    base = token_nll(model, plain, windows)
    rows: list[dict[str, Any]] = report.Rows((), COLUMNS)
    for name, make in versions.items():
        after = make()
        changed = _changed(plain, after)
        if not changed:
            raise InputError(f"versions: {name!r} changes no leaf; allowed: a recipe that does")
        with bar(len(changed), name, unit="layer") as shown:
            for layer, paths in changed.items():
                change = token_nll(model, _with(plain, after, paths), windows) - base
                row = {
                    "version": name,
                    "layer": layer,
                    "nll_change": float(np.mean(change, dtype=np.float64)),
                    "nll_change_interval": list(bootstrap(change, seed=seed)),
                }
                rows.append(row)
                shown.advance(1, done=layer)
                if on_row is not None:
                    on_row(row)
    return rows


def draw(rows: list[dict[str, Any]], fmt: str = "svg") -> plot.Picture:
    """Plot the rows of `sensitivity`: the change of the loss over the layers, a line a version.

    Args:
      rows: as `sensitivity` returns them.
      fmt: svg or png.

    Raises:
      InputError: no rows.
    """
    names = list(dict.fromkeys(row["layer"] for row in rows))
    layers = [name for name in names if name.rpartition("/")[2].isdigit()]
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row["layer"] in layers:
            x, y = lines.setdefault(row["version"], ([], []))
            x.append(int(row["layer"].rpartition("/")[2]))
            y.append(row["nll_change"])
    title = "The loss that each layer costs"
    if lines:
        return plot.curves(lines, "layer", "change of the loss, nats", title, fmt)
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["layer"], {})[row["version"]] = row["nll_change"]
    return plot.bars(groups, "change of the loss, nats", title, fmt)


type Place = tuple[str, int | None]
"""The path of a leaf, and the place of a layer in it; None where it is the leaf of one layer."""


def _places(params: tree.Params) -> dict[str, Place]:
    """Return where each layer's leaf is."""
    return {
        layer: (path, i if tree.is_stacked(path) else None)
        for path in tree.flatten(params)
        for i, layer in enumerate(tree.layer_paths(path))
    }


def _slice(leaves: Mapping[str, Any], place: Place) -> jax.Array:
    """Return the plain weight of one layer's leaf."""
    path, i = place
    leaf = leaves[path]
    leaf = leaf if i is None else jax.tree.map(lambda a: a[i], leaf)
    return decode(leaf) if isinstance(leaf, Compressed) else leaf


def _changed(plain: tree.Params, after: tree.Params) -> dict[str, list[str]]:
    """Return layer -> the paths of its leaves that differ."""
    was = tree.flatten(plain)
    now = tree.flatten(after)
    old = _places(plain)
    found: dict[str, list[str]] = {}
    for path, place in _places(after).items():
        new = _slice(now, place).astype(was[old[path][0]].dtype)
        if jnp.array_equal(_slice(was, old[path]), new):
            continue
        keys = path.split("/")
        at = next((n for n, key in enumerate(keys) if key.isdigit()), None)
        found.setdefault(path if at is None else "/".join(keys[: at + 1]), []).append(path)
    return found


def _with(plain: tree.Params, after: tree.Params, paths: list[str]) -> tree.Params:
    """Return plain parameters with some leaves of compressed ones, in the same stacking."""
    leaves = tree.flatten(plain)
    now = tree.flatten(after)
    old = _places(plain)
    new = _places(after)
    for layer in paths:
        path, i = old[layer]
        value = _slice(now, new[layer]).astype(leaves[path].dtype)
        leaves[path] = value if i is None else leaves[path].at[i].set(value)
    return tree.unflatten(leaves)
