"""`jaxmodel launch`: start the processes of a run of `train` on this machine.

It is a verb of its own because its options are not those of the training: each process is a
`jaxmodel resume RUN`, which knows nothing about who started it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from jaxmodel.cli.options import Launch, Train
from jaxmodel.errors import InputError


def with_mesh(options: Launch, work: Train) -> Train:
    """Return the options of the run; without a mesh its devices share the rows of each batch."""
    return work if work.mesh is not None else dataclasses.replace(work, mesh="data=*")


def prepare(options: Launch, work: Train) -> None:
    """Refuse what no run could be made of, and simulate the devices of all processes in this one.

    This process only starts the others, and rehearses as if their devices were its own.

    Raises:
      InputError: says which option it is.
    """
    from jaxmodel import sharding
    from jaxmodel.cli import refusals

    if work.devices != 1:
        raise InputError(
            f"--devices: {work.devices} given with launch; allowed: --devices-per-process"
        )
    if not _fits(options, work, options.processes):
        raise InputError(
            f"--batch: {work.batch} rows do not divide over {options.processes} processes of "
            f"{options.devices_per_process} devices"
        )
    if "regrow" in _given(options) and not options.elastic:
        raise InputError("--regrow: given without --elastic, so it does nothing")
    if os.environ.get("JAX_CPU_COLLECTIVES_IMPLEMENTATION") == "mpi":
        raise InputError(
            f"--processes: {options.processes} given; with MPI, start them by mpirun or srun"
        )
    refusals.check(work)
    sharding.simulate_devices(options.processes * options.devices_per_process)


def run(options: Launch, work: Train, folder: Any) -> dict[str, Any]:
    """Start the processes, each of which goes on with the run in this folder; return its results.

    Raises:
      InputError: a process failed.
    """
    from jaxmodel.cli import training
    from jaxmodel.distributed import launch

    folder.config["launch"] = _record(options)
    folder.save_json("config.json", folder.config)
    if work.init is None and work.model is None:
        training.rehearse(work)
    launch.launch(
        ["-m", "jaxmodel", "resume", str(folder.folder)],
        processes=options.processes,
        devices=options.devices_per_process,
        logs=Path(folder.folder),
        elastic=options.elastic,
        regrow=options.regrow,
        fits=lambda processes: _fits(options, work, processes),
        finished=lambda: _report(folder).get("stopped") is False,
    )
    if not (found := _report(folder)):
        raise InputError(f"launch: the processes left no report in {os.fspath(folder.folder)!r}")
    return found


def _record(options: Launch) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(options).items() if key != "command"}


def _given(options: Launch) -> set[str]:
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    return {name for name, value in fields.items() if getattr(options, name) != value}


def _fits(options: Launch, work: Train, processes: int) -> bool:
    return work.batch % (processes * options.devices_per_process) == 0


def _report(folder: Any) -> dict[str, Any]:
    """Return what the first process wrote at its end; nothing if it did not get there."""
    try:
        return json.loads(Path(folder.folder, "report.json").read_text())
    except (OSError, ValueError):
        return {}
