"""Files by path or URL (`https://`, `gs://`, `s3://`, `hf://`), and arrays in them.

Only regular local files are read, and no other kinds of URL are opened: some that fsspec knows lead
to other local files, to nested archives, or to any server of the network.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxmodel.errors import InputError, require
from jaxmodel.files import open_regular, replacing_file
from jaxmodel.limits import limits, way

type Where = str | Path
"""A path, or a URL as a str."""

PROTOCOLS = ("https", "gs", "s3", "hf")
LONGEST = 2**27
"""Largest number of bytes of a line, and of a local file that is read into memory as a text."""
_BLOCK = 2**20  # bytes
# bytes of a local file that are hashed rather than believed to be those of its time of change
_CONTENT_UP_TO = 2**26


def is_remote(path: Where) -> bool:
    """Return whether fsspec reads the path, a URL such as `gs://bucket/a.txt`."""
    return isinstance(path, str) and "://" in path


def check_protocol(url: str, argument: str = "data", allowed: Sequence[str] | None = None) -> None:
    """Refuse URLs of other protocols, and chained URLs.

    A `filecache::` or `simplecache::` in front is allowed.

    Args:
      url: the URL.
      argument: its name in the message.
      allowed: the allowed protocols; default: `PROTOCOLS`.

    Raises:
      InputError: another protocol.
    """
    known = PROTOCOLS if allowed is None else allowed
    rest = re.sub("^(filecache|simplecache)::", "", url)
    if rest.partition("://")[0] not in known or "::" in rest:
        kinds = ", ".join(f"{one}://" for one in known)
        raise InputError(f"{argument}: {url!r} given; allowed: local files, and URLs of {kinds}")


def join(folder: Where, name: str) -> str:
    """Return the path of a file in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


@contextmanager
def naming(path: Where) -> Iterator[None]:
    """Turn errors of reading or writing `path` into an `InputError` that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = (
            getattr(error, "strerror", None)
            or str(error).strip().partition("\n")[0]
            or type(error).__name__
        )
        raise InputError(f"data: {str(path)!r} cannot be read or written: {reason}") from None


@contextmanager
def reading(path: str, unpack: bool = True) -> Iterator[Any]:
    """Open a file to stream its bytes; a file that ends in `.gz` is decompressed."""
    with naming(path), ExitStack() as stack:
        if is_remote(path):
            fs, inside = _remote(path)
            file = stack.enter_context(fs.open(inside, "rb"))
        else:
            file = stack.enter_context(open_regular(path))
        if unpack and path.endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        yield file


def lines(path: str, most: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, decompressed.

    Args:
      path: the path of the file.
      most: largest number of bytes of all lines; None for any number.

    Raises:
      InputError: more bytes, a line longer than `LONGEST`, or more white space in a row than a text
        holds.
    """
    with reading(path) as file:
        blank = 0
        total = 0
        while line := file.readline(LONGEST + 1):
            blank = 0 if line.strip() else blank + len(line)
            if len(line) > LONGEST or blank > LONGEST // 8:
                what = (
                    f"a line is longer than {LONGEST:,} bytes"
                    if blank == 0
                    else "it ends in too much white space"
                )
                raise InputError(f"data: {path!r} cannot be read: {what}")
            if most is not None and (total := total + len(line)) > most:
                raise InputError(
                    f"data: {path!r} cannot be read: it is larger than the {most:,} bytes that are "
                    "held at once"
                )
            yield line


@contextmanager
def writing(path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing, in a folder that is made; a local one appears only when complete."""
    with naming(path):
        if is_remote(path):
            fs, inside = _remote(path)
            fs.makedirs(fs._parent(inside), exist_ok=True)
            with fs.open(inside, "wb") as file:
                yield file
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(target) as file:
            yield file


@contextmanager
def local(path: str) -> Iterator[str]:
    """Yield the path of a local file with the bytes of `path`.

    It is `path` itself, or for a remote file a copy, which is deleted when the block ends.

    Raises:
      InputError: the file is remote and larger than the limit `download_bytes`.
    """
    if not is_remote(path):
        yield path
        return
    most = limits().download_bytes
    with tempfile.TemporaryDirectory() as folder:
        copied = os.path.join(folder, "file")
        size = 0
        with reading(path, unpack=False) as source, open(copied, "xb") as target:
            # its length is counted, since a server can claim any
            while block := source.read(_BLOCK):
                size += len(block)
                if size > most:
                    raise InputError(
                        f"data: {path!r} is larger than {most:,.0f} bytes, the most that is "
                        f"fetched of a file ({way('download_bytes')})"
                    )
                target.write(block)
        yield copied


def remove(path: str) -> None:
    """Delete a file if it exists and may be deleted."""
    with suppress(OSError):
        if is_remote(path):
            fs, inside = _remote(path)
            fs.rm_file(inside)
        else:
            os.unlink(path)


def sizes(folder: Where) -> dict[str, int]:
    """Return the bytes of each file in a folder, by name; nothing if there is no such folder."""
    with naming(folder):
        try:
            if is_remote(folder):
                fs, inside = _remote(str(folder))
                fs.invalidate_cache(inside)  # another process may have written since
                return {
                    Path(e["name"]).name: e["size"]
                    for e in fs.ls(inside, detail=True)
                    if e["type"] == "file"
                }
            with os.scandir(folder) as entries:
                return {entry.name: size for entry in entries if (size := _size(entry)) is not None}
        except (FileNotFoundError, NotADirectoryError):
            return {}


def _size(entry: os.DirEntry[str]) -> int | None:
    with suppress(FileNotFoundError):  # another process has renamed its temporary file meanwhile
        return entry.stat().st_size if entry.is_file() else None


def find(pattern: str) -> list[str]:
    """Return the file of this name if it exists, else the files that match it as a pattern, sorted.

    Patterns may have `*`, `?`, `[...]` and `**`.
    """
    with naming(pattern):
        if not is_remote(pattern):
            found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
            return sorted(filter(os.path.isfile, found))
        fs, inside = _remote(pattern)
        if fs.isfile(inside) or not glob.has_magic(inside):
            return [pattern] * fs.isfile(inside)
        found = fs.glob(inside, detail=True).items()
        return sorted(fs.unstrip_protocol(path) for path, info in found if info["type"] == "file")


def below(folder: Where) -> list[str]:
    """List all files in a folder and below, except hidden ones: relative paths with `/`, sorted."""
    with naming(folder):
        if is_remote(folder):
            fs, inside = _remote(str(folder))
            found = [path[len(inside) :].strip("/") for path in fs.find(inside)]
        else:
            found = []
            seen = set[str]()
            for root, folders, names in os.walk(folder, followlinks=True):
                found += [Path(root, name).relative_to(folder).as_posix() for name in names]
                seen.add(os.path.realpath(root))  # a link may lead back up
                folders[:] = [
                    name
                    for name in folders
                    if os.path.realpath(os.path.join(root, name)) not in seen
                ]
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.split("/"))
    )


def stamp(path: str) -> str:
    """Return a text that changes when the file does.

    It is the SHA-256 of a small local file, else its size and time, or the checksum of its store.
    """
    with naming(path):
        if is_remote(path):
            fs, inside = _remote(path)
            return str(fs.checksum(inside))
        info = os.stat(path)
        return (
            sha256(path) if info.st_size <= _CONTENT_UP_TO else f"{info.st_size} {info.st_mtime_ns}"
        )


def sha256(path: str) -> str:
    """Return the SHA-256 of a file's bytes as they are stored, in hexadecimal."""
    digest = hashlib.sha256()
    with reading(path, unpack=False) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Column:
    """An array in a file that holds only its items, little-endian.

    A local file is mapped into memory; a remote one is read by byte ranges.

    Attributes:
      path: the path of the file.
      dtype: the dtype of the items.
      digest: SHA-256 of the file, compared before the first read of a local one; None for no check.
    """

    path: str
    dtype: np.dtype
    digest: str | None = None

    @cached_property
    def _mapped(self) -> np.ndarray:
        with naming(self.path):
            if not os.path.getsize(self.path):
                return np.empty(0, self.dtype)  # an empty file cannot be mapped
            if self.digest is not None and sha256(self.path) != self.digest:
                raise InputError(
                    f"data: {self.path!r} has changed since it was written (another sha256): "
                    "restore it, or make it again"
                )
            with open_regular(self.path) as file:
                return np.memmap(file, self.dtype, mode="r").view(np.ndarray)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the items start ... stop - 1."""
        return self.take(np.array([start]), np.array([stop - start]))

    def take(self, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the items of several ranges, one after another, as a copy."""
        if not is_remote(self.path):
            if len(starts) == 1:
                return self._mapped[starts[0] : starts[0] + counts[0]].copy()
            return self._mapped[ranges(starts, counts)]
        fs, inside = _remote(self.path)
        width = self.dtype.itemsize
        begins = (starts * width).tolist()
        ends = ((starts + counts) * width).tolist()
        with naming(self.path):
            found = fs.cat_ranges([inside] * len(begins), begins, ends, on_error="raise")
        return np.frombuffer(b"".join(found), self.dtype)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the whole numbers of several ranges, one after another.

    >>> ranges(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def _remote(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    check_protocol(url)
    try:
        return require("fsspec.core", "remote").url_to_fs(url)
    except (
        ValueError,
        ImportError,
    ) as error:
        # an unknown protocol, or one whose package is not installed
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"data: {url!r} cannot be opened: {error}; gs:// and s3:// need 'jaxmodel[remote]'"
        ) from None
