"""What every stream keeps: the same batches on any number of hosts, after any resume, for the same
fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmodel import data
from jaxmodel.data import Batches, Shards, Stream, prefetch
from jaxmodel.data.packed_shards import ShardWindows
from jaxmodel.data.stream import Batch

BATCH = 24
STEPS = [0, 5, 10**9]
NAMES = (
    "arrays",
    "bins",
    "windows",
    "packed",
    "shard windows",
    "filtered and mixed",
    "mixed again",
    "pairs",
    "images",
    "large",
)

type Make = Callable[[str, int], Batches]


def long(text: str) -> bool:
    return len(text) > 20


class Numbers:
    """A billion rows that are their own numbers."""

    fingerprint = "numbers"

    def __len__(self) -> int:
        return 10**9

    def take(self, indices: np.ndarray) -> Batch:
        return {"x": indices}


@pytest.fixture(scope="module")
def make(shards_of: Callable[..., Shards], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A stream by name and seed, made anew from the same files at each call."""
    texts = [
        "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(1 + i * 31 % 60)) for i in range(90)
    ]
    whole = shards_of(texts, shard_tokens=300)
    kept = shards_of(texts[::-1], keep=long)
    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        path = folder / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (20 * i, 10, 200 - i)).save(path)

    def build(name: str, seed: int) -> Batches:
        packed = lambda shards, batch: Stream(
            data.PackedShards(Shards(shards.folder), 17), batch, seed
        )
        if name == "arrays":
            return Stream({"x": np.arange(50), "y": np.arange(100.0).reshape(50, 2)}, BATCH, seed)
        if name == "bins":
            return Stream(data.pack([list(map(ord, text)) for text in texts], 17), BATCH, seed)
        if name == "windows":
            return Stream(data.windows(range(300), 17, 16), BATCH, seed)
        if name == "packed":
            return packed(whole, BATCH)
        if name == "shard windows":
            return Stream(ShardWindows(whole, 17, 16), BATCH, seed)
        if name == "filtered and mixed":
            return data.Mixture([(packed(whole, 5), 0.7), (packed(kept, 7), 0.3)], BATCH)
        if name == "mixed again":
            return data.Mixture(
                [(build("filtered and mixed", seed), 2), (build("windows", seed), 1)], BATCH
            )
        if name == "pairs":
            return data.SyntheticSeq2Seq(batch_size=BATCH, seed=seed)
        if name == "images":
            return Stream(data.ImageFolder(str(folder), (4, 4)), BATCH, seed)
        return Stream(Numbers(), BATCH, seed)

    return build


def digest(batches: Iterable[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            found.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return found.hexdigest()


def joined(parts: list[Batch]) -> Batch:
    assert all(part.keys() == parts[0].keys() for part in parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def host_rows(host, hosts):
    """The rows of a batch that one of several hosts makes."""
    each = BATCH // hosts
    return slice(host * each, (host + 1) * each)


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_hosts_makes_the_same_batches(make: Make, name: str) -> None:
    stream = make(name, 3)
    assert isinstance(stream, Batches) and stream.batch_size == BATCH
    whole = digest(stream.batch(step) for step in STEPS)
    for hosts in (1, 2, 3, 4, 8):
        fresh = make(name, 3)
        parts = ([fresh.batch(step, host_rows(i, hosts)) for i in range(hosts)] for step in STEPS)
        assert digest(map(joined, parts)) == whole, hosts
    uneven = (slice(None, 1), slice(1, 1), slice(1, 17), slice(17, None))
    assert digest(joined([stream.batch(step, rows) for rows in uneven]) for step in STEPS) == whole


@pytest.mark.parametrize("name", NAMES)
def test_any_resume_goes_on_as_if_nothing_had_happened(make: Make, name: str) -> None:
    whole = digest(make(name, 4).batch(step) for step in range(9))
    for stops in ([4], [1, 2, 8]):
        edges = zip([0, *stops], [*stops, 9], strict=True)
        assert (
            digest(batch for a, b in edges for batch in map(make(name, 4).batch, range(a, b)))
            == whole
        )
    first = host_rows(0, 2)
    ahead = prefetch(make(name, 4), 6, 9, rows=first)
    assert digest(ahead) == digest(make(name, 4).batch(step, first) for step in range(6, 9))


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_is_that_of_the_batches(make: Make, name: str) -> None:
    prints = [make(name, seed).fingerprint for seed in (3, 3, 4)]
    assert prints[0] == prints[1] != prints[2] and len(prints[0]) == 64
    assert digest([make(name, 3).batch(2)]) != digest([make(name, 4).batch(2)])


def test_all_kinds_of_streams_have_fingerprints_of_their_own(make: Make) -> None:
    assert len({make(name, 3).fingerprint for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", ["packed", "filtered and mixed", "large"])
def test_a_host_reads_its_rows_only(make: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Numbers if name == "large" else data.PackedShards
    read = []
    take = kind.take
    monkeypatch.setattr(
        kind, "take", lambda self, indices: read.extend(indices) or take(self, indices)
    )
    stream = make(name, 3)
    stream.batch(10**9, slice(5, 8))
    assert len(read) == 3


def test_images_are_read_by_their_host_only(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = []
    reading = data.storage.reading
    stream = make("images", 3)
    monkeypatch.setattr(
        data.storage,
        "reading",
        lambda path, **options: opened.append(path) or reading(path, **options),
    )
    stream.batch(7, slice(2, 4))
    assert len(opened) == 2
