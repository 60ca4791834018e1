"""Tables for people, from one list of rows and columns, on a terminal or as Markdown."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxmodel.errors import printable

Row = Mapping[str, Any]


def number(value: float | int, digits: int = 4) -> str:
    """Format a number with `digits` significant digits.

    Digits before the decimal point are never dropped.

    >>> number(29.602), number(0.0021), number(1234567.8), number(3.1e-7), number(5)
    ('29.60', '0.002100', '1,234,568', '3.100e-07', '5')
    """
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    # the exponent of the rounded value: 9.9996 becomes 10.00
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    return (
        f"{value:,.{max(0, digits - 1 - exponent)}f}"
        if -4 <= exponent < 15
        else f"{value:.{digits - 1}e}"
    )


def significant(digits: int) -> Callable[[float | int], str]:
    """Return `number` with that many significant digits, as the format of a `Column`."""
    return lambda value: number(value, digits)


def count(value: float | int) -> str:
    """Format an integer with thousands separators: `134,515,008`."""
    return f"{round(value):,}"


def size(value: float | int) -> str:
    """Format bytes in decimal units (1 kB is 1,000 bytes).

    There is always one decimal, so that the values line up in a column.

    >>> size(538_060_032), size(12_400), size(60), size(1.6e12)
    ('538.1 MB', '12.4 kB', '0.1 kB', '1.6 TB')
    """
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(value) >= 0.99995 * one:  # smaller values round to at most 999.9 of the next unit
            return f"{value / one:,.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


def rate(value: float | int) -> str:
    """Format a rate (such as tokens per second) with three significant digits, without the unit.

    Examples are `1,124` and `59.9`.
    """
    return number(float(value), 3)


def percent(value: float | int) -> str:
    """Format a fraction as a percentage: `0.5` is `50.0 %`."""
    return f"{100 * value:.1f} %"


def text(value: Any) -> str:
    """Format a value of a column that names no format.

    Numbers are formatted by `number`, booleans as yes and no, and the rest by `str`.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(map(text, value))
    return number(value) if isinstance(value, int | float) else str(value)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
      key: the key of the rows. A row without it, or with None, shows a dash.
      title: the heading, with the unit; it may hold line breaks; the key if empty.
      format: a function from value to text.
      align: `auto` aligns a column of numbers right and any other left.
    """

    key: str
    title: str = ""
    format: Callable[[Any], str] = text
    align: Literal["auto", "left", "right"] = "auto"

    def cell(self, row: Row) -> str:
        """Return the text of this column in one row."""
        value: Any = row.get(self.key)
        if getattr(value, "ndim", None) == 0:
            value = value.item()  # NumPy and JAX scalars
        return "–" if value is None else printable(self.format(value))

    def to_right(self, rows: Sequence[Row]) -> bool:
        """Return whether the column is right-aligned."""
        if self.align != "auto":
            return self.align == "right"
        values = [row[self.key] for row in rows if row.get(self.key) is not None]
        return bool(values) and all(
            hasattr(v, "__float__") and not isinstance(v, bool) for v in values
        )


def console_for(json_target: str | None = None) -> Any:
    """Return the rich console for tables.

    It writes to standard output, or to standard error if `--json -` has taken standard output. In a
    pipe or a file, which have no width, tables are never folded. Texts are `printable`.
    """
    from rich.console import Console
    from rich.text import Text

    class Safe(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*map(safe, objects), **options)

        def on_broken_pipe(self) -> None:  # rich would exit with code 1
            raise BrokenPipeError

    def safe(one: Any) -> Any:
        if isinstance(one, Text) and (plain := printable(one.plain)) != one.plain:
            return Text(plain, style=one.style)
        return printable(one) if isinstance(one, str) else one

    stderr = json_target == "-"
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Safe(
        stderr=stderr,
        highlight=False,
        soft_wrap=not terminal,
        width=None if terminal else 500,
        # in a notebook rich would display the table, also where only its text is wanted
        force_jupyter=False,
    )


def aligned(cells: Sequence[str], digit: str = " ", point: str = " ") -> list[str]:
    """Pad numbers on the right so that their decimal points line up when right-aligned.

    >>> aligned(["375", "19.5", "9.66"])
    ['375   ', '19.5 ', '9.66']
    """
    found = [re.fullmatch(r"([^.]*)(\.\d+)?(.*)", cell, re.DOTALL) for cell in cells]
    longest = max((len(one[2] or "") for one in found if one), default=0)

    def padded(cell: str, one: re.Match[str] | None) -> str:
        if one is None or not longest:
            return cell
        room = digit * (longest - len(one[2])) if one[2] else point + digit * (longest - 1)
        return f"{one[1]}{one[2] or ''}{one[3]}{room}"

    return [padded(cell, one) for cell, one in zip(cells, found, strict=True)]


def print_table(
    rows: Sequence[Row], columns: Sequence[Column], title: str | None = None, console: Any = None
) -> None:
    """Print rows as a table on `console` (None for standard output; see `console_for`).

    A table that is too wide is split into several, each of which begins with the first column.
    """
    from rich.text import Text

    console = console or console_for()
    parts: list[list[Column]] = [[]]
    for column in columns:
        wider = [*parts[-1], column]
        if (
            len(wider) > 1 + (len(parts) > 1)
            and _width(_rich(rows, wider), console) > console.width
        ):
            wider = [columns[0], column]
            parts.append(wider)
        parts[-1] = wider
    for i, part in enumerate(parts):
        if title and not i:
            console.print(Text(printable(title), style="italic"))
        console.print(_rich(rows, part))


def _rich(rows: Sequence[Row], columns: Sequence[Column]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made = []
    for column in columns:
        right = column.to_right(rows)
        cells = [column.cell(row) for row in rows]
        title = printable(column.title or column.key)
        # rich would cut off the spaces at the ends of cells if it right-aligned them
        if right:
            cells = aligned(cells)
            widest = max(map(len, [*cells, *title.split("\n")]))
            cells = [cell.rjust(widest) for cell in cells]
        made.append(cells)
        head = Text(title, justify="right" if right else "left")
        table.add_column(head, overflow="fold", vertical="bottom")
    for cells in zip(*made, strict=True):
        table.add_row(*map(Text, cells))  # as Text, brackets in a name are not markup
    return table


def _width(table: Any, console: Any) -> int:
    return table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum


def to_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return rows as a Markdown table, without a trailing line break.

    >>> print(to_markdown([{"name": "int8", "nll": 3.389}], [Column("name"), Column("nll", "NLL")]))
    | name | NLL |
    | :-- | --: |
    | int8 | 3.389 |
    """
    head = [column.title or column.key for column in columns]
    rule = ["--:" if column.to_right(rows) else ":--" for column in columns]
    body = [[column.cell(row) for column in columns] for row in rows]
    lines = [
        [" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in [head, *body]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
