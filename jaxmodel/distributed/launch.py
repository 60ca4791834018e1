"""Start several processes of one run on this machine, as a cluster would, and watch them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxmodel.distributed.faults import LAUNCHER, STUCK
from jaxmodel.errors import InputError, at_least
from jaxmodel.files import open_own
from jaxmodel.sharding import simulation

POLL = 0.1  # seconds


def launch(
    command: Sequence[str],
    *,
    processes: int,
    devices: int = 1,
    logs: Path,
    elastic: bool = False,
    regrow: float = 30.0,
    fits: Callable[[int], bool] = lambda processes: True,
    finished: Callable[[], bool] = lambda: False,
    restarts: int = 100,
) -> list[dict[str, object]]:
    """Run a Python command in several processes until all of them succeed.

    Each gets JAX's cluster settings in its environment. Process 0 writes to the standard error of
    this one, the others to `rank-<i>.log`. If one dies it is named and the others, which would wait
    for it for ever, are ended. An elastic run is then started again with one process fewer (or with
    as many, if one was only stuck). After `regrow` seconds it is told to save and is started with
    all processes again.

    Args:
      command: arguments of Python.
      processes: number of processes.
      devices: number of simulated devices in each process.
      logs: folder of the logs.
      elastic: start again after a process has died.
      regrow: seconds until an elastic run is started with all processes again.
      fits: number of processes -> whether the run can have so many (a batch must divide).
      finished: tells whether the run was complete when it was told to save.
      restarts: the largest number of restarts.

    Returns:
      The events: `{"time", "event": "start" | "died" | "regrow" | "end", "processes", ...}`.

    Raises:
      InputError: a process died and the run is not elastic, or no process was left.
    """
    at_least("processes", processes)
    at_least("devices_per_process", devices)
    if not fits(processes):
        raise InputError(
            f"batch: its rows cannot be divided among {processes} processes of {devices} devices"
        )
    events: list[dict[str, object]] = []
    now = processes
    attempts = 0

    def note(event: str, **more: object) -> None:
        events.append({"time": time.time(), "event": event, "processes": now, **more})

    def regrows() -> None:
        note("regrow")
        _say(f"returning to {processes} processes: the present {now} save and stop")

    with _signals() as told:
        while True:
            note("start")
            world = _start(command, now, devices, logs)
            until = time.monotonic() + regrow if now < processes else math.inf
            asked, dead = _wait(world, told, until, regrows)
            if not dead and asked and now < processes and not told.is_set() and not finished():
                now = processes
                continue
            if not dead:
                note("end")
                return events
            rank, code = dead[0]
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            note("died", rank=rank, how=how)
            _end(world)
            what = f"rank {rank} of {now} ended {how}"
            shown = _tail(logs / f"rank-{rank}.log") if rank else ""
            # 2: bad input, which a restart does not mend
            if code == 2 or not elastic or told.is_set():
                raise InputError(f"train: {what}; the others were stopped{shown}")
            attempts += 1
            fewer = next((n for n in range(now - 1, 0, -1) if fits(n)), 0)
            now = now if code == STUCK else fewer
            if not now or attempts > restarts:
                raise InputError(
                    f"train: {what}, and the batch cannot be divided among fewer processes"
                )
            _say(f"{what}: going on with {now}{shown}")


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGINT sets while the context is open."""
    told = threading.Event()
    hear = lambda number, frame: told.set()
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    world: list[subprocess.Popen[bytes]],
    told: threading.Event,
    until: float,
    regrows: Callable[[], None],
) -> tuple[bool, list[tuple[int, int]]]:
    """Wait until all processes have ended, or one has failed.

    Args:
      world: the processes.
      told: when it is set, the processes are asked to save and stop.
      until: the time at which they are asked too.
      regrows: called before they are asked because of the time.

    Returns:
      Whether they were asked, and the ranks and exit codes of those that failed.
    """
    asked = False
    while True:
        time.sleep(POLL)
        codes = [one.poll() for one in world]
        if not asked and (told.is_set() or time.monotonic() > until):
            asked = True
            if not told.is_set():
                regrows()
            _tell(world, signal.SIGTERM)
        if any(codes) or None not in codes:
            break
    dead = [(rank, code) for rank, code in enumerate(codes) if code]
    if asked and all(code == -signal.SIGTERM for _, code in dead):
        # the signal came before it was handled: there was nothing to save yet
        _end(world)
        dead = []
    return asked, dead


def _start(
    command: Sequence[str], processes: int, devices: int, logs: Path
) -> list[subprocess.Popen[bytes]]:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # import a module from where it is installed, never from the current folder
    safe = ["-P"] if command[:1] == ["-m"] else []
    world = []
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open_own(logs / f"rank-{rank}.log")) for rank in range(1, processes)
        ]
        for rank, log in enumerate([None, *files]):
            environ = {
                **os.environ,
                **simulation(devices),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(rank),
                LAUNCHER: str(os.getpid()),
            }
            # The caller prints the result of process 0 itself, when all have ended.
            out = log or subprocess.DEVNULL
            world.append(
                subprocess.Popen(
                    [sys.executable, *safe, *command], env=environ, stdout=out, stderr=log
                )
            )
    return world


def _tell(world: list[subprocess.Popen[bytes]], number: int) -> None:
    for one in world:
        with contextlib.suppress(ProcessLookupError):
            one.send_signal(number)


def _end(world: list[subprocess.Popen[bytes]]) -> None:
    """Kill the remaining processes: they wait for the dead one and cannot save."""
    for one in world:
        with contextlib.suppress(ProcessLookupError):
            one.kill()
        one.wait()


def _tail(log: Path) -> str:
    lines = (
        [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if log.exists()
        else []
    )
    return f"; its last line: {lines[-1][:300]}" if lines else ""


def _say(line: str) -> None:
    print(f"jaxmodel: {line}", file=sys.stderr, flush=True)
