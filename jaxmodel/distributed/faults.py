"""What comes from outside and must not cost a run:

SIGTERM, notices of maintenance, a process that hangs or is gone.
"""

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

NOTICE_EVERY = 1.0  # seconds between two looks at the place of maintenance notices
NO_NOTICE = "NONE"  # what stands there otherwise, as on Google's cloud
STARTING = 20  # times as long a watchdog waits for what is no step of steady state:
LONG = ("start", "compile", "evaluate", "checkpoint")
BEAT = 2.0  # seconds between two words of a rank on where it is
# the variable with the number of the process that started this one as one of several
LAUNCHER = "JAXMODEL_LAUNCHER"
STUCK = 75  # the exit code of a process whose watchdog gave up: try again (EX_TEMPFAIL)


@contextlib.contextmanager
def stop_signals(notices: str | None = None) -> Iterator[Callable[[int], bool]]:
    """A function of the step that says whether to save and stop there: after SIGTERM, SIGINT, or a
    notice of maintenance.

    With several processes all stop at the same step, whichever was told (JAX's preemption service,
    which takes SIGTERM).

    Args:
      notices: a URL whose text is anything but NONE when maintenance is near; default that of the
        machine's metadata server, if the environment variable GCE_METADATA_HOST names it.
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
            os.kill(
                os.getpid(), signal.SIGTERM
            )  # which the preemption service hears, and tells the others
        print(f"jaxmodel: {why}: saving and stopping", file=sys.stderr, flush=True)

    def hear(number: int, frame: Any) -> None:
        tell(signal.Signals(number).name)

    def follow(launcher: int) -> None:
        while not done.wait(NOTICE_EVERY):
            if os.getppid() != launcher:  # nobody would start this process again, or look after it
                return tell(f"process {launcher}, which started this one, is gone")

    def look() -> None:
        request = urllib.request.Request(str(notices), headers={"Metadata-Flavor": "Google"})
        while not done.wait(NOTICE_EVERY):
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
                if (text := answer.read(100).decode("utf-8", "replace").strip()) not in (
                    "",
                    NO_NOTICE,
                ):
                    return tell(f"notice of maintenance ({text})")

    def stop(step: int) -> bool:
        if told.is_set() and not many:
            return True
        if not served:
            return False
        from jax.experimental import multihost_utils

        # also of a cluster of one, as an elastic run may be: what was said before this began, that
        # service heard
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
    """Says which rank is stuck or gone, and ends a process that waits for it; a context manager.

    With several processes every rank tells where it is every other second (JAX's key-value store).
    When nothing has moved here for `seconds`, or an exchange with the others failed, the ranks that
    tell nothing any more, or that are behind the others, are named, the stacks of all threads are
    printed, and the process ends with code 75, without the exchange at the end that would hang.

    Args:
      seconds: without a step, in steady state; 0 for never.
      exits: what ends the process.
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
            time.sleep(2 * BEAT)  # until one who is gone is silent
            self._end(f"an exchange failed ({' '.join(str(error).split())[:200]})")
        self._done.set()

    def at(self, place: str) -> None:
        """This process came to a place, such as 'step 7: compute'."""
        self._place = place
        self._moved = time.monotonic()

    def _watch(self) -> None:
        every = min(BEAT, self.seconds / 4) if self.seconds else BEAT
        while True:
            if self._client is not None:
                with contextlib.suppress(
                    Exception
                ):  # the coordinator may be gone: JAX itself ends the process then
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
        """Where each rank is: first those that are silent, then those that moved least."""
        found: list[tuple[bool, float, str]] = []
        for rank in range(jax.process_count()):
            try:
                when, since, place = self._client.key_value_try_get(f"jaxmodel/place/{rank}").split(
                    " ", 2
                )
            except Exception:
                found.append((False, 0.0, f"rank {rank} told nothing yet"))
                continue
            silent = time.time() - float(when)
            state = (
                f"is gone or stuck: silent for {silent:.0f} s, last"
                if silent > 1.8 * BEAT
                else "is"
            )
            found.append((silent <= 1.8 * BEAT, -float(since), f"rank {rank} {state} at {place}"))
        return [text for _, _, text in sorted(found)]
