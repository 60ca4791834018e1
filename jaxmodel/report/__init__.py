"""What a person or a program gets to see: tables, progress, plots, pages, JSON rows, run folders."""

from jaxmodel.report import html, plot
from jaxmodel.report.experiment import experiment
from jaxmodel.report.files import atomic_write
from jaxmodel.report.json_out import check_target, clean_stdout, emit, goal_met, rows, to_plain
from jaxmodel.report.progress import bar, progress, set_quiet, step
from jaxmodel.report.run import Run, processor, read_run, start_run, versions
from jaxmodel.report.shown import Rows, card
from jaxmodel.report.table import Column, console_for, print_table, to_markdown

__all__ = [
    "Column",
    "Rows",
    "Run",
    "atomic_write",
    "bar",
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
    "progress",
    "read_run",
    "rows",
    "set_quiet",
    "start_run",
    "step",
    "to_markdown",
    "to_plain",
    "versions",
]
