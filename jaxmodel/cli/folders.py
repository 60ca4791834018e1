"""The run folder of a verb: a new one, or that of a run that goes on.

Several processes share one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxmodel import report
from jaxmodel.cli import config_file
from jaxmodel.cli.options import Common, Train
from jaxmodel.errors import InputError
from jaxmodel.report.json_out import to_plain
from jaxmodel.report.run import versions


def of_run(name: str, options: Common, resumed: str | None) -> report.Run:
    """Return the folder.

    Of several processes the first has the run's own, the others `rank-<i>/` inside of it.
    """
    import jax

    config = {"verb": name, **dataclasses.asdict(options)}
    rank = jax.process_index()
    if rank:
        own = Path(_told(""), f"rank-{rank}")
        own.mkdir(exist_ok=True)
        return report.Run(own, to_plain(config), versions())
    if resumed is None:
        folder = report.start_run(name, config, options.runs)
        if isinstance(options, Train):
            text = config_file.dumped(options, places=False)
            (folder.folder / "config.yaml").write_text(text, encoding="utf-8")
    else:  # the versions of now; the file keeps those of then
        folder = dataclasses.replace(report.read_run(resumed), versions=versions())
    if jax.process_count() > 1:
        _told(str(folder.folder.absolute()))
    return folder


@contextlib.contextmanager
def dropped_on_failure(folder: report.Run, resumed: str | None) -> Iterator[report.Run]:
    """Give the folder, and remove it if the work fails before it has left any result."""
    try:
        yield folder
    except (InputError, OSError, KeyboardInterrupt):
        place = folder.folder
        if resumed is None and {path.name for path in place.iterdir()} <= {
            "config.json",
            "config.yaml",
            "versions.json",
        }:
            shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(OSError):
                place.parent.rmdir()  # of all runs, if this was the first
        raise


def _told(text: str) -> str:
    """Return the text of process 0, in all of them."""
    import numpy as np
    from jax.experimental import multihost_utils

    room = np.zeros(4096, np.uint8)
    raw = text.encode()
    room[: len(raw)] = np.frombuffer(raw, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))).rstrip(b"\0").decode()
