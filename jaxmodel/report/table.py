"""Tables for people: one list of rows and columns, on a terminal or as Markdown."""

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
    """A number with `digits` significant digits; the digits before the point are never dropped.

    >>> number(29.602), number(0.0021), number(1234567.8), number(3.1e-7), number(5)
    ('29.60', '0.002100', '1,234,568', '3.100e-07', '5')
    """
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    exponent = int(
        f"{value:.{digits - 1}e}".split("e")[1]
    )  # of the rounded value: 9.9996 becomes 10.00
    return (
        f"{value:,.{max(0, digits - 1 - exponent)}f}"
        if -4 <= exponent < 15
        else f"{value:.{digits - 1}e}"
    )


def significant(digits: int) -> Callable[[float | int], str]:
    """The format `number` with that many significant digits, for a `Column`."""
    return lambda value: number(value, digits)


def count(value: float | int) -> str:
    """A whole number with its thousands apart: `134,515,008`."""
    return f"{round(value):,}"


def size(value: float | int) -> str:
    """Bytes in units of a thousand of each other, always with one decimal, so that they line up in
    a column.

    >>> size(538_060_032), size(12_400), size(60), size(1.6e12)
    ('538.1 MB', '12.4 kB', '0.1 kB', '1.6 TB')
    """
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(value) >= 0.99995 * one:  # which would be 1,000.0 of the next
            return f"{value / one:,.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


def rate(value: float | int) -> str:
    """Tokens (or anything) per second with three significant digits, without the unit:

    `1,124`, `59.9`.
    """
    return number(float(value), 3)


def percent(value: float | int) -> str:
    """A fraction as per cent: `0.5` is `50.0 %`."""
    return f"{100 * value:.1f} %"


def text(value: Any) -> str:
    """The format of a column that names none: numbers by `number`, truth as yes and no, the rest as
    it is written.
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
      key: the rows' key. A row without it, or with None, shows a dash.
      title: what stands above, with the unit; may hold line breaks; the key when empty.
      format: value to text.
      align: `auto` puts a column of numbers to the right and the rest to the left.
    """

    key: str
    title: str = ""
    format: Callable[[Any], str] = text
    align: Literal["auto", "left", "right"] = "auto"

    def cell(self, row: Row) -> str:
        """The text of this column in one row."""
        value: Any = row.get(self.key)
        if getattr(value, "ndim", None) == 0:
            value = value.item()  # NumPy and JAX scalars
        return "–" if value is None else printable(self.format(value))

    def to_right(self, rows: Sequence[Row]) -> bool:
        """Whether the column is set flush right."""
        if self.align != "auto":
            return self.align == "right"
        values = [row[self.key] for row in rows if row.get(self.key) is not None]
        return bool(values) and all(
            hasattr(v, "__float__") and not isinstance(v, bool) for v in values
        )


def console_for(json_target: str | None = None) -> Any:
    """The rich console where tables go: standard output, or standard error when `--json -` has
    taken standard output.

    What is no terminal has no width either, so tables in a pipe or a file are never folded. Texts
    are `printable`.
    """
    from rich.console import Console
    from rich.text import Text

    class Safe(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*map(safe, objects), **options)

        def on_broken_pipe(self) -> None:  # rich would leave with code 1
            raise BrokenPipeError

    def safe(one: Any) -> Any:
        if isinstance(one, Text) and (plain := printable(one.plain)) != one.plain:
            return Text(plain, style=one.style)
        return printable(one) if isinstance(one, str) else one

    stderr = json_target == "-"
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Safe(
        stderr=stderr, highlight=False, soft_wrap=not terminal, width=None if terminal else 500
    )


def aligned(cells: Sequence[str], digit: str = " ", point: str = " ") -> list[str]:
    """Numbers with room behind them, so that their decimal points stand below each other once they
    are set flush right.

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
    """Print rows as a table on `console` (standard output when None; see `console_for`).

    What is too wide for it comes as several tables below each other, each of which begins with the
    first column.
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
        if (
            right
        ):  # the spaces at the ends of cells would be cut off, were they set flush right by rich
            cells = aligned(cells)
            widest = max(map(len, [*cells, *title.split("\n")]))
            cells = [cell.rjust(widest) for cell in cells]
        made.append(cells)
        head = Text(title, justify="right" if right else "left")
        table.add_column(head, overflow="fold", vertical="bottom")
    for cells in zip(*made, strict=True):
        table.add_row(*map(Text, cells))  # Text: brackets in a name are no markup
    return table


def _width(table: Any, console: Any) -> int:
    return table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum


def to_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Rows as a Markdown table, without a closing line break.

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
