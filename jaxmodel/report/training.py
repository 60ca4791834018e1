"""The output of a running training job.

It is `metrics.jsonl`, optionally TensorBoard and MLflow, plots, and one HTML page.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jaxmodel import report, schema
from jaxmodel.errors import InputError, require
from jaxmodel.files import atomic_write, read_bytes
from jaxmodel.report import html, plot
from jaxmodel.report.json_out import dumps
from jaxmodel.report.table import count, number, percent, rate, text

type Tracker = Callable[[dict[str, Any]], None]
"""A function that is called with every row."""

PAGE_EVERY = 30.0  # seconds between two versions of the page of a running job
LOSSES = ("loss", "heldout_loss")
SPEEDS = ("tokens_per_second", "rows_per_second")
TITLES = {
    "loss": "training\nloss",
    "heldout_loss": "held-out\nloss",
    "accuracy": "training\naccuracy",
    "heldout_accuracy": "held-out\naccuracy",
    "tokens_per_second": "tokens\nper second",
    "rows_per_second": "rows\nper second",
    "data_wait": "wait for\ndata",
    "grad_norm": "norm of the\ngradient",
    "learning_rate": "learning\nrate",
    "mfu": "MFU",
    "bad": "bad\nsteps",
}
"""Column titles for keys of a row that are not plain words."""
_AGAIN = {"resume": "", "rerun": "", "replay": " --step 1"}


class _Row(TypedDict, total=False):
    step: schema.Index
    loss: float | None
    heldout_loss: float | None


class Writer:
    """A callback of `fit` that records every row.

    Each row goes to `metrics.jsonl` and the trackers; plots and page are renewed from time to time.

    Args:
      folder: the run folder.
      steps: the number of steps of the whole run.
      trackers: functions that are called with every row; see `tensorboard`, `mlflow`.
      defaults: the defaults of the run's options; the page shows those that differ.
    """

    def __init__(
        self,
        folder: report.Run,
        steps: int,
        trackers: Sequence[Tracker] = (),
        defaults: Mapping[str, Any] | None = None,
    ):
        self._folder = folder
        self._steps = steps
        self._trackers = trackers
        self._defaults = defaults or {}
        self._shown = time.monotonic()
        self._last = 0

    def __call__(self, row: dict[str, Any]) -> None:
        """Record one row of the history."""
        if row["step"] <= self._last:  # the run was rolled back to a checkpoint
            self.rewind(row["step"] - 1)
        self._last = row["step"]
        self._folder.log(**row)
        for tracker in self._trackers:
            tracker(row)
        if time.monotonic() - self._shown > PAGE_EVERY:
            self.page({})

    def rewind(self, step: int) -> None:
        """Drop the rows after a step.

        A run that continues from there writes them again.
        """
        file = self._folder.path("metrics.jsonl")
        rows = self.rows()
        kept = [row for row in rows if row.get("step", 0) <= step]
        if len(kept) < len(rows) or (file.exists() and not file.read_bytes().endswith(b"\n")):
            atomic_write(file, "".join(dumps(row, indent=None) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the whole run, over all restarts."""
        return read_rows(self._folder.path("metrics.jsonl"))

    def page(self, result: dict[str, Any]) -> None:
        """Write the plots and `report.html`.

        Without matplotlib there are no plots, and the page says so.
        """
        self._shown = time.monotonic()
        rows = self.rows()
        if not rows:
            return
        # without matplotlib, training goes on without plots
        with contextlib.suppress(InputError):
            for name, draw in plots(rows).items():
                self._folder.save_bytes(f"plots/{name}.png", draw("png"))
        self._folder.save_bytes(
            "report.html", page(self._folder, rows, result, self._steps, self._defaults)
        )


def read_rows(file: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`; an incomplete last line is left out."""
    place = Path(file)
    rows = []
    raw = read_bytes(place, 2**30) if place.exists() else b""
    for line in raw.decode(errors="replace").splitlines():
        with contextlib.suppress(InputError):
            rows.append(schema.make(schema.parse(line.encode(), str(file)), _Row, str(file)))
    return rows


class History(report.Rows):
    """The rows of a run: a list of dicts that is shown as a table.

    A notebook shows the curve of the losses above the table.
    """

    def columns(self) -> list[report.Column]:
        """Return the columns of the table, losses and speed first."""
        return columns(self)

    def _repr_html_(self) -> str | None:
        # matplotlib is missing, or the rows are of another kind
        with contextlib.suppress(Exception):
            return (
                f"{html.fragment([html.figure(plots(self)['loss']('svg'))])}{super()._repr_html_()}"
            )
        return super()._repr_html_()


def plots(rows: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[str], plot.Picture]]:
    """Return the plots of a run, as name -> format -> picture.

    They show losses, learning rate, gradient norm and speed over steps.
    """

    def series(*names: str, skip: int = 0) -> dict[str, Any]:
        found = {}
        for name in names:
            own = [row for row in rows if row.get(name) is not None]
            own = own[skip:] or own
            if own:
                found[TITLES[name].partition("\n")[0]] = (
                    [row["step"] for row in own],
                    [row[name] for row in own],
                )
        return found

    unit = ", nats per token" if any("tokens_per_second" in row for row in rows) else ""
    losses = series(*LOSSES)
    speed = next(name for name in SPEEDS if name == SPEEDS[-1] or any(name in row for row in rows))
    # the first row includes the compilation
    wanted = {
        "loss": (losses, f"loss{unit}", "Loss"),
        "learning_rate": (series("learning_rate"), "learning rate", "Learning rate"),
        "grad_norm": (series("grad_norm"), "norm of the gradient", "Gradient"),
        "speed": (
            series(speed, skip=1),
            speed.replace("_", " "),
            "Speed",
        ),
    }
    return {
        name: lambda fmt, found=found, label=label, title=title: plot.curves(
            found, "step", label, title, fmt
        )
        for name, (found, label, title) in wanted.items()
        if found
    }


def columns(rows: Sequence[Mapping[str, Any]]) -> list[report.Column]:
    """Return the columns of a table of such rows, with headings and units."""
    names = dict.fromkeys(
        name for row in rows for name in row if name not in ("data_step", "seconds")
    )
    first = [name for name in ("step", *LOSSES, *SPEEDS) if name in names]
    formats = {"mfu": percent, "data_wait": percent, **dict.fromkeys(SPEEDS, rate), "loss": _loss}
    formats |= {
        "heldout_loss": _loss,
        "learning_rate": lambda value: number(value, 3),
        "step": count,
        "bad": count,
    }
    heading = lambda name: TITLES[name] if name in TITLES else name.replace("_", " ")
    return [
        report.Column(name, heading(name), formats.get(name, text))
        for name in [*first, *(n for n in names if n not in first)]
    ]


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else number(value)


def page(
    folder: report.Run,
    rows: list[dict[str, Any]],
    result: dict[str, Any],
    steps: int,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Return the HTML page of a run that goes on or has ended."""
    last = rows[-1]
    state = "ended" if result and not result.get("stopped") else "stopped" if result else "running"
    sections = [
        html.text(
            f"Step {last['step']:,} of {steps:,}, {state}. Its speed is that of "
            f"{report.processor(folder.versions)}."
        )
    ]
    if result:
        mesh = ", ".join(f"{axis}={length}" for axis, length in result["mesh"].items())
        where = (
            f"{result['devices']} "
            f"device{'s' * (result['devices'] > 1)}{f', mesh {mesh}' if mesh else ''}"
        )
        sections.append(html.text(f"{result['parameters']:,} parameters on {where}."))
    try:
        sections += [html.figure(draw("svg")) for draw in plots(rows).values()]
    except InputError as missing:
        sections.append(html.text(f"There are no plots here: {missing}"))
    sections += [html.heading("The last rows"), html.table(rows[-10:], columns(rows))]
    if spent := result.get("ledger", {}):
        wall = spent["wall"]
        kinds = {name: value for name, value in spent.items() if name not in ("wall", "goodput")}
        times = [
            {"category": name, "seconds": value, "share": value / wall}
            for name, value in kinds.items()
        ]
        shown = [
            report.Column("category"),
            report.Column("seconds", format="{:.1f}".format),
            report.Column("share", format=percent),
        ]
        sections += [
            html.heading("Where the time went"),
            html.text(
                f"Goodput {100 * spent['goodput']:.1f} %: the share of {wall:.0f} s, restarts and "
                f"all, that went into steps that "
                "counted."
            ),
            html.table(times, shown),
        ]
    if result.get("sample"):
        sections += [html.heading("A sample"), html.code(result["sample"])]
    sections += [
        html.heading("How to go on and to repeat it"),
        html.text("From the last checkpoint on, the whole run again, or one step of it:"),
        html.code(
            "\n".join(f"jaxmodel {verb} {folder.folder}{more}" for verb, more in _AGAIN.items())
        ),
        html.heading("What was asked for"),
        html.options(folder.config, defaults or {}),
        html.ran_on(folder.versions),
    ]
    return html.page(f"jaxmodel train: {folder.folder.name}", sections)


@contextlib.contextmanager
def tensorboard(folder: str | Path) -> Iterator[Tracker]:
    """Yield a tracker that writes the numbers of every row for TensorBoard.

    It needs tensorboardX (the extra `notebook`). Where steps are repeated, because the run was
    rolled back or was killed after its last checkpoint, TensorBoard is told to forget what it has
    from there.
    """
    board = require("tensorboardX", "notebook")
    writer = None
    last = 0

    def write(row: dict[str, Any]) -> None:
        nonlocal writer, last
        if writer is None or row["step"] <= last:
            parts = len(list(Path(folder).glob("events*")))
            if writer is not None:
                writer.close()
            # the name of the new file must differ from that of the last; it is only precise to
            # the second
            writer = board.SummaryWriter(
                str(folder), purge_step=row["step"] if parts else None, filename_suffix=f".{parts}"
            )
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
    """Yield a tracker for MLflow, at `MLFLOW_TRACKING_URI`.

    It needs the extra `lifecycle`, and is checked with MLflow 3.17 on SQLite. A resumed run
    continues the same MLflow run. Where steps are repeated, because the run was rolled back or was
    killed after its last checkpoint, a new MLflow run is written from the rows before them, and the
    old one is deleted (`mlflow gc` removes it for good). If the server fails during the run, that
    is reported once, and the run goes on without it.

    Raises:
      InputError: the package is missing, or MLflow cannot be used at that address.
    """
    module = require("mlflow", "lifecycle")
    failed = require("mlflow.exceptions", "lifecycle").MlflowException
    client: Any = None
    last = 0
    well = True

    def begin(known: str | None) -> str:
        made = module.start_run(run_id=known, run_name=run, tags={"jaxmodel_run": run})
        if known is None:
            module.log_params(
                {key: str(value)[:500] for key, value in config.items() if key != "resolved"}
            )
        return made.info.run_id

    def begin_anew(old: str, step: int) -> str:
        names = client.get_run(old).data.metrics
        kept = [
            one for name in names for one in client.get_metric_history(old, name) if one.step < step
        ]
        module.end_run()
        new = begin(None)
        for start in range(0, len(kept), 1000):  # MLflow takes at most 1000 at once
            client.log_batch(new, metrics=kept[start : start + 1000])
        client.delete_run(old)
        return new

    try:
        client = module.MlflowClient()
        found = module.search_runs(
            filter_string=f"tags.jaxmodel_run = '{run}'", output_format="list"
        )
        current = begin(found[0].info.run_id if found else None)
        if found and "loss" in found[0].data.metrics:
            last = max(one.step for one in client.get_metric_history(current, "loss"))
    except failed as error:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        raise InputError(
            f"mlflow: {uri!r}, of MLFLOW_TRACKING_URI, cannot be used: {_first_line(error)}"
        ) from None

    def write(row: dict[str, Any]) -> None:
        nonlocal current, last, well
        if not well:
            return
        try:
            if row["step"] <= last:
                current = begin_anew(current, row["step"])
            last = row["step"]
            module.log_metrics(numbers(row), step=last)
        except failed as error:
            well = False
            print(
                f"jaxmodel: mlflow: gets no more rows of this run: {_first_line(error)}",
                file=sys.stderr,
                flush=True,
            )

    status = "FAILED"
    try:
        yield write
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(failed):
            module.end_run(status)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def trackers(stack: contextlib.ExitStack, folder: report.Run, board: bool) -> list[Tracker]:
    """Return the trackers of a run; the stack closes them.

    TensorBoard is used if `board` is true, MLflow if `MLFLOW_TRACKING_URI` is set.
    """
    found = [stack.enter_context(tensorboard(folder.path("tensorboard")))] if board else []
    if os.environ.get("MLFLOW_TRACKING_URI"):
        found.append(stack.enter_context(mlflow(folder.folder.name, folder.config)))
    return found


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row except its step."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
