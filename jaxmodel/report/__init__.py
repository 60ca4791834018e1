"""What a person or a program gets to see: tables, plots, pages, JSON rows, run folders."""

from jaxmodel.report import html, plot
from jaxmodel.report.experiment import experiment
from jaxmodel.report.json_out import check_target, clean_stdout, emit, goal_met, rows, to_plain
from jaxmodel.report.run import Run, processor, read_run, start_run, versions
from jaxmodel.report.shown import Rows, card
from jaxmodel.report.table import Column, console_for, print_table, to_markdown

__all__ = [
    "Column",
    "Rows",
    "Run",
    "card",
    "check_target",
    "clean_stdout",
    "console_for",
    "emit",
    "experiment",
    "goal_met",
    "html",
    "plot",
    "print_table",
    "processor",
    "read_run",
    "rows",
    "start_run",
    "to_markdown",
    "to_plain",
    "versions",
]
