"""Shards: what was tokenised is read back, once is enough, nothing half done or damaged passes for
whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmodel import hub
from jaxmodel.data import PackedShards, Shards, documents, shards as module, storage, tokenize
from jaxmodel.errors import InputError

TEXTS = [f"text {i} " * (1 + i % 5) for i in range(30)]
END = 256


def ids(text: str, end: int | None = END) -> list[int]:
    return list(text.encode()) + ([] if end is None else [end])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=15)  # files that are synced to a disk take their time
@given(
    st.lists(st.text("abc", max_size=9), min_size=1, max_size=20).filter(any),
    st.integers(5, 60),
    st.booleans(),
    st.data(),
)
def test_what_goes_in_comes_out(
    shards_of: Callable[..., Shards], texts: list[str], limit: int, eos: bool, draw: st.DataObject
) -> None:
    shards = shards_of(texts, shard_tokens=limit, eos=eos)
    rows = [ids(text, END if eos else None) for text in texts if text]
    assert [shards.doc(i).tolist() for i in range(len(shards))] == rows and shards.doc(
        0
    ).dtype == np.int32
    run = [token for row in rows for token in row]
    assert shards.tokens == len(run)
    edges = np.cumsum([0, *map(len, rows)])
    first = draw.draw(st.integers(0, len(rows) - 1))
    last = draw.draw(st.integers(first + 1, len(rows)))
    assert shards.offsets(first, last).tolist() == edges[first : last + 1].tolist()
    places = st.tuples(st.integers(0, len(run)), st.integers(0, len(run))).map(sorted)
    ranges = [pair for pair in draw.draw(st.lists(places, max_size=4)) if pair[0] < len(run)]
    starts, counts = (
        np.array([f(*pair) for pair in ranges], np.int64)
        for f in (lambda a, b: a, lambda a, b: b - a)
    )
    assert shards.read(starts, counts).tolist() == [token for a, b in ranges for token in run[a:b]]
    shards.verify()
    # no document is in two shards, and each but the last has what it should
    sizes = [shard["tokens"] for shard in shards.index["shards"]]
    assert all(limit <= size for size in sizes[:-1]) and all(size < limit + 10 for size in sizes)


def test_files_are_plain_arrays(shards_of: Callable[..., Shards]) -> None:
    shards = shards_of(TEXTS)
    (shard,) = shards.index["shards"]
    tokens = np.fromfile(Path(shards.folder, shard["tokens_file"]), "<u2")
    assert tokens.tolist() == [token for text in TEXTS for token in ids(text)]
    offsets = np.fromfile(Path(shards.folder, shard["offsets_file"]), "<i8")
    assert offsets.tolist() == np.cumsum([0, *(len(ids(text)) for text in TEXTS)]).tolist()


def test_large_vocabularies_take_four_bytes(byte_tokenizer: Any, tmp_path: Path) -> None:
    for vocab, dtype in ((2**16, "<u2"), (2**16 + 1, "<u4")):
        shards = tokenize(TEXTS, byte_tokenizer(vocab), tmp_path)
        assert shards.dtype == np.dtype(dtype) and shards.doc(1).tolist() == ids(TEXTS[1])


def test_behind_a_url(
    shards_of: Callable[..., Shards], byte_tokenizer: Any, memory: str, tmp_path: Path
) -> None:
    local = shards_of(TEXTS, shard_tokens=50)
    remote = tokenize(TEXTS, byte_tokenizer(), f"{memory}/shards", shard_tokens=50)
    assert len(remote.index["shards"]) > 5 and remote.index == local.index
    assert remote.fingerprint == local.fingerprint == Shards(f"{memory}/shards").fingerprint
    remote.verify()
    starts = np.array([3, 90, 0])
    counts = np.array([200, 1, 7])
    assert np.array_equal(remote.read(starts, counts), local.read(starts, counts))
    assert remote.doc(29).tolist() == ids(TEXTS[29]) and np.array_equal(
        remote.offsets(2, 30), local.offsets(2, 30)
    )
    kept = Shards(f"simplecache::{memory}/shards")
    assert (
        np.array_equal(kept.read(starts, counts), local.read(starts, counts))
        and kept.fingerprint == local.fingerprint
    )
    tokenizer = byte_tokenizer()
    tokenize(TEXTS, tokenizer, f"{memory}/shards", shard_tokens=50)
    assert tokenizer.calls == 0


def test_only_ranges_of_remote_files_are_read(
    byte_tokenizer: Any, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tokenize(TEXTS, byte_tokenizer(), memory)
    read = []
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")),
        "cat_file",
        lambda self, path, start=None, end=None, **_: (
            read.append(end - start) or self.store[path].getvalue()[start:end]
        ),
    )
    assert shards.doc(7).tolist() == ids(TEXTS[7])
    assert sum(read) == 2 * 8 + 2 * len(ids(TEXTS[7]))


def test_once_is_enough(byte_tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    folder = tmp_path / "shards"
    source.write_text("one\n\ntwo\n")
    calls = lambda tokenizer, **options: (
        tokenize(source, tokenizer, folder, **options),
        tokenizer.calls,
    )
    first, count = calls(byte_tokenizer())
    assert count == 1 and [first.doc(i).tolist() for i in range(2)] == [
        ids("one\n\n"),
        ids("two\n"),
    ]
    again, count = calls(byte_tokenizer())
    assert count == 0 and again.fingerprint == first.fingerprint
    found = names(folder)

    (folder / "tokens-mine.txt").write_text("not ours")
    source.write_text(
        "one\n\ntoo\n"
    )  # as long as before, and perhaps within the same tick of the clock
    changed, count = calls(byte_tokenizer())
    assert (
        count == 1
        and changed.doc(1).tolist() == ids("too\n")
        and changed.fingerprint != first.fingerprint
    )
    assert len(names(folder)) == len(found) + 1 == 4 and set(names(folder)) & set(found) == {
        "index.json"
    }
    assert calls(byte_tokenizer())[1] == 0

    for tokenizer, options in [
        (byte_tokenizer(fingerprint="other"), {}),
        (byte_tokenizer(vocab_size=300), {}),
        (byte_tokenizer(), {"eos": False}),
        (byte_tokenizer(), {"shard_tokens": 3}),
        (byte_tokenizer(), {"keep": short}),
        (byte_tokenizer(), {"keep": lambda text: len(text) < 5}),
        (byte_tokenizer(), {"keep": lambda text: len(text) < 6}),
    ]:
        assert calls(tokenizer, **options)[1] == 1
        assert calls(tokenizer, **options)[1] == 1  # counted before


def short(text: str) -> bool:
    return len(text) < 10


def test_a_filter_is_part_of_the_fingerprint(shards_of: Callable[..., Shards]) -> None:
    plain = shards_of(TEXTS)
    kept = shards_of(TEXTS, keep=short)
    assert [kept.doc(i).tolist() for i in range(len(kept))] == [
        ids(text) for text in TEXTS if short(text)
    ]
    same = shards_of([text for text in TEXTS if short(text)])
    assert same.index["shards"][0]["tokens_sha256"] == kept.index["shards"][0]["tokens_sha256"]
    everything = shards_of(TEXTS, keep=lambda text: True)
    vowels = lambda text: text[0] in {"a", "e", "i", "o", "u", "t"}
    constants = module._function_digest(vowels), module._code(vowels.__code__)[-1]
    assert sorted(map(repr, "aeiout")) in constants[1]  # not in the order of this process
    assert len({s.fingerprint for s in (plain, kept, same, everything)}) == 4
    assert kept.index["keep"][0].endswith("test_shards.short")

    def below(limit: int) -> Callable[[str], bool]:
        return lambda text: len(text) < limit

    assert (
        shards_of(TEXTS, keep=below(10)).fingerprint != shards_of(TEXTS, keep=below(20)).fingerprint
    )
    assert (
        shards_of(TEXTS, keep=below(10)).fingerprint == shards_of(TEXTS, keep=below(10)).fingerprint
    )
    for keep, message in [
        (
            functools.partial(short),
            "keep: functools.partial.*given; allowed: a plain function of the text",
        ),
        (
            lambda text, kept=kept: kept is not None,
            r"keep: .*lambda.* depends on Shards\(.*\); allowed",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            shards_of(TEXTS, keep=keep)


def test_a_fingerprint_is_that_of_the_tokens(
    shards_of: Callable[..., Shards], byte_tokenizer: Any, tmp_path: Path
) -> None:
    one = shards_of(TEXTS)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert tokenize(path, byte_tokenizer(), tmp_path / "shards").fingerprint == one.fingerprint
    assert shards_of([*TEXTS[:-1], TEXTS[-1] + "."]).fingerprint != one.fingerprint
    assert shards_of(TEXTS[::-1]).fingerprint != one.fingerprint
    assert shards_of(["".join(TEXTS)]).fingerprint != one.fingerprint
    assert (
        tokenize(TEXTS, byte_tokenizer(fingerprint="other"), tmp_path / "2").fingerprint
        != one.fingerprint
    )


class Broken(Exception):
    pass


def test_an_interrupted_call_is_never_taken_for_a_whole_one(
    byte_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def fails(texts: list[str], when: int) -> Any:
        for i, text in enumerate(texts):
            if i == when:
                raise Broken
            yield text

    class Source(list):
        armed: int | None = None

        def __iter__(self) -> Any:
            return super().__iter__() if self.armed is None else fails(self, self.armed)

    class Arms(byte_tokenizer):
        def encode_batch(self, texts: Any, /) -> Any:
            return super().encode_batch(texts) if not self.calls else (_ for _ in ()).throw(Broken)

    monkeypatch.setattr("jaxmodel.data.shards._TEXTS", 5)
    with pytest.raises(Broken):
        tokenize(TEXTS, Arms(), tmp_path, shard_tokens=30)
    assert [
        name for name in names(tmp_path) if name.startswith("tokens")
    ] and "index.json" not in names(tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    with pytest.raises(
        InputError,
        match="shards: .*index.json' is missing or incomplete; allowed: a folder that `tokenize`",
    ):
        Shards(str(tmp_path))
    for path in tmp_path.iterdir():  # as a machine that lost power may leave it
        path.write_bytes(b"x")
    whole = tokenize(TEXTS, byte_tokenizer(), tmp_path, shard_tokens=30)
    whole.verify()
    with pytest.raises(Broken):  # the old ones stay until the new ones are whole
        tokenize(TEXTS[1:], Arms(), tmp_path, shard_tokens=30)
    kept = Shards(str(tmp_path))
    kept.verify()
    assert kept.fingerprint == whole.fingerprint and kept.doc(29).tolist() == ids(TEXTS[29])
    (tmp_path / "index.json").write_bytes((tmp_path / "index.json").read_bytes()[:-5])
    with pytest.raises(InputError, match="is missing or incomplete"):
        Shards(str(tmp_path))
    tokenize(TEXTS[1:], byte_tokenizer(), tmp_path).verify()
    assert len(names(tmp_path)) == 3  # what was left of other calls is gone


def test_several_may_write_the_same(byte_tokenizer: Any, tmp_path: Path) -> None:
    def write(_: int) -> str:
        shards = tokenize(TEXTS, byte_tokenizer(), tmp_path, shard_tokens=60)
        shards.verify()
        return PackedShards(shards, 17).fingerprint

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(write, range(6)))) == 1
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_damage_is_named(shards_of: Callable[..., Shards]) -> None:
    shards = shards_of(TEXTS, shard_tokens=100)
    folder = Path(shards.folder)
    for path in sorted(folder.glob("*.bin"))[1::3]:
        raw = path.read_bytes()
        path.write_bytes(raw[:-1])
        wrong = (
            f"{path.name}' has {len(raw) - 1:,} bytes; it had {len(raw):,} bytes: restore "
            f"it, or delete index.json and"
        )
        with pytest.raises(InputError, match=wrong):
            Shards(shards.folder)
        path.unlink()
        with pytest.raises(InputError, match=f"{path.name}' is missing"):
            Shards(shards.folder)
        path.write_bytes(raw[:5] + bytes([raw[5] ^ 1]) + raw[6:])
        with pytest.raises(
            InputError, match=f"{path.name}' has changed since it was written .another sha256"
        ):
            Shards(shards.folder).verify()
        path.write_bytes(raw)
        Shards(shards.folder).verify()


def test_a_tokenizer_of_the_hub(tmp_path: Path) -> None:
    tokenizer = hub.train_bpe(["some words, and some more words"], 270)
    shards = tokenize(documents("pydoc"), tokenizer, tmp_path)
    assert (
        tokenizer.decode(shards.doc(3).tolist()) == list(documents("pydoc"))[3]
        and shards.doc(3)[-1] == tokenizer.eos_ids[0]
    )
    other = hub.train_bpe(["other words, and some more words"], 270)
    assert (
        tokenize(["a"], other, tmp_path).fingerprint
        != tokenize(["a"], tokenizer, tmp_path).fingerprint
    )


def test_bad_input(shards_of: Callable[..., Shards], byte_tokenizer: Any, tmp_path: Path) -> None:
    class Endless(byte_tokenizer):
        eos_ids = ()

    class Nameless(byte_tokenizer):
        fingerprint = property(lambda self: None, lambda self, value: None)

    (tmp_path / "file").write_text("")
    for call, message in [
        (lambda: shards_of(TEXTS, shard_tokens=0), "shard_tokens: 0 given"),
        (
            lambda: shards_of(iter(TEXTS)),
            "texts: an iterator given, which can be read only once; allowed: documents",
        ),
        (lambda: shards_of(["", ""]), "texts: no document has a token"),
        (lambda: shards_of(TEXTS, keep=lambda text: False), "texts: no document has a token"),
        (
            lambda: tokenize(TEXTS, Endless(), tmp_path),
            "eos: the tokenizer has no end-of-text id; allowed: eos=False",
        ),
        (
            lambda: tokenize(TEXTS, Nameless(), tmp_path),
            "tokenizer: Nameless given; allowed: a hub.Tokenizer, or an object with",
        ),
        (
            lambda: tokenize(TEXTS, byte_tokenizer(vocab_size=100), tmp_path),
            "tokenizer: it returned ids from 32 to 120; allowed: 0 to 99",
        ),
        (
            lambda: tokenize(TEXTS, byte_tokenizer(), tmp_path / "file" / "x"),
            "file/x/.*cannot be read or written: Not a dir",
        ),
        (
            lambda: tokenize(tmp_path / "none.txt", byte_tokenizer(), tmp_path),
            "none.txt' is neither a file nor a known text",
        ),
        (lambda: shards_of(TEXTS).doc(30), "document: 30 given; allowed: 0 to 29"),
        (
            lambda: Shards(str(tmp_path / "nowhere")),
            "shards: .*nowhere/index.json' is missing or incomplete",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_ranges_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(np.arange(10, dtype="<i4").tobytes())
    column = storage.Column(str(tmp_path / "a"), np.dtype("<i4"))
    assert column.read(2, 5).tolist() == [2, 3, 4] and column.read(2, 5).flags.writeable
    assert column.take(np.array([7, 0, 3]), np.array([2, 0, 1])).tolist() == [7, 8, 3]
