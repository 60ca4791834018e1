"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from jaxmodel.errors import InputError


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that a crash or a full disk leaves the old one whole: write beside it, fsync, rename.

    Args:
      path: a file in an existing folder. A device or a pipe (`/dev/null`) is written to, never replaced.
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
            _replace(Path(os.path.realpath(path)), raw)
    except OSError as error:
        why = f"cannot be written ({error.strerror}); allowed: a file in an existing, writable folder with enough space"
        raise InputError(f"path: {os.fspath(path)!r} {why}") from error
    return Path(path)


def _is_special(path: str | os.PathLike[str]) -> bool:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _replace(target: Path, raw: bytes) -> None:
    beside = target.parent / f".{secrets.token_hex(8)}.tmp"  # the target's own name may be as long as allowed
    try:
        with open(beside, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):  # who may read the old file, and nobody else, may read the new one
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new file is in place; some file systems cannot sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
