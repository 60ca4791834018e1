"""Events from outside that must not cost a run: SIGTERM, maintenance, hanging or dead processes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxmodel.distributed.startup import coordinator
from jaxmodel.errors import InputError

NOTICE_EVERY = 1.0  # seconds between two polls of the URL with maintenance notices
NO_NOTICE = "NONE"  # the text there when no maintenance is near, as on Google's cloud
STARTING = 20  # factor of a watchdog's patience during these phases, which are not steps:
LONG = ("start", "compile", "evaluate", "checkpoint")
BEAT = 2.0  # seconds between two reports of a rank on where it is
# environment variable with the id of the launcher that started this process as one of several
LAUNCHER = "JAXMODEL_LAUNCHER"
STUCK = 75  # exit code of a process whose watchdog gave up: try again (EX_TEMPFAIL)


@contextlib.contextmanager
def stop_signals(notices: str | None = None) -> Iterator[Callable[[int], bool]]:
    """Listen for SIGTERM, SIGINT and notices of maintenance while the context is open.

    With several processes all stop at the same step, whichever of them was told (through JAX's
    preemption service, which handles SIGTERM).

    Args:
      notices: a URL whose text is not NONE when maintenance is near; default: that of the machine's
        metadata server, if the environment variable GCE_METADATA_HOST names it.

    Yields:
      A function that takes a step and returns whether to save and stop there.
    """
    host = os.environ.get("GCE_METADATA_HOST")
    if notices is None and host:
        notices = f"http://{host}/computeMetadata/v1/instance/maintenance-event"
    told = threading.Event()
    done = threading.Event()
    many = jax.process_count() > 1
    served = jax.distributed.is_initialized()

    def tell(why: str) -> None:
        told.set()
        if many:
            # The preemption service gets the signal and tells the other processes.
            os.kill(os.getpid(), signal.SIGTERM)
        print(f"jaxmodel: {why}: saving and stopping", file=sys.stderr, flush=True)

    def hear(number: int, frame: Any) -> None:
        tell(signal.Signals(number).name)

    def follow(launcher: int) -> None:
        while not done.wait(NOTICE_EVERY):
            if os.getppid() != launcher:  # the launcher is gone, so nothing restarts this process
                return tell(f"process {launcher}, which started this one, is gone")

    def look() -> None:
        request = urllib.request.Request(str(notices), headers={"Metadata-Flavor": "Google"})
        while not done.wait(NOTICE_EVERY):
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
                if (text := answer.read(100).decode("utf-8", "replace").strip()) not in (
                    "",
                    NO_NOTICE,
                ):
                    return tell(f"maintenance notice ({text})")

    def stop(step: int) -> bool:
        if told.is_set() and not many:
            return True
        if not served:
            return False
        from jax.experimental import multihost_utils

        # Ask the service in a cluster of one too (an elastic run may shrink to it): it has recorded
        # what arrived before this context was opened.
        return multihost_utils.reached_preemption_sync_point(step)

    main = threading.current_thread() is threading.main_thread()
    numbers = [] if not main else [signal.SIGINT] if many else [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.signal(number, hear) for number in numbers}
    if notices:
        threading.Thread(target=look, name="notices", daemon=True).start()
    if os.environ.get(LAUNCHER) == str(launcher := os.getppid()):
        threading.Thread(target=follow, args=(launcher,), name="launcher", daemon=True).start()
    try:
        yield stop
    finally:
        done.set()
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """A context manager that names the rank that is stuck or gone, and ends a waiting process.

    With several processes, every rank reports where it is every two seconds (in JAX's key-value
    store). If there is no progress here for `seconds`, or communication with the others fails, the
    watchdog names the ranks that are silent or behind and prints the stacks of all threads. It then
    ends the process with code 75, without the usual synchronisation, which would hang.

    Args:
      seconds: the longest time without a step, in steady state; 0 for no limit.
      exits: the function that ends the process.
    """

    def __init__(self, seconds: float = 0.0, exits: Callable[[int], Any] = os._exit):
        self.seconds = seconds
        self._exits = exits
        self._place = "start"
        self._moved = time.monotonic()
        self._done = threading.Event()
        self._client = coordinator()

    def __enter__(self) -> Watchdog:
        if self.seconds > 0 or self._client is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: Any, *_: Any) -> None:
        if (
            self._client is not None
            and isinstance(error, Exception)
            and not isinstance(error, InputError)
        ):
            time.sleep(2 * BEAT)  # by then a rank that is gone is known to be silent
            self._end(f"an exchange failed ({' '.join(str(error).split())[:200]})")
        self._done.set()

    def at(self, place: str) -> None:
        """Record where this process is, such as 'step 7: compute'."""
        self._place = place
        self._moved = time.monotonic()

    def _watch(self) -> None:
        every = min(BEAT, self.seconds / 4) if self.seconds else BEAT
        while True:
            if self._client is not None:
                with contextlib.suppress(Exception):
                    # The coordinator may be gone. JAX itself then ends the process.
                    text = f"{time.time()} {time.monotonic() - self._moved} {self._place}"
                    self._client.key_value_set(
                        f"jaxmodel/place/{jax.process_index()}", text, allow_overwrite=True
                    )
            if self._done.wait(every):
                return
            patience = self.seconds * (STARTING if self._place.endswith(LONG) else 1)
            if self.seconds and time.monotonic() - self._moved > patience:
                self._end(f"no step for {self.seconds:.0f} s")
                return

    def _end(self, why: str) -> None:
        lines = [f"this process is at {self._place}"] if self._client is None else self._places()
        print(f"jaxmodel: {why}: {'; '.join(lines)}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self._exits(STUCK)

    def _places(self) -> list[str]:
        """Describe where each rank is: silent ranks first, then those with the least progress."""
        found: list[tuple[bool, float, str]] = []
        for rank in range(jax.process_count()):
            try:
                when, since, place = self._client.key_value_try_get(f"jaxmodel/place/{rank}").split(
                    " ", 2
                )
            except Exception:
                found.append((False, 0.0, f"rank {rank} has reported nothing yet"))
                continue
            silent = time.time() - float(when)
            state = (
                f"is gone or stuck: silent for {silent:.0f} s, last"
                if silent > 1.8 * BEAT
                else "is"
            )
            found.append((silent <= 1.8 * BEAT, -float(since), f"rank {rank} {state} at {place}"))
        return [text for _, _, text in sorted(found)]
