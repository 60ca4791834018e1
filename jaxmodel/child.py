"""Child processes that try programs and files of others, with limits of time and memory.

If such a process hangs or dies, that is an answer, and the process that asked goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.limits import limits, way

_living: list[Child] = []


class Child:
    """A process that answers one question at a time, each a line of JSON.

    The first question starts it, and after its end the next question starts it again.
    """

    def __init__(self, script: Path):
        self._script = script
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        _living.append(self)

    def ask(self, what: Any, seconds: float, memory: int) -> Any | None:
        """Ask the process; return its answer, or None if it was too slow or large, or died.

        Args:
          what: the question, plain data.
          seconds: the longest time for the answer.
          memory: limit of the process in bytes, Python included; a running process keeps that of
            its first question.

        Raises:
          InputError: `what` is not plain data.
        """
        try:
            line = json.dumps(what) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"not plain JSON data: {error}") from None
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = [sys.executable, "-P", str(self._script), str(memory)]
                pipe = subprocess.PIPE
                self._process = subprocess.Popen(
                    command,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                    # threads reserve memory
                    env={
                        **os.environ,
                        "TOKENIZERS_PARALLELISM": "false",
                        "MALLOC_ARENA_MAX": "2",
                    },
                )
            process = self._process
            late = threading.Timer(seconds, process.kill)
            late.start()
            try:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(line)
                process.stdin.flush()
                said = process.stdout.readline()
            except BrokenPipeError:
                said = ""
            finally:
                late.cancel()
            if not said:
                self.end()
        return json.loads(said) if said else None

    def end(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None:
            process = self._process
            self._process = None
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()


@atexit.register
def _end() -> None:
    for one in _living:
        one.end()


READER = Child(Path(__file__).with_name("child_reader.py"))
"""The process that first reads files which could crash a library; see `tried`."""


def tried(kind: str, path: str | Path, what: str, **more: Any) -> None:
    """Read a file in a child process first, so that it cannot stop this one.

    Args:
      kind: the name of a function in child_reader.py.
      path: the path of the file.
      what: the beginning of the message: "data: 'a.parquet' is not a complete Parquet file".
      **more: further arguments of that function.

    Raises:
      InputError: the file could not be read there, or took more than `limits` allow.
    """
    seconds = limits().file_seconds * max(os.path.getsize(path) / 2**28, 1)
    memory = int(limits().file_memory)
    # the child may have been started in another folder
    said = READER.ask([kind, os.path.abspath(path), more], seconds, memory)
    if said is None:
        most = (
            f"{seconds:g} seconds and {memory / 2**30:g} GiB ({way('file_seconds', 'file_memory')})"
        )
        raise InputError(f"{what}: reading it crashes, or takes more than {most}")
    if said:
        raise InputError(f"{what}: {' '.join(said.split())[:500]}")
