"""The page: self-contained, escaped, and strict about foreign drawings."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from jaxmodel.errors import InputError
from jaxmodel.report import Column, html, plot

EVIL = "<script>alert('x')</script>&\""


class Reader(HTMLParser):
    """Reads a page as a browser would: the tags, the text, and whether every tag is closed in
    order.
    """

    void = frozenset(["meta", "path", "use", "rect"])

    def __init__(self, page: str):
        super().__init__()
        self.open = []
        self.tags = []
        self.words = ""
        self.attrs = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


CONFIG = {
    "verb": "train",
    "steps": 9,
    "seed": 0,
    EVIL: EVIL,
    "resolved": {"model": {"width": 8}, "rules": [["a", "b"], ["c", ""]]},
}
VERSIONS = {
    "python": "3.12",
    "devices": {"platform": "cpu", "count": 1},
    "cpu": {"model": EVIL, "flags": [], "count": 2},
}


def whole_page() -> str:
    drawing = plot.scatter({EVIL: (1, 2), "--><script>": (2, 3)}, EVIL, "y", EVIL)
    return html.page(
        EVIL,
        [
            html.heading(EVIL),
            html.heading("small", 3),
            html.text(EVIL + "\nnext line"),
            html.table(
                [{"a": EVIL, "b": 2.5}], [Column("a", EVIL), Column("b", "two\nlines")], EVIL
            ),
            html.figure(drawing, EVIL),
            html.code(EVIL),
            html.key_value({EVIL: EVIL, "mesh": {"tensor": 2, "axes": ("a", 1)}, "none": None}),
            html.table(
                [{f"k{i}": i + 0.5 for i in range(6)}],
                [Column(f"k{i}", f"{i}\n{EVIL}") for i in range(6)],
            ),
            html.details(EVIL, [html.text(EVIL)]),
            html.options(CONFIG, {"steps": 200, "seed": 0}),
            html.ran_on(VERSIONS),
        ],
    )


def test_everything_is_escaped_and_closed():
    page = Reader(whole_page())
    assert page.open == [] and "script" not in page.tags
    assert page.words.count(EVIL) == 26
    assert {"title", "h1", "h2", "h3", "table", "svg", "figcaption", "pre", "dl"} <= set(page.tags)
    assert all(word in page.words for word in ("mesh.tensor", "mesh.axes", "a, 1", "–", "2.500"))


def test_nothing_is_loaded_from_elsewhere():
    page = whole_page()
    assert not re.search(r"https?:|@import|url\((?!#)|<link|<iframe|<img", page)
    links = [value for name, value in Reader(page).attrs if name in ("src", "href", "xlink:href")]
    assert links and all(value.startswith("#") for value in links)


def test_light_dark_and_phone():
    page = whole_page()
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert "var(--ink)" in drawing and plot.INK not in drawing and plot.GRID not in drawing


def test_comments_are_dropped_and_plain_shapes_stay():
    """A browser ends `<!-->` at once, an XML reader does not: what follows must not come alive."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 '
        '9"><!--><script>x</script>--><path d="M0 0"/></svg>'
    )
    page = html.figure(svg, "c").html
    assert "script" not in page and '<path d="M0 0"' in page and 'viewBox="0 0 9 9"' in page


def test_level():
    with pytest.raises(InputError, match="level: 1"):
        html.heading("x", 1)


def test_every_table_scrolls_and_a_wide_one_folds():
    page = whole_page()
    tables = page.count("<table>")
    assert tables == len(re.findall(r'<div class="wide(?: fold)?"><table>', page)) >= 3
    wide = re.findall(r'<div class="wide fold">.*?</div>', page, re.DOTALL)
    assert len(wide) == 1, "of more than four columns"
    cells = re.findall(r"<td[^>]*>", wide[0])
    assert len(cells) == 6 and all('data-title="' in cell for cell in cells), (
        "each cell says what it is, once there is no head"
    )


def test_options_are_those_that_differ_and_the_rest_is_folded():
    page = html.options(CONFIG, {"steps": 200, "seed": 0}).html
    seen = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert (
        "steps" in seen
        and "200" in seen
        and "seed" not in seen
        and "resolved" not in seen
        and "verb" not in page
    )
    assert page.count("<details>") == 2 and "model.width" in page and "a, b; c, –" in page
    assert "have their defaults" in html.options({"verb": "x", "seed": 0}, {"seed": 0}).html


def test_numbers_line_up():
    """Behind the last digit of a shorter one there is room for the point and the digits that it
    lacks.
    """
    made = html.table([{"a": 375}, {"a": 9.664}], [Column("a")]).html
    assert "375\u2008\u2007\u2007\u2007<" in made and "9.664<" in made
