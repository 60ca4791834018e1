"""Plots: valid files, what must be in them, labels that keep clear of each other."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmodel.errors import InputError
from jaxmodel.report import plot

POINTS = {
    "f32": (538.1, 29.60),
    "bf16": (269.0, 29.63),
    "int8": (141.0, 30.5),
    "int8-weight": (141.0, 29.66),
    "int4": (86.0, 41.2),
    "sparse50-int8": (98.0, 472.0),
}
X = np.arange(50)
DRAW = {
    "curves": lambda fmt: plot.curves(
        {"loss $a_b$": (X, X), "b": ([1, 2], [3, 4])}, "step", "nats", "<t>", fmt
    ),
    "log curves": lambda fmt: plot.curves(
        {"a": (X, X - 3.0)}, "step", "nats", "t", fmt, logx=True, logy=True
    ),
    "bars": lambda fmt: plot.bars(
        {"f32": {"a": 1.0, "b": 2.0}, "int8": {"a": np.nan, "b": None}}, "MB", "t", fmt
    ),
    "scatter": lambda fmt: plot.scatter(POINTS, "MB", "perplexity", "t", fmt, logx=True, logy=True),
    "one point": lambda fmt: plot.scatter(
        {"f32": (1.0, 1.0)}, "MB", "perplexity", "t", fmt, logy=True
    ),
}


def words(svg: bytes) -> list[str]:
    return [
        "".join(node.itertext())
        for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]


@pytest.mark.parametrize("name", DRAW)
def test_png_and_svg(name):
    png = DRAW[name]("png")
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png == DRAW[name]("png")
    svg = DRAW[name]("svg")
    assert svg == DRAW[name]("svg"), "equal plots are equal bytes"
    assert "t" in words(svg) or "<t>" in words(svg)


def test_names_are_text_and_dollars_are_dollars():
    assert {"loss $a_b$", "b", "step", "nats", "<t>"} <= set(words(DRAW["curves"]("svg")))
    assert set(POINTS) <= set(words(DRAW["scatter"]("svg")))
    assert words(DRAW["bars"]("svg")).count("–") == 2


def test_a_point_off_the_axes_is_named_below():
    svg = plot.scatter(
        {"ok": (1, 1), "diverged": (2, float("inf")), "free": (0, 3)}, "MB", "ppl", logx=True
    )
    assert any("not shown: diverged (2, inf), free (0, 3)" in word for word in words(svg))


def test_labels_do_not_overlap_in_the_picture(monkeypatch):
    """Measured by the renderer on the finished figure, not by the placement's own arithmetic."""
    seen = {}
    label = plot._label

    def spy(ax, points):
        label(ax, points)
        renderer = ax.figure.canvas.get_renderer()
        seen.update({text.get_text(): text.get_window_extent(renderer) for text in ax.texts})
        seen["axes"] = ax.get_window_extent(renderer)

    monkeypatch.setattr(plot, "_label", spy)
    DRAW["scatter"]("png")
    axes = seen.pop("axes").padded(1)
    boxes = list(seen.values())
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(
        axes.containsx(box.x0) and axes.containsx(box.x1) and axes.containsy(box.y0)
        for box in boxes
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 560), st.floats(0, 320)), min_size=6, max_size=6), st.booleans()
)
def test_six_labels_find_free_places(anchors, clustered):
    points = np.array(anchors) * (0.05 if clustered else 1) + (250 if clustered else 0)
    points = np.clip(points, 0, [560, 320])
    sizes = np.array([[28, 14], [34, 14], [32, 14], [80, 14], [32, 14], [92, 14]], float)
    corners = plot.place_labels(points, sizes, (560, 320))
    ends = corners + sizes
    for i in range(6):
        for j in range(i):
            apart = (corners[i] >= ends[j]) | (corners[j] >= ends[i])
            assert apart.any(), f"labels {j} and {i} overlap"
    assert (corners >= -1e-9).all() and (ends <= np.array([560, 320]) + 1e-9).all()


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda: plot.curves({}, "x", "y"), "series: nothing"),
        (lambda: plot.curves({"a": ([1, 2], [1])}, "x", "y"), r"series: 'a' has x of shape \(2,\)"),
        (lambda: plot.bars({}, "x"), "groups: nothing"),
        (lambda: plot.bars({"a": {}}, "x"), "groups: nothing"),
        (lambda: plot.scatter({"a": (1, float("nan"))}, "x", "y"), "points: nothing"),
        (lambda: plot.curves({"a": ([1], [1])}, "x", "y", fmt="pdf"), "fmt: 'pdf'"),
    ],
)
def test_bad_input(draw, what):
    with pytest.raises(InputError, match=what):
        draw()


def test_matplotlib_is_lazy_and_untouched():
    program = (
        "import sys, jaxmodel.report as r; assert not {'matplotlib', 'rich'} & set(sys.modules)\n"
        "import matplotlib; before = dict(matplotlib.rcParams)\n"
        "r.plot.curves({'a': ([1, 2], [1, 2])}, 'x', 'y')\n"
        "assert dict(matplotlib.rcParams) == before and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_a_point_below_another_is_a_ring_around_it(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        plot,
        "_unhide",
        lambda ax, lines, points, kept=plot._unhide: (kept(ax, lines, points), drawn.append(lines)),
    )
    plot.scatter({"under": (100, 10), "over": (100.2, 10.01), "apart": (300, 40)}, "MB", "ppl")
    under, over, apart = drawn[0]
    assert (
        under.get_markerfacecolor() == "none" and under.get_markersize() > over.get_markersize() + 4
    )
    assert over.get_markersize() == apart.get_markersize() and apart.get_markerfacecolor() != "none"


def test_numbers_of_bars_have_the_digits_of_the_tables():
    svg = plot.bars(
        {"f32": {"speed": 9.6641}, "int8": {"speed": 632.94}, "int4": {"speed": 12345.6}},
        "tokens per second",
    )
    assert {"9.66", "633", "12,346"} <= set(words(svg))


def test_a_mark_has_its_name_and_a_long_axis_its_thousands():
    svg = plot.curves({"loss": ([1, 2000], [3, 4])}, "step", "loss", marks={"suggested": 700.0})
    assert {"suggested", "loss", "1,000"} <= set(words(svg))


@pytest.mark.parametrize("length", [5, 25, 60])
def test_a_legend_is_within_the_picture(monkeypatch, length):
    import matplotlib.figure

    seen = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, *args, **more: (seen.append(figure), save(figure, *args, **more)),
    )
    plot.curves({f"{i} {'n' * length}": ([1, 2], [i, 2]) for i in range(6)}, "x", "y", fmt="png")
    figure = seen[0]
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("fmt", ["svg", "png"])
def test_a_notebook_shows_a_picture(fmt):
    made = plot.curves({"a": (X, X)}, "step", "nats", fmt=fmt)
    assert isinstance(made, bytes) and len(repr(made)) < 40
    svg = made._repr_svg_()
    png = made._repr_png_()
    assert (svg is None, png is None) == (fmt == "png", fmt == "svg")
    if svg:
        assert "background:#ffffff" in svg and ElementTree.fromstring(svg).tag.endswith("svg")


def test_whole_numbers_have_whole_ticks():
    """There is no layer 0.2."""
    ticks = lambda x: words(plot.curves({"a": (x, [7, 9])}, "", ""))
    whole, parts = ticks([0, 1]), ticks([0.0, 1.0])
    assert {"0", "1"} <= set(whole) and not [tick for tick in whole if tick.startswith("0.")]
    assert "0.2" in parts
