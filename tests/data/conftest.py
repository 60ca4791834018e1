"""What the tests of stored data share: a tokenizer of bytes, shards of texts, a folder in fsspec's
memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import fsspec
import pytest

from jaxmodel.data import Shards, storage, tokenize


class Bytes:
    """A token for each byte, and 256 to end a text; counts its calls."""

    eos_ids = (256,)

    def __init__(self, vocab_size: int = 257, fingerprint: str = "bytes"):
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.calls = 0

    def encode_batch(self, texts: Iterable[str], /) -> list[list[int]]:
        self.calls += 1
        return [list(text.encode()) for text in texts]


@pytest.fixture(scope="session")
def byte_tokenizer() -> type[Bytes]:
    return Bytes


@pytest.fixture(scope="session")
def shards_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Shards]:
    """`shards_of(texts, ...)`: their bytes in a folder of their own."""

    def write(texts: Sequence[str], **options: Any) -> Shards:
        return tokenize(texts, Bytes(), tmp_path_factory.mktemp("shards"), **options)

    return write


_number = itertools.count()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL of a folder that fsspec keeps in memory, which only tests may open."""
    monkeypatch.setattr(storage, "PROTOCOLS", (*storage.PROTOCOLS, "memory"))
    folder = f"tests-{next(_number)}"
    yield f"memory://{folder}"
    fs = fsspec.filesystem("memory")
    if fs.exists(folder):
        fs.rm(folder, recursive=True)
