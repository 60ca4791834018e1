"""Local files: read only if regular and within a limit, written completely or not at all.

Nothing is written through a link.
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

# files there claim to be regular, but are memory of the system
_NO_FILES = (
    "/proc/",
    "/sys/",
)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading bytes.

    Devices, folders and pipes, which could block for ever, are refused.

    Args:
      path: the path of the file; a link is followed.

    Raises:
      InputError: it is not a regular file.
      OSError: as for `open`.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode) or os.path.realpath(path).startswith(_NO_FILES):
        os.close(handle)
        raise InputError(f"{os.fspath(path)}: not a regular file; allowed: a regular file")
    return open(handle, "rb")


def read_bytes(path: str | Path, limit: int | float) -> bytes:
    """Read all of a regular file.

    Args:
      path: the path of the file.
      limit: the largest size in bytes.

    Raises:
      InputError: the file is larger, or not a regular file.
      OSError: as for `open`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # `read` allocates as many bytes as it is asked for
        found = file.read(size + 1) if size <= limit else b""
    if max(size, len(found)) > limit:
        raise InputError(
            f"{os.fspath(path)}: larger than {limit:,.0f} bytes, the largest size that is read of "
            "such a file"
        )
    return found


def check_writable(folder: str | Path) -> None:
    """Check before the work that a folder can be written; for a missing one, the next above.

    Raises:
      OSError: as when a folder is made there.
    """
    place = Path(os.path.abspath(folder))
    os.rmdir(
        tempfile.mkdtemp(
            prefix=".", dir=next(one for one in (place, *place.parents) if one.exists())
        )
    )


def open_own(path: str | Path) -> TextIO:
    """Open a file of ours in a user's folder for reading and appending (a log, a lock).

    It is made if it is missing.

    Raises:
      InputError: the path is a link, which could lead to a file of somebody else, or no regular
        file.
      OSError: as for `open`.
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
                f"{os.fspath(path)}: not a regular file, so nothing is written; remove it first"
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(
            f"{os.fspath(path)}: not a regular file, so nothing is written; remove it first"
        )
    return open(handle, "a+", encoding="utf-8")


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that a crash or a full disk leaves the old one complete.

    The data is written beside it, synced, and renamed.

    Args:
      path: a file in an existing folder. A device or a pipe (`/dev/null`) is written to, never
        replaced.
      data: the content; text is written as UTF-8.

    Returns:
      `path`.

    Raises:
      InputError: the file cannot be written; the old one is unchanged.
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
    """Open a new file that replaces `path` if the block succeeds; else nothing changes.

    Raises:
      OSError: as for `open`.
    """
    target = Path(path)
    # a name of its own, since the target's name may already have the largest length
    beside = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            # the new file has the permissions of the old one
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # the new file is in place; some file systems cannot sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
