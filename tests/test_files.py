"""Whose files are read and written, and whose code is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxmodel import report
from jaxmodel.checkpoint import Checkpoints
from jaxmodel.distributed import GoodputRecorder, launch
from jaxmodel.errors import InputError
from jaxmodel.files import open_own, open_regular, read_bytes

REPO = Path(__file__).resolve().parents[1]


def test_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(file)
    assert read_bytes(tmp_path / "link", 3) == b"abc"
    with pytest.raises(InputError, match="larger than 2 bytes"):
        read_bytes(file, 2)
    os.truncate(file, 2**40)  # it takes no room on the disk, and none in memory
    with pytest.raises(InputError, match="larger than 10 bytes"):
        read_bytes(file, 10)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/proc/self/environ", tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            open_regular(path)


def _lock(folder: Path) -> Any:
    return Checkpoints(folder)


def _metrics(folder: Path) -> Any:
    return report.Run(folder, {}, {}).log(loss=1.0)


def _report(folder: Path) -> Any:
    return report.Run(folder, {}, {}).save_json("report.json", {})


def _ledger(folder: Path) -> Any:
    return GoodputRecorder(folder / "ledger.jsonl").close()


def _rank(folder: Path) -> Any:
    return launch.launch(["-c", ""], processes=2, logs=folder)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        (".lock", _lock),
        ("metrics.jsonl", _metrics),
        ("report.json", _report),
        ("ledger.jsonl", _ledger),
        ("rank-1.log", _rank),
    ],
)
@pytest.mark.parametrize("there", ["link", "dangling", "pipe", "device"])
def test_nothing_is_written_elsewhere(name: str, write: Any, there: str, tmp_path: Path) -> None:
    """A folder that somebody prepared has a link or a pipe where a run writes: refused, and not
    waited for.
    """
    folder = tmp_path / "run"
    victim = tmp_path / "victim"
    folder.mkdir()
    if there == "link":
        victim.write_text("mine")
    if there == "pipe":
        os.mkfifo(folder / name)
        if name == "report.json":  # what is piped there is asked for by name, as of /dev/stdout
            return
    else:
        (folder / name).symlink_to("/dev/null" if there == "device" else victim)
    with pytest.raises(InputError):
        write(folder)
    assert not victim.exists() or victim.read_text() == "mine"


def test_logs_grow(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        with open_own(tmp_path / "log") as file:
            file.write(line)
    assert (tmp_path / "log").read_text() == "a\nb\n"


def test_files_of_the_current_folder_are_no_programs(tmp_path: Path) -> None:
    """Neither the command nor the processes that it starts import what lies where they are
    started.
    """
    for name in ("tyro", "numpy", "rich", "optax", "json"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n"
        )
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [
        sys.executable,
        "-m",
        "jaxmodel",
        "models",
        "--json",
        "-",
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, check=False)
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr.decode()
    start = (
        "import pathlib; from jaxmodel.distributed import launch as l; l.launch({}, "
        "processes=2, logs=pathlib.Path())"
    )
    start = start.format(["-m", "jaxmodel", "models", "--runs", "r"])
    done = subprocess.run(
        [sys.executable, "-P", "-c", start],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr.decode()
