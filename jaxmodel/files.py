"""Local files that may be somebody else's: opened only if they are regular ones, and read no further than a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from jaxmodel.errors import InputError

_NO_FILES = ("/proc/", "/sys/")  # what lies there says that it is a regular file, and is the system's memory


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to be read as bytes; a pipe, which could be waited for without end, a device or a folder is refused.

    Args:
      path: of the file; a link is followed.

    Raises:
      InputError: it is something else than a regular file.
      OSError: as `open`.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode) or os.path.realpath(path).startswith(_NO_FILES):
        os.close(handle)
        raise InputError(f"{os.fspath(path)}: no regular file; allowed: a file with its bytes on a disk")
    return open(handle, "rb")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """All of a regular file.

    Args:
      path: of the file.
      limit: bytes that it may have.

    Raises:
      InputError: it has more, or is no regular file.
      OSError: as `open`.
    """
    with open_regular(path) as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise InputError(f"{os.fspath(path)}: larger than {limit:,} bytes, which is the most that is read of such a file")
    return found
