"""What a run writes while it goes: `metrics.jsonl`, TensorBoard and MLflow where they are wanted, plots, and one HTML page."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jaxmodel import report, schema
from jaxmodel.errors import InputError, require
from jaxmodel.files import read_bytes
from jaxmodel.report import html, plot
from jaxmodel.report.json_out import dumps
from jaxmodel.report.table import number, percent

type Tracker = Callable[[dict[str, Any]], None]
"""Called with every row."""

PAGE_EVERY = 30.0  # seconds between two pages of a run that goes on
LOSSES = ("loss", "heldout_loss")


class _Row(TypedDict, total=False):
    step: schema.Index
    loss: float | None
    heldout_loss: float | None


class Writer:
    """A callback of `fit`: each row goes to `metrics.jsonl` and the trackers; plots and page are made anew from time to time.

    Args:
      folder: of the run.
      steps: of the whole run.
      trackers: each is called with every row: see `tensorboard`, `mlflow`.
    """

    def __init__(self, folder: report.Run, steps: int, trackers: Sequence[Tracker] = ()):
        self._folder, self._steps, self._trackers = folder, steps, trackers
        self._shown, self._last = time.monotonic(), 0

    def __call__(self, row: dict[str, Any]) -> None:
        if row["step"] <= self._last:  # the run went back to a checkpoint
            self.rewind(row["step"] - 1)
        self._last = row["step"]
        self._folder.log(**row)
        for tracker in self._trackers:
            tracker(row)
        if time.monotonic() - self._shown > PAGE_EVERY:
            self.page({})

    def rewind(self, step: int) -> None:
        """Drop the rows behind a step: a run that goes on from there writes them again."""
        file = self._folder.path("metrics.jsonl")
        rows = self.rows()
        kept = [row for row in rows if row.get("step", 0) <= step]
        if len(kept) < len(rows) or (file.exists() and not file.read_bytes().endswith(b"\n")):
            report.atomic_write(file, "".join(dumps(row, indent=None) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """Those of the whole run, over all restarts."""
        return read_rows(self._folder.path("metrics.jsonl"))

    def page(self, result: dict[str, Any]) -> None:
        """Write the plots and `report.html`; without matplotlib, nothing."""
        self._shown = time.monotonic()
        rows = self.rows()
        if not rows:
            return
        with contextlib.suppress(InputError):  # the package that draws is missing: training goes on without pictures
            for name, draw in plots(rows).items():
                self._folder.save_bytes(f"plots/{name}.png", draw("png"))
            self._folder.save_bytes("report.html", page(self._folder, rows, result, self._steps))


def read_rows(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that was cut off is none."""
    place = Path(file)
    rows = []
    raw = read_bytes(place, 2**30) if place.exists() else b""
    for line in raw.decode(errors="replace").splitlines():
        with contextlib.suppress(InputError):
            rows.append(schema.make(schema.parse(line.encode(), str(file)), _Row, str(file)))
    return rows


def plots(rows: list[dict[str, Any]]) -> dict[str, Callable[[str], bytes]]:
    """Name -> format -> picture: losses, learning rate, and speed over steps."""

    def series(*names: str) -> dict[str, Any]:
        found = {}
        for name in names:
            own = [row for row in rows if row.get(name) is not None]
            if own:
                found[name.replace("_", " ")] = ([row["step"] for row in own], [row[name] for row in own])
        return found

    wanted = {
        "loss": (LOSSES, "loss", "Loss"),
        "learning_rate": (("learning_rate",), "learning rate", "Learning rate"),
        "grad_norm": (("grad_norm",), "norm of the gradient", "Gradient"),
        "speed": (("tokens_per_second", "rows_per_second"), "tokens (or rows) per second", "Speed"),
    }
    made: dict[str, Callable[[str], bytes]] = {}
    for name, (keys, label, title) in wanted.items():
        if found := series(*keys):
            made[name] = lambda fmt, found=found, label=label, title=title: plot.curves(found, "step", label, title, fmt)
    return made


def page(folder: report.Run, rows: list[dict[str, Any]], result: dict[str, Any], steps: int) -> str:
    """The page of a run, whether it goes on or is through."""
    last = rows[-1]
    spent = result.get("ledger", {})
    state = "ended" if result and not result.get("stopped") else "stopped" if result else "running"
    sections = [
        html.text(f"Step {last['step']} of {steps}, {state}."),
        *(html.figure(draw("svg")) for draw in plots(rows).values()),
        html.heading("The last rows"),
        html.table(rows[-10:], [report.Column(name, format=number) for name in last if name != "seconds"]),
    ]
    if spent:
        wall = spent["wall"]
        kinds = {name: value for name, value in spent.items() if name not in ("wall", "goodput")}
        times = [{"category": name, "seconds": value, "share": value / wall} for name, value in kinds.items()]
        columns = [report.Column("category"), report.Column("seconds", format=number), report.Column("share", format=percent)]
        sections += [
            html.heading("Where the time went"),
            html.text(
                f"Goodput {100 * spent['goodput']:.1f} %: the share of {wall:.0f} s, restarts and all, that went into steps that "
                "counted."
            ),
            html.table(times, columns),
        ]
    if result.get("sample"):
        sections += [html.heading("A sample"), html.code(result["sample"])]
    sections += [
        html.heading("How to go on and to repeat it"),
        html.text(
            "jaxmodel resume on this folder goes on from the last checkpoint, jaxmodel rerun repeats the run, and "
            "jaxmodel replay --step k computes one step again."
        ),
        html.key_value(folder.config),
        html.heading("What it ran on"),
        html.key_value(folder.versions),
    ]
    return html.page(f"jaxmodel train: {folder.folder.name}", sections)


@contextlib.contextmanager
def tensorboard(folder: str | Path) -> Iterator[Tracker]:
    """A tracker that writes every number of a row for TensorBoard (tensorboardX, extra `notebook`).

    Where rows come again, because a run went back or was killed behind its last checkpoint, TensorBoard is told to forget what it
    has from that step on.
    """
    board = require("tensorboardX", "notebook")
    writer, last = None, 0

    def write(row: dict[str, Any]) -> None:
        nonlocal writer, last
        if writer is None or row["step"] <= last:
            parts = len(list(Path(folder).glob("events*")))
            if writer is not None:
                writer.close()
            # a file of its own, whose name, which has the second, might else be that of the one before
            writer = board.SummaryWriter(str(folder), purge_step=row["step"] if parts else None, filename_suffix=f".{parts}")
        last = row["step"]
        for name, value in numbers(row).items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@contextlib.contextmanager
def mlflow(run: str, config: dict[str, Any]) -> Iterator[Tracker]:
    """A tracker for MLflow, at `MLFLOW_TRACKING_URI`; a run that is resumed goes on there too (extra `lifecycle`).

    Steps that a killed run had logged behind its last checkpoint are the same again, and are not logged twice. MLflow forgets
    nothing: where a run goes back past a bad batch, it has both rows of a step.
    """
    module = require("mlflow", "lifecycle")
    found = module.search_runs(filter_string=f"tags.jaxmodel_run = '{run}'", output_format="list")
    known = found[0].info.run_id if found else None
    with module.start_run(run_id=known, run_name=run, tags={"jaxmodel_run": run}):
        done = -1
        if known is None:
            module.log_params({key: str(value)[:500] for key, value in config.items() if key != "resolved"})
        elif "loss" in found[0].data.metrics:
            done = max(one.step for one in module.MlflowClient().get_metric_history(known, "loss"))

        def write(row: dict[str, Any]) -> None:
            nonlocal done
            if row["step"] > done:
                module.log_metrics(numbers(row), step=row["step"])
            else:
                done = done if row["step"] < done else -1  # from here on the run is its own

        yield write


def trackers(stack: contextlib.ExitStack, folder: report.Run, board: bool) -> list[Tracker]:
    """Those that a run has: TensorBoard if wanted, MLflow where `MLFLOW_TRACKING_URI` is set; the stack closes them."""
    found = [stack.enter_context(tensorboard(folder.path("tensorboard")))] if board else []
    if os.environ.get("MLFLOW_TRACKING_URI"):
        found.append(stack.enter_context(mlflow(folder.folder.name, folder.config)))
    return found


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step."""
    return {name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)}
