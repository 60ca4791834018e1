"""Tables: what stands in the cells, on a terminal and in Markdown."""

from __future__ import annotations

import io
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from rich.console import Console
from rich.text import Text

from jaxmodel.report import Column, Rows, html, print_table, to_markdown
from jaxmodel.report.table import (
    aligned,
    console_for,
    count,
    number,
    percent,
    rate,
    significant,
    size,
    text,
)

COLUMNS = [
    Column("name", "version"),
    Column("bytes", "resident\nmemory", size),
    Column("nll", "NLL", significant(5)),
]
ROWS = [
    {"name": "f32 [red]", "bytes": 538_060_032, "nll": np.float32(3.38783)},
    {"name": "a|b", "bytes": None},
]


def shown(rows, columns, width, title=None):
    out = io.StringIO()
    print_table(rows, columns, title, Console(file=out, width=width))
    return out.getvalue()


def test_print_table_shows_every_cell_and_no_markup():
    out = shown(ROWS, COLUMNS, 80, "[b]sizes")
    assert all(cell in out for cell in ("[b]sizes", "f32 [red]", "a|b", "538.1", "3.3878", "–"))
    right = [line.rstrip() for line in out.splitlines() if "3.3878" in line or "NLL" in line]
    assert len({len(line) for line in right}) == 1  # numbers end where their title ends


def test_a_narrow_terminal_folds_and_loses_nothing():
    out = shown([{"name": "x" * 30}], [Column("name")], 12)
    assert out.count("x") == 30


def test_a_pipe_is_never_folded(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "20")
    print_table([{f"k{i}": 10**8 for i in range(12)}], [Column(f"k{i}") for i in range(12)])
    assert any(line.count("100,000,000") == 12 for line in out.getvalue().splitlines())


def test_console_leaves_standard_output_to_json(capsys):
    print_table(ROWS, COLUMNS, console=console_for("-"))
    out, err = capsys.readouterr()
    assert out == "" and "538.1" in err
    print_table(ROWS, COLUMNS)
    assert "538.1" in capsys.readouterr().out


def test_to_markdown():
    assert to_markdown(ROWS, COLUMNS).splitlines() == [
        "| version | resident memory | NLL |",
        "| :-- | --: | --: |",
        "| f32 [red] | 538.1 MB | 3.3878 |",
        "| a\\|b | – | – |",
    ]


def test_alignment_and_default_format():
    rows = [{"met": True, "n": jnp.float32(2), "s": 1}]
    assert to_markdown(rows, [Column("met"), Column("n"), Column("s", align="left")]).splitlines()[
        1:
    ] == [
        "| :-- | --: | :-- |",
        "| yes | 2.000 | 1 |",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(9.9996), "10.00"),
        (number(-0.00012345, 3), "-0.000123"),
        (number(float("nan")), "nan"),
        (number(float("-inf")), "-inf"),
        (number(0.0), "0"),
        (count(134515008.0), "134,515,008"),
        (size(0), "0.0 kB"),
        (size(999_949), "999.9 kB"),
        (size(999_951), "1.0 MB"),
        (size(1.5e9), "1.5 GB"),
        (size(1_623_413_600_000), "1.6 TB"),
        (text((0.105124, -2)), "0.1051, -2"),
        (rate(1124.4), "1,124"),
        (rate(59.94), "59.9"),
        (percent(0.505), "50.5 %"),
    ],
)
def test_formats(text, expected):
    assert text == expected


@given(st.floats(1e-12, 1e14), st.integers(1, 8))
def test_number_is_right_to_its_digits(value, digits):
    assert math.isclose(
        float(number(value, digits).replace(",", "")), value, rel_tol=0.5001 * 10 ** (1 - digits)
    )


def test_no_control_character_reaches_a_terminal_or_a_page():
    """A name could else move the cursor, colour what follows, or write a title."""
    evil = "gpt\x1b]0;title\x07\x1b[31m\r\x9b2J\u202e"
    console = console_for()
    with console.capture() as caught:
        console.print(evil)
        console.print(Text(evil))
        print_table([{"name": evil}], [Column("name")], evil, console)
    shown = caught.get() + html.page(
        evil, [html.text(evil), html.table([{"name": evil}], [Column("name")])]
    )
    assert not set("\x1b\x07\r\x9b\u202e") & set(shown)
    assert shown.count(r"gpt\x1b]0;title\x07\x1b[31m\r\x9b2J\u202e") >= 6


def test_decimal_points_stand_below_each_other():
    made = aligned(["375", "19.5", "9.664", "–", "1,124", "-3"])
    assert made == ["375    ", "19.5  ", "9.664", "–    ", "1,124    ", "-3    "]
    assert aligned(["538.1 MB", "12.4 kB", "7"]) == ["538.1 MB", "12.4 kB", "7  "]
    rows = [{"speed": value} for value in (375.0, 19.5, 9.66)]
    lines = [
        line.rstrip("\n")
        for line in shown(rows, [Column("speed", "tokens\nper second", rate)], 40).splitlines()
        if "." in line
    ]
    assert len({line.index(".") for line in lines}) == 1 and len(lines) == 2


def test_a_table_too_wide_comes_in_parts_each_with_its_names():
    """80 columns: nothing is folded inside of a number or a word, and nothing is lost."""
    columns = [
        Column("name", "version"),
        *(Column(f"k{i}", f"speed of the {i}th kind") for i in range(8)),
    ]
    rows = [
        {"name": f"version {j}", **{f"k{i}": 1000.5 * i + j for i in range(8)}} for j in range(2)
    ]
    lines = shown(rows, columns, 80, "the title").splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].strip() == "the title"
    whole = "\n".join(lines)
    parts = whole.count("version 0")
    assert parts > 1 and whole.count("version 1") == parts == whole.count(" version ") - parts * 2
    for i, column in enumerate(columns[1:]):
        assert whole.count(column.title) == 1
        assert all(number(row[f"k{i}"]) in whole for row in rows)
    assert shown(rows, columns, 300).count("version 0") == 1


def test_the_repr_of_a_table_shows_nothing_by_itself(monkeypatch, capsys):
    """In a notebook, which shows the HTML of the same table, rich displays what it prints."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "loss" in repr(Rows([{"step": 1, "loss": 2.5}]))
    assert capsys.readouterr() == ("", "")
