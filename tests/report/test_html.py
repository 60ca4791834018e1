"""The page: self-contained, escaped, and strict about foreign drawings."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from jaxmodel.errors import InputError
from jaxmodel.report import Column, html, plot

EVIL = "<script>alert('x')</script>&\""


class Reader(HTMLParser):
    """Reads a page as a browser would: the tags, the text, and whether every tag is closed in order."""

    void = frozenset(["meta", "path", "use", "rect"])

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.words, self.attrs = [], [], "", []
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


def whole_page() -> str:
    drawing = plot.scatter({EVIL: (1, 2), "--><script>": (2, 3)}, EVIL, "y", EVIL)
    return html.page(
        EVIL,
        [
            html.heading(EVIL),
            html.heading("small", 3),
            html.text(EVIL + "\nnext line"),
            html.table([{"a": EVIL, "b": 2.5}], [Column("a", EVIL), Column("b", "two\nlines")], EVIL),
            html.figure(drawing, EVIL),
            html.code(EVIL),
            html.key_value({EVIL: EVIL, "mesh": {"tensor": 2, "axes": ("a", 1)}, "none": None}),
        ],
    )


def test_everything_is_escaped_and_closed():
    page = Reader(whole_page())
    assert page.open == [] and "script" not in page.tags
    assert page.words.count(EVIL) == 14
    assert {"title", "h1", "h2", "h3", "table", "caption", "svg", "figcaption", "pre", "dl"} <= set(page.tags)
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
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><!--><script>x</script>--><path d="M0 0"/></svg>'
    page = html.figure(svg, "c").html
    assert "script" not in page and '<path d="M0 0"' in page and 'viewBox="0 0 9 9"' in page


def test_level():
    with pytest.raises(InputError, match="level: 1"):
        html.heading("x", 1)
