"""Results for people and programs: tables, plots, pages, JSON rows, run folders."""

from jaxmodel import moved
from jaxmodel.report import html, plot
from jaxmodel.report.experiment import experiment
from jaxmodel.report.run import Run, processor, read_run, start_run
from jaxmodel.report.shown import Rows
from jaxmodel.report.table import Column, print_table, to_markdown

__all__ = [
    "Column",
    "Rows",
    "Run",
    "experiment",
    "html",
    "plot",
    "print_table",
    "processor",
    "read_run",
    "start_run",
    "to_markdown",
]

moved.attach(__name__)
