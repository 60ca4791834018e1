"""Damaged files and command lines, seeded: each must be refused in one line, or give a result; see
`run`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz import mutate, samples

SECONDS = 20.0
BYTES = 2 * 2**30
HERE = Path(__file__).resolve().parent


class Worker:
    """A process that reads cases, one after the other; made anew after it died or was ended."""

    def __init__(self, room: Path):
        self._room = room
        self.starts = 0
        self._process: subprocess.Popen[str] | None = None

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """How a case ended."""
        fresh = self._process is None
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        until, peak = (
            time.monotonic() + SECONDS + (60 if fresh else 0),
            0,
        )  # the first waits for imports
        while time.monotonic() < until and peak < 1.5 * BYTES:
            with contextlib.suppress(queue.Empty):
                if (line := self._answers.get(timeout=0.1)) is not None:
                    return json.loads(line)
                code = self._process.wait()
                self.close()
                return {
                    "end": f"died with {code}",
                    "said": self._log.read_text(errors="replace")[-2000:],
                    "peak": peak,
                }
            peak = max(peak, _resident(self._process.pid))
        self.close()
        return {"end": "memory" if peak >= 1.5 * BYTES else "hang", "said": "", "peak": peak}

    def _start(self) -> None:
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        }
        environ |= {
            "HOME": str(self._room / "home"),
            "JAXMODEL_CACHE": str(self._room / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        self._log = self._room / "worker.log"
        command = [sys.executable, "-P", "-m", "fuzz.worker"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._listener = threading.Thread(
            target=_listen, args=(self._process, self._answers), daemon=True
        )
        self._listener.start()
        self.starts += 1

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._listener.join()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            self._process = None


def _listen(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)


def _resident(process: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    return 0


def cases(room: Path, files: int, commands: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is damaged in words, and the case: files of all samples in turn, then command lines of
    all verbs in turn.
    """
    made = samples.make(room / "samples")
    for name, reader in made:  # whole, they must be read
        place = room / "cases" / f"{name}-{reader}"
        place.mkdir(parents=True)
        folder = mutate.copy(room / "samples" / name, place / "given")
        yield (
            f"whole {name} ({reader})",
            {"reader": reader, "folder": str(folder), "room": str(place)},
        )
    for i in range(files):
        name, reader = made[i % len(made)]
        place = room / "cases" / str(i)
        place.mkdir(parents=True)
        folder = mutate.copy(room / "samples" / name, place / "given")
        said = mutate.damage(folder, random.Random(f"{seed} file {i}"))
        yield (
            f"{i}: {name} ({reader}): {said}",
            {"reader": reader, "folder": str(folder), "room": str(place)},
        )
    for i, words in enumerate(bases(room / "samples")):
        yield (
            f"whole command {words!r:.300}",
            {"words": words, "room": str(_place(room, f"whole-command-{i}", words))},
        )
    for i in range(commands):
        base = bases(room / "samples")[i % len(bases(room / "samples"))]
        words = mutate.command(base, random.Random(f"{seed} command {i}"))
        if words[:1] == ["demo"]:
            words = words[1:]
        yield (
            f"command {i}: {words!r:.300}",
            {"words": words, "room": str(_place(room, f"command-{i}", base))},
        )


def bases(made: Path) -> list[list[str]]:
    """A whole command line of each verb, which does what it is for; `run` is a copy of a run's
    folder.
    """
    plain = str(made / "plain")
    text = str(made / "data.txt" / "a.txt")
    adapters = str(made / "adapters")
    short = ["--max-new-tokens", "2"]
    recipe = str(made / "recipe" / "mixed.yaml")
    training = ["--data", text, "--heldout", text, *samples.TRAINING, "--steps", "2"]
    return [
        ["generate", plain, "--prompt", "hi", *short, "--seed", "1", "--temperature", "0.5"],
        ["generate", plain, "--chat", "--prompt", "hi", *short],
        ["generate", plain, "--adapter", adapters, "--prompt", "hi", *short],
        ["eval", plain, "--data", text, "--window", "8", "--max-windows", "2"],
        ["compress", plain, "--recipe", "int8", "--out", "out"],
        [
            "compress",
            plain,
            "--recipe",
            recipe,
            "--rule",
            "blocks/0/attn/q=rtn(bits=4)",
            "--out",
            "out",
        ],
        ["merge", plain, "--adapter", adapters, "--out", "out"],
        ["summary", plain],
        ["models", "--json", "-"],
        ["predict", str(made / "classifier"), "--input", text, "--top", "1"],
        ["rerun", "run"],
        ["train", *training, *samples.NEW],
        ["train", "--model", plain, "--lora", "r=2", *training],
        ["resume", "trained", "--steps", "3"],
        ["replay", "trained", "--step", "2"],
    ]


def _place(room: Path, name: str, words: list[str]) -> Path:
    """The folder in which a command runs, with a copy of what it may write to."""
    (place := room / "cases" / name).mkdir(parents=True)
    if words[1] in ("run", "trained"):
        mutate.copy(room / "samples" / words[1], place / words[1])
    return place


def state(room: Path, but: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file outside of a case's own folder and of what a worker may
    write to.
    """
    found = {}
    for root in (room / "samples", room / "outside"):
        for path in root.rglob("*"):
            with contextlib.suppress(OSError):
                info = path.lstat()
                found[str(path)] = (info.st_size, info.st_mtime_ns)
    return found


def run(room: Path, files: int, commands: int, seed: int = 0, show: Any = None) -> dict[str, Any]:
    """Try so many of each; `{"right", "refused", "faults": [[case, end, said]], "peak"}`.

    Args:
      room: an empty folder.
      files: damaged files.
      commands: damaged command lines.
      seed: of the damage.
      show: called with each fault.
    """
    for name in ("home", "cache", "samples", "outside"):
        (room / name).mkdir(parents=True)
    (room / "outside" / "victim").write_text("mine")
    worker = Worker(room)
    counts = {"right": 0, "refused": 0}
    faults = []
    most = 0
    slowest = 0.0
    before: dict[str, tuple[int, int]] = {}
    try:
        for said, case in cases(room, files, commands, seed):
            before = before or state(room, Path(case["room"]))
            began = time.monotonic()
            whole = said.startswith("whole")
            found = worker.run({**case, "whole": whole})
            slowest = max(slowest, time.monotonic() - began)
            most = max(most, found["peak"])
            end = found["end"]
            if found["peak"] > BYTES:
                end = "memory"
            if state(room, Path(case["room"])) != before:
                end = "written outside"
                before = {}
            if whole and end == "refused":
                end = "refused, though it is whole"
            if end in counts:
                counts[end] += 1
            else:
                faults.append([said, end, found["said"]])
                if show is not None:
                    show(faults[-1])
            shutil.rmtree(case["room"], ignore_errors=True)
    finally:
        worker.close()
    return {**counts, "faults": faults, "peak": most, "slowest": slowest}
