"""Results as interpreters and notebooks show them.

`Rows` is a list that looks like a table; `card` is the HTML of an object.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from jaxmodel.report import html
from jaxmodel.report.table import Column, Row, console_for, print_table, text

_MOST = 12  # the most rows shown


class Rows(list[Any]):
    """A list of rows (dicts with text keys) whose repr is a table.

    A long table shows only its first and last rows.

    Args:
      rows: the rows, of any keys.
      columns: the columns of the table; None for one for each key.

    >>> Rows([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}])[-1]["loss"]
    2.25
    """

    def __init__(self, rows: Iterable[Row] = (), columns: Sequence[Column] | None = None):
        super().__init__(rows)
        self._columns = columns

    def __repr__(self) -> str:
        if not self:
            return "[]"
        with contextlib.suppress(Exception):  # the rows may hold anything
            rows, title = self._some()
            console = console_for()
            console.file, console.width, console.soft_wrap = (
                io.StringIO(),
                min(console.width, 120),
                False,
            )
            print_table(rows, self.columns(), title, console)
            return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip(
                "\n"
            )
        return list.__repr__(self)

    def _repr_html_(self) -> str | None:
        with contextlib.suppress(Exception):
            rows, title = self._some()
            return html.fragment([html.table(rows, self.columns(), title or "")])
        return None

    def columns(self) -> list[Column]:
        """Return the columns of the table."""
        if self._columns is not None:
            return [column for column in self._columns if any(column.key in row for row in self)]
        names = dict.fromkeys(name for row in self for name in row)
        return [Column(name, name.replace("_", " "), text) for name in names]

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return type(self)(found, self._columns) if isinstance(key, slice) else found

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return (list, (list(self),))  # a column's format may be a lambda, which cannot be pickled

    def _some(self) -> tuple[list[Row], str | None]:
        if len(self) <= _MOST:
            return list(self), None
        return [
            *self[: _MOST // 2],
            *self[-_MOST // 2 :],
        ], f"The first and the last {_MOST // 2} of {len(self):,} rows"


def card(title: str, facts: Mapping[str, Any], sections: Sequence[html.Section] = ()) -> str:
    """Return the HTML of an object for a notebook: its title, facts and further sections."""
    return html.fragment([html.heading(title, 3), html.key_value(facts), *sections])
