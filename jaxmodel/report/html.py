"""A report as one self-contained HTML file.

It loads nothing from elsewhere, follows the reader's light or dark mode, and fits a phone.

>>> columns = [Column("name"), Column("nll")]
>>> cost = table([{"name": "int8", "nll": 3.389}], columns, caption="One row for each version.")
>>> page("SmolLM2, compressed", [text("How much worse?"), cost]).startswith("<!doctype html>")
True
"""

from __future__ import annotations

import base64
import html as markup
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from jaxmodel.errors import InputError, printable
from jaxmodel.report import plot
from jaxmodel.report.json_out import to_plain
from jaxmodel.report.run import processor
from jaxmodel.report.table import Column, Row, aligned, text as text_of

_PAGE = """
:root{color-scheme:light dark;
--ink:#23272e;--dim:#5c6570;--line:#d9dde3;--paper:#fff;--tint:#f4f6f8}
@media(prefers-color-scheme:dark){:root{
--ink:#e4e7eb;--dim:#a3adb8;--line:#3d444d;--paper:#15181c;--tint:#1f242a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:58rem;padding:1.5rem 1rem 4rem;
background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem}h3{font-size:1.05rem;margin:1.6rem 0 .4rem}
p{max-width:44rem;white-space:pre-line}
"""
_PARTS = """
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}
figcaption{color:var(--dim);font-size:.9rem;padding:.3rem 0}
th,td{padding:.35rem .8rem .35rem 0;text-align:left;border-bottom:1px solid var(--line);
vertical-align:top}
th{color:var(--dim);font-weight:600;vertical-align:bottom;white-space:pre-line}
.r{text-align:right;font-variant-numeric:tabular-nums}td.r,td:first-child{white-space:nowrap}
figure{margin:1.2rem 0}figure svg{display:block;width:100%;max-width:44rem;height:auto}
svg text{font-family:inherit}
pre{background:var(--tint);padding:.8rem 1rem;border-radius:.4rem;white-space:pre-wrap;
font:.86rem/1.5 ui-monospace,monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;font-size:.95rem}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
details{margin:1rem 0}summary{cursor:pointer;color:var(--dim)}
@media(max-width:54rem){table{font-size:.8rem}th,td{padding-right:.5rem}}
@media(max-width:40rem){dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}
.fold table,.fold tbody{display:block}.fold thead{display:none}
.fold tr{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.2rem,1fr));padding:.6rem 0;
border-bottom:1px solid var(--line)}
.fold td,.fold td.r{border:0;padding:.15rem .8rem .15rem 0;text-align:left;white-space:normal;
font-size:.92rem;overflow-wrap:anywhere}
.fold td::before{content:attr(data-title);display:block;color:var(--dim);font-size:.75rem}
.fold td:first-child{grid-column:1/-1;font-weight:600}
.fold td:first-child::before{content:attr(data-title) "\\2002";display:inline;font-weight:400}}
"""
_AROUND = """
--ink:currentColor;--dim:color-mix(in srgb,currentColor 65%,transparent);
--line:#8884;--paper:transparent;--tint:#8882;
h3{font-size:1.05rem;margin:.4rem 0}table{margin:0}dl{margin:.2rem 0}
"""
# the most columns that a table may have on a phone; the rows of a wider one become paragraphs
_FEW = 4
_SVG = "{http://www.w3.org/2000/svg}"


def escape(text: str) -> str:
    """Escape text for a page: no markup, no control characters."""
    return markup.escape(printable(text))


@dataclass(frozen=True)
class Section:
    """A piece of a page, as HTML that is already safe; the functions of this file make it."""

    html: str


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the whole page as HTML.

    Args:
      title: the title, shown at the top and in the browser's tab.
      sections: the results of `heading`, `text`, `table`, `figure`, `code` and `key_value`, in
        order.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    )
    body = "\n".join(section.html for section in sections)
    name = escape(title)
    start = (
        f"<!doctype html>\n<html "
        f'lang="en"><head>{head}<title>{name}</title><style>{_PAGE}{_PARTS}</style></head>'
    )
    return f"{start}\n<body><h1>{name}</h1>\n{body}\n</body></html>\n"


def fragment(sections: Sequence[Section]) -> str:
    """Return HTML for a notebook's cell, in the colours of its surroundings."""
    style = f"<style>.jaxmodel{{{_AROUND}{_PARTS}}}</style>"
    return f'<div class="jaxmodel">{style}{"".join(section.html for section in sections)}</div>'


def heading(words: str, level: int = 2) -> Section:
    """Make a heading of level 2 (under the title) or 3."""
    if level not in (2, 3):
        raise InputError(f"level: {level!r} is not a heading inside a page; allowed: 2, 3")
    return Section(f"<h{level}>{escape(words)}</h{level}>")


def text(words: str) -> Section:
    """Make a paragraph; line breaks are kept."""
    return Section(f"<p>{escape(words)}</p>")


def table(rows: Sequence[Row], columns: Sequence[Column], caption: str = "") -> Section:
    """Make the same table that `print_table` shows on a terminal.

    On a phone each row of a wide table becomes a paragraph of its own.
    """
    head = []
    body = []
    for column in columns:
        right = column.to_right(rows)
        title = column.title or column.key
        kind = ' class="r"' if right else ""
        named = escape(" ".join(title.split()))
        cells = [column.cell(row) for row in rows]
        # spaces as wide as a digit and a point
        cells = aligned(cells, "\u2007", "\u2008") if right else cells
        head.append(f"<th{kind}>{escape(title)}</th>")
        body.append([f'<td{kind} data-title="{named}">{escape(cell)}</td>' for cell in cells])
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in zip(*body, strict=True))
    label = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    fold = " fold" if len(columns) > _FEW else ""
    made = f"<table><thead><tr>{''.join(head)}</tr></thead><tbody>{lines}</tbody></table>"
    scrolls = f'<div class="wide{fold}">{made}</div>'
    return Section(f"<figure>{label}{scrolls}</figure>" if caption else scrolls)


def details(summary: str, sections: Sequence[Section]) -> Section:
    """Make sections that stay folded until the reader opens them."""
    inside = "".join(one.html for one in sections)
    return Section(f"<details><summary>{escape(summary)}</summary>{inside}</details>")


def code(words: str) -> Section:
    """Make a block of text in a fixed-width font: a command, a sample of a model."""
    return Section(f"<pre>{escape(words)}</pre>")


def key_value(pairs: Mapping[str, Any]) -> Section:
    """Make a list of names and values, such as the versions of packages.

    Nested values are named with a dot: `mesh.tensor`.
    """
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _flat(pairs, "")
    )
    return Section(f"<dl>{items}</dl>")


def options(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Section:
    """Show the options of a run: those that differ from the defaults, and folded away the others.

    The resolved values are folded away too.

    Args:
      config: the `config` of a `Run`.
      defaults: option -> default value; an option that is missing here has no default.
    """
    asked = {name: value for name, value in config.items() if name not in ("verb", "resolved")}
    changed = {
        name: value
        for name, value in asked.items()
        if name not in defaults or to_plain(defaults[name]) != value
    }
    rows = [
        {"option": name, "value": _said(value), "default": _said(defaults.get(name))}
        for name, value in changed.items()
    ]
    parts = [
        table(rows, [Column("option"), Column("value"), Column("default")])
        if rows
        else text("All options have their defaults.")
    ]
    rest = {name: value for name, value in asked.items() if name not in changed}
    folded = {
        "The other options, all with their defaults": rest,
        "What all of them came to": config.get("resolved", {}),
    }
    parts += [details(title, [key_value(pairs)]) for title, pairs in folded.items() if pairs]
    return Section("".join(part.html for part in parts))


def ran_on(versions: Mapping[str, Any]) -> Section:
    """Show what a run ran on: the processor in words, and the rest folded away."""
    said = text(f"{processor(versions)[:1].upper()}{processor(versions)[1:]}.")
    return Section(
        heading("What it ran on").html
        + said.html
        + details("Versions and devices", [key_value(versions)]).html
    )


def figure(svg: bytes | str, caption: str = "") -> Section:
    """Embed a drawing that a function of `plot` returned.

    Ink, grid and paper take the page's colours, light or dark.
    """
    source = svg.decode() if isinstance(svg, bytes) else svg
    root = ElementTree.fromstring(source[source.find("<svg") :])
    for node in root.iter():
        node.tag = str(node.tag).removeprefix(_SVG)
        node.attrib = {name.rpartition("}")[2]: value for name, value in node.attrib.items()}
    root.attrib = {
        "viewBox": root.get("viewBox", "0 0 300 150"),
        "role": "img",
        "aria-label": caption or "plot",
    }
    # serialised again, which drops comments: they hold labels unescaped
    drawing = ElementTree.tostring(root, encoding="unicode")
    for colour, name in ((plot.INK, "ink"), (plot.GRID, "line"), (plot.PAPER, "paper")):
        drawing = drawing.replace(colour, f"var(--{name})")
    return Section(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")


def pictures(images: Sequence[tuple[str, bytes]]) -> Section:
    """Show small PNG pictures in a row, each above its label."""
    made = []
    for label, png in images:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        shown = f'<img alt="" src="{source}" style="height:3.5rem;image-rendering:pixelated">'
        frame = '<figure style="display:inline-block;margin:.2rem;text-align:center">'
        made.append(f"{frame}{shown}<figcaption>{escape(label)}</figcaption></figure>")
    return Section(f"<div>{''.join(made)}</div>")


def _flat(pairs: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    for key, value in pairs.items():
        if isinstance(value, Mapping) and value:
            items += _flat(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", _said(value)))
    return items


def _said(value: Any) -> str:
    """Return a value as one would type it."""
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(one, list | tuple) for one in value) else ", ").join(
            map(_said, value)
        ) or "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None or value == "" else text_of(value)
