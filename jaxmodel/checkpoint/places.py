"""Files of checkpoints, in a folder or a bucket: list, digest, lock, move, read and write them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxmodel import files
from jaxmodel.data.storage import is_remote
from jaxmodel.errors import InputError
from jaxmodel.files import atomic_write
from jaxmodel.limits import limits

READERS = 8  # files that are read at the same time for their digests


def fresh(url: str) -> str:
    """Return the URL unchanged, and switch off fsspec's cache of listings for its protocol.

    Arrays are written without fsspec, so what it has cached would be out of date.
    """
    protocol = url.partition("://")[0]
    with contextlib.suppress(ImportError):  # reported when the folder is looked for
        import fsspec.config

        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return url


def digests(place: Any, but: str) -> dict[str, Any]:
    """Return the size and SHA-256 of each file by name.

    Remote files have None as SHA-256, since object stores verify contents themselves.
    """
    remote = is_remote(str(place))
    found = {name: size for name, size in sorted(sizes(place).items()) if name != but}
    with ThreadPoolExecutor(READERS) as pool:
        taken = pool.map(lambda name: None if remote else digest(place / name), found)
        return {
            name: [size, sha256] for (name, size), sha256 in zip(found.items(), taken, strict=True)
        }


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from saving in a folder; other threads of this process may."""
    with files.open_own(folder / ".lock") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise InputError(
                f"checkpoints: {who} is saving to {str(folder)!r}; stop it first, or use another "
                "folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def sizes(place: Any) -> dict[str, int]:
    """Return the size in bytes of every file in a folder and below, by name."""
    if is_remote(str(place)):
        store, base = _store(place)
        return {
            name.removeprefix(f"{base}/"): entry["size"]
            for name, entry in store.find(base, detail=True).items()
        }
    files = (file for file in Path(place).rglob("*") if file.is_file())
    return {file.relative_to(place).as_posix(): file.stat().st_size for file in files}


def move(place: Any, aside: Any, first: str) -> None:
    """Rename a folder.

    In a bucket its files are moved one after another, beginning with that of the name `first`.
    """
    if not is_remote(str(place)):
        place.rename(aside)
        return
    store, base = _store(place)
    for name in sorted(sizes(place), key=lambda name: name != first):
        store.cp_file(f"{base}/{name}", str(aside / name))
        store.rm_file(f"{base}/{name}")


def _store(place: Any) -> tuple[Any, str]:
    import fsspec

    return fsspec.url_to_fs(str(place))


def digest(file: Any) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with files.open_regular(str(file)) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read(file: Any) -> bytes:
    """Read a whole file; a local one must be within the limit `json_bytes`."""
    return (
        file.read_bytes()
        if is_remote(str(file))
        else files.read_bytes(str(file), limits().json_bytes)
    )


def write(file: Any, text: str) -> None:
    """Write a file completely or not at all."""
    if is_remote(str(file)):
        file.write_text(text)  # an object store shows it whole or not at all
    else:
        atomic_write(str(file), text)
