"""The run folder of a verb: a new one, or the one of a run that goes on; with several processes one for all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxmodel import report
from jaxmodel.cli.options import Common


def of_run(name: str, options: Common, resumed: str | None) -> report.Run:
    """The folder. Of several processes the first has the run's own, the others `rank-<i>/` inside of it."""
    import jax

    config = {"verb": name, **dataclasses.asdict(options)}
    rank = jax.process_index()
    if rank == 0:
        folder = report.start_run(name, config, options.runs) if resumed is None else report.read_run(resumed)
        if resumed is not None:
            folder = dataclasses.replace(folder, versions=report.versions())  # those of now; the file keeps those of then
    if jax.process_count() > 1:
        place = _told(str(folder.folder.absolute()) if rank == 0 else "")
        if rank:
            own = Path(place, f"rank-{rank}")
            own.mkdir(exist_ok=True)
            folder = report.Run(own, report.to_plain(config), report.versions())
    return folder


def _told(text: str) -> str:
    """The text of process 0, in all of them."""
    import numpy as np
    from jax.experimental import multihost_utils

    room = np.zeros(4096, np.uint8)
    raw = text.encode()
    room[: len(raw)] = np.frombuffer(raw, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))).rstrip(b"\0").decode()
