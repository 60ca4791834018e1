"""Plots of plain numbers as bytes, in one style: SVG for a page, PNG for a file.

The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; lines also
differ in dash and points in shape. Figures are independent of pyplot, so nothing leaks into a
notebook's plots.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from jaxmodel.errors import InputError, require
from jaxmodel.report.table import rate

# `html.figure` gives these the page's own colours
INK, GRID, PAPER = (
    "#23272e",
    "#d9dde3",
    "#ffffff",
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and coloured
    "svg.hashsalt": "jaxmodel",  # equal plots are equal bytes
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
}


class Picture(bytes):
    """The bytes of an SVG or PNG file, which a notebook shows as a picture."""

    def _repr_svg_(self) -> str | None:
        if not self.endswith(b"</svg>\n"):
            return None
        paper = f'<svg style="background:{PAPER}" '  # the ink is dark, and so may the notebook be
        return self.decode().replace("<svg ", paper, 1)

    def _repr_png_(self) -> bytes | None:
        return bytes(self) if self.startswith(b"\x89PNG") else None

    def __repr__(self) -> str:
        return f"Picture({'PNG' if self.startswith(b'\x89PNG') else 'SVG'}, {len(self):,} bytes)"


def curves(
    series: Mapping[str, tuple[Any, Any]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    fmt: str = "svg",
    logx: bool = False,
    logy: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Picture:
    """Plot lines over a common axis, such as losses over steps.

    Args:
      series: name to (x, y), two equally long sequences; a y that is not finite leaves a gap.
      xlabel: label of the x axis, with its unit.
      ylabel: label of the y axis, with its unit.
      title: the title above the plot.
      fmt: svg or png.
      logx: whether the x axis is logarithmic.
      logy: whether the y axis is logarithmic.
      marks: name to a position on the x axis, marked by a thin line.

    Raises:
      InputError: there is nothing to draw, or x and y differ in length.
    """
    with _axes(title, xlabel, ylabel, fmt, 3.8) as (ax, out):
        for index, (name, (x, y)) in enumerate(_some(series, "series").items()):
            if np.ndim(x) != 1 or np.shape(x) != np.shape(y):
                shapes = f"x of shape {np.shape(x)} and y of shape {np.shape(y)}"
                raise InputError(
                    f"series: {name!r} has {shapes}; allowed: two sequences of equal length"
                )
            look = {"color": COLOURS[index % 6], "linestyle": _DASHES[index % 4], "markersize": 5}
            marker = _MARKERS[index % 6] if len(x) <= 25 else None
            ax.plot(np.asarray(x, float), np.asarray(y, float), label=name, marker=marker, **look)
        for name, x in (marks or {}).items():
            ax.axvline(x, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=name)
        _scale(ax, logx, logy)
        if not logx and all(np.asarray(x).dtype.kind in "iu" for x, _ in series.values()):
            ax.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 0.2
        if len(names := [*series, *(marks or {})]) > 1:
            _legend(ax, names, 3)
    return Picture(out.getvalue())


def bars(
    groups: Mapping[str, Mapping[str, Any]], xlabel: str, title: str = "", fmt: str = "svg"
) -> Picture:
    """Plot horizontal bars with their values, in groups.

    A value that is missing or not finite is a dash.

    Args:
      groups: group to series to value, such as version to {"prefill": 1124.0, "decode": 59.9}.
      xlabel: label of the x axis, with its unit.
      title: the title above the plot.
      fmt: svg or png.

    Raises:
      InputError: there is nothing to draw.
    """
    names = list(
        dict.fromkeys(name for group in _some(groups, "groups").values() for name in group)
    )
    height = 0.8 / len(_some(names, "groups"))
    inches = 1.1 + len(groups) * max(0.36, 0.24 * len(names)) + 0.3 * (len(names) > 1)
    with _axes(title, xlabel, "", fmt, inches) as (ax, out):
        for index, name in enumerate(names):
            # None becomes NaN
            values = np.array([group.get(name) for group in groups.values()], float)
            where = np.arange(len(groups)) + (index - (len(names) - 1) / 2) * height
            lengths = np.where(np.isfinite(values), values, 0)
            drawn = ax.barh(where, lengths, height * 0.9, label=name, color=COLOURS[index % 6])
            labels = [rate(value) if math.isfinite(value) else "–" for value in values]
            ax.bar_label(drawn, labels, padding=4, fontsize=9)
        ax.set_yticks(range(len(groups)), list(groups))
        ax.invert_yaxis()  # the first group on top
        ax.margins(x=0.14)
        ax.xaxis.set_major_formatter(lambda value, _: _tick(value))
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        if len(names) > 1:
            _legend(ax, names, 4)
    return Picture(out.getvalue())


def scatter(
    points: Mapping[str, tuple[Any, Any]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    fmt: str = "svg",
    logx: bool = False,
    logy: bool = False,
) -> Picture:
    """Plot labelled points, such as size against perplexity.

    Labels keep clear of each other and of the points.

    Args:
      points: label to (x, y). A point that the axes cannot show (not finite, or not positive on a
        logarithmic axis) is named below the plot instead.
      xlabel: label of the x axis, with its unit.
      ylabel: label of the y axis, with its unit.
      title: the title above the plot.
      fmt: svg or png.
      logx: whether the x axis is logarithmic.
      logy: whether the y axis is logarithmic.

    Raises:
      InputError: no point can be drawn.
    """
    inside = {
        name: (float(x), float(y))
        for name, (x, y) in points.items()
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not logx) and (y > 0 or not logy)
    }
    left_out = ", ".join(
        f"{name} ({x:.4g}, {y:.4g})" for name, (x, y) in points.items() if name not in inside
    )
    with _axes(
        title, xlabel + (f"\nnot shown: {left_out}" if left_out else ""), ylabel, fmt, 4.2
    ) as (ax, out):
        look = {"linestyle": "none", "mec": PAPER, "mew": 0.8, "ms": 8.5}
        drawn = [
            ax.plot(x, y, marker=_MARKERS[index % 6], color=COLOURS[index % 6], **look)[0]
            for index, (x, y) in enumerate(_some(inside, "points").values())
        ]
        ax.margins(0.12)
        _scale(ax, logx, logy)
        _label(ax, inside)
        _unhide(ax, drawn, np.array(list(inside.values())))
    return Picture(out.getvalue())


def place_labels(
    anchors: np.ndarray, sizes: np.ndarray, bounds: tuple[Any, Any], clear: float = 7.5
) -> np.ndarray:
    """Place labels so that they cover neither each other nor a point.

    Each in turn takes the nearest free place.

    Args:
      anchors: the points, [N, 2], pixels.
      sizes: width and height of each label, [N, 2], pixels.
      bounds: width and height of the area that holds them all.
      clear: radius around each point that stays free.

    Returns:
      The lower left corner of each label, [N, 2], in pixels. Where no place is free, the one that
      covers least.
    """
    taken = [np.concatenate([point - clear, point + clear]) for point in anchors]
    corners = np.zeros((len(anchors), 2))
    for index, (point, size) in enumerate(zip(anchors, sizes, strict=True)):
        best = (math.inf, np.zeros(4))
        for radius, (dx, dy) in itertools.product(
            (0, 6, 14, 24, 36, 50, 70, 95, 125, 160), _DIRECTIONS
        ):
            centre = point + np.array([dx, dy]) * (size / 2 + clear + 1 + radius)
            centre = np.clip(centre, size / 2, np.maximum(np.array(bounds) - size / 2, size / 2))
            box = np.concatenate([centre - size / 2, centre + size / 2])
            covered = sum(_overlap(box, other) for other in taken)
            if covered < best[0]:
                best = (covered, box)
            if covered == 0:
                break
        taken.append(best[1])
        corners[index] = best[1][:2]
    return corners


_DIRECTIONS = [(1, 0), (0, 1), (0, -1), (-1, 0), *itertools.product((1, -1, 0.5, -0.5), (1, -1))]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)))


def _label(ax: Any, points: Mapping[str, tuple[Any, Any]]) -> None:
    figure = ax.figure
    figure.draw_without_rendering()  # computes the layout, so that positions in pixels are final
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    pixel = 72 / figure.dpi  # in points, which do not depend on the file's resolution
    look = {"textcoords": "offset points", "fontsize": 9, "va": "bottom"}
    texts = [ax.annotate(name, at, (0, 0), **look) for name, at in points.items()]
    sizes = np.array([text.get_window_extent(renderer).size for text in texts]) + 2
    area = ax.get_window_extent(renderer)
    anchors = ax.transData.transform(np.array(list(points.values())))
    corners = place_labels(anchors - area.p0, sizes, (area.width, area.height)) + area.p0
    for text, corner, size, anchor in zip(texts, corners, sizes, anchors, strict=True):
        text.set_position(tuple((corner + 1 - anchor) * pixel))
        nearest = np.clip(anchor, corner, corner + size)
        # too far from its point to be associated with it: connect them by a line
        if np.linalg.norm(nearest - anchor) > 16:
            ends = ax.transData.inverted().transform([nearest, anchor])
            ax.plot(*ends.T, color=INK, linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _unhide(ax: Any, drawn: list[Any], points: np.ndarray) -> None:
    """Draw a point that others cover as a ring around them."""
    places = ax.transData.transform(points) * 72 / ax.figure.dpi
    for index, line in enumerate(drawn):
        above = int(np.sum(np.linalg.norm(places[index + 1 :] - places[index], axis=1) < 6.5))
        if above:
            line.set(
                markerfacecolor="none",
                markeredgecolor=line.get_color(),
                mew=1.6,
                markersize=8.5 + 5.5 * above,
            )


@contextmanager
def _axes(
    title: str, xlabel: str, ylabel: str, fmt: str, height: float
) -> Iterator[tuple[Any, io.BytesIO]]:
    """Make empty axes in the house style.

    After the block, the buffer holds what was drawn.
    """
    if fmt not in ("svg", "png"):
        raise InputError(f"fmt: {fmt!r} is not known; allowed: svg, png")
    matplotlib = require("matplotlib", "notebook")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, height), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        yield ax, out
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "linear" and max(map(abs, axis.get_view_interval())) >= 1000:
                axis.set_major_formatter(lambda value, _: _tick(value))
        if fmt == "png":
            figure.savefig(out, format="png", dpi=200, facecolor=PAPER)
        else:
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)


def _legend(ax: Any, names: list[str], most: int) -> None:
    """Put the legend below, in as many columns as fit, at most `most`."""
    fitting = 80 // (max(map(len, names)) + 7)  # letters across, and those of a line's sample
    ax.figure.legend(loc="outside lower center", ncols=max(1, min(most, len(names), fitting)))


def _scale(ax: Any, logx: bool, logy: bool) -> None:
    for log, name, axis in ((logx, "x", ax.xaxis), (logy, "y", ax.yaxis)):
        if log:
            ax.set(**{f"{name}scale": "log"})
            _log_ticks(axis)


def _log_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < 0.7:  # no power of ten inside, perhaps not even a 2 or a 5
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _tick(value))


def _tick(value: Any, digits: int = 6) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.{digits}g}"


def _some(things: Any, argument: str) -> Any:
    if not things:
        raise InputError(
            f"{argument}: nothing to draw; allowed: at least one entry with finite numbers"
        )
    return things
