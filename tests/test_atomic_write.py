"""atomic_write: whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxmodel.errors import InputError
from jaxmodel.files import atomic_write


def test_writes_text_and_bytes_and_leaves_nothing_beside(tmp_path):
    atomic_write(tmp_path / "a", "größer\n")
    atomic_write(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    atomic_write(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    place = atomic_write(tmp_path / "keys.json", "old")
    place.chmod(0o640)
    atomic_write(place, "new")
    assert (place.read_text(), place.stat().st_mode & 0o777) == ("new", 0o640)


def test_a_write_that_fails_halfway_keeps_the_old_file(tmp_path):
    """The kernel, not a mock, refuses the bytes past a size limit."""
    (tmp_path / "bundle").write_bytes(b"old")
    program = (
        "import resource, sys; from jaxmodel.files import atomic_write\n"
        "from jaxmodel.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: atomic_write(sys.argv[1], bytes(100_000))\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bundle")], capture_output=True, text=True
    )
    assert "bundle' cannot be written (File too large)" in done.stdout, done.stderr
    assert (tmp_path / "bundle").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_devices_are_written_to_not_replaced():
    atomic_write("/dev/null", b"x")
    assert not os.path.isfile("/dev/null")
    if os.path.exists("/dev/full"):
        with pytest.raises(InputError, match="No space left"):
            atomic_write("/dev/full", b"x")


@pytest.mark.parametrize("place", ["missing/file", "."])
def test_a_path_that_cannot_be_is_refused(tmp_path, place):
    with pytest.raises(InputError, match=r"^path: .* cannot be written .*; allowed: .*$"):
        atomic_write(tmp_path / place, b"x")
    assert os.listdir(tmp_path) == []
