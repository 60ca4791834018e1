"""Local files: only regular ones are read, up to a limit; no link is written on; what is written is
whole or not there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, TextIO

from jaxmodel.errors import InputError

_NO_FILES = (
    "/proc/",
    "/sys/",
)  # what lies there says that it is a regular file, and is the system's memory


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to be read as bytes; a pipe, which could be waited for without end, a device or a
    folder is refused.

    Args:
      path: of the file; a link is followed.

    Raises:
      InputError: it is something else than a regular file.
      OSError: as `open`.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode) or os.path.realpath(path).startswith(_NO_FILES):
        os.close(handle)
        raise InputError(
            f"{os.fspath(path)}: no regular file; allowed: a file with its bytes on a disk"
        )
    return open(handle, "rb")


def read_bytes(path: str | Path, limit: int | float) -> bytes:
    """All of a regular file.

    Args:
      path: of the file.
      limit: bytes that it may have.

    Raises:
      InputError: it has more, or is no regular file.
      OSError: as `open`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        found = (
            file.read(size + 1) if size <= limit else b""
        )  # what `read` is asked for it makes room for
    if max(size, len(found)) > limit:
        raise InputError(
            f"{os.fspath(path)}: larger than {limit:,.0f} bytes, which is the most that is read "
            f"of such a file"
        )
    return found


def check_writable(folder: str | Path) -> None:
    """Refuse a folder in which nothing could be made, of one that is not there yet the next above:
    to be asked before the work.

    Raises:
      OSError: as making a folder there.
    """
    place = Path(os.path.abspath(folder))
    os.rmdir(
        tempfile.mkdtemp(
            prefix=".", dir=next(one for one in (place, *place.parents) if one.exists())
        )
    )


def open_own(path: str | Path) -> TextIO:
    """Open a file of ours in somebody's folder to be read and appended to (a log, a lock); it is
    made where there is none.

    Raises:
      InputError: what has this name is a link, which could lead to a file of another, or no regular
        file.
      OSError: as `open`.
    """
    flags = (
        os.O_RDWR
        | os.O_CREAT
        | os.O_APPEND
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_CLOEXEC", 0)
    )
    try:
        handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if os.path.islink(path) or error.errno == errno.ENXIO:  # a pipe that nobody reads
            raise InputError(
                f"{os.fspath(path)}: no regular file; nothing is written there: remove it"
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{os.fspath(path)}: no regular file; nothing is written there: remove it")
    return open(handle, "a+", encoding="utf-8")


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that a crash or a full disk leaves the old one whole: write beside it, fsync,
    rename.

    Args:
      path: a file in an existing folder. A device or a pipe (`/dev/null`) is written to, never
        replaced.
      data: the content; text is written as UTF-8.

    Returns:
      `path`.

    Raises:
      InputError: the file cannot be written; what was there before still is.
    """
    raw = data.encode() if isinstance(data, str) else data
    try:
        if _is_special(path):
            Path(path).write_bytes(raw)
        else:
            with replacing_file(os.path.realpath(path)) as file:
                file.write(raw)
    except OSError as error:
        why = (
            f"cannot be written ({error.strerror}); allowed: a file in an existing, writable "
            f"folder with enough space"
        )
        raise InputError(f"path: {os.fspath(path)!r} {why}") from error
    return Path(path)


def _is_special(path: str | os.PathLike[str]) -> bool:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path`, or comes to be there, when the block ends
    well; else nothing changes.

    Raises:
      OSError: as `open`.
    """
    target = Path(path)
    beside = (
        target.parent / f".{secrets.token_hex(8)}.tmp"
    )  # the target's own name may be as long as allowed
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(
            FileNotFoundError
        ):  # who may read the old file, and nobody else, may read the new one
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(
        OSError
    ):  # the new file is in place; some file systems cannot sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
