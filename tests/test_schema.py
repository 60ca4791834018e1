"""JSON from elsewhere: what is let through, and what each refusal says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given, strategies as st

from jaxmodel import limits, schema
from jaxmodel.errors import InputError
from jaxmodel.schema import Count, Positive


class Inner(TypedDict, total=False):
    factor: Positive | None
    names: list[str] | None


class Outer(TypedDict):
    size: Count
    inner: Inner | None


@dataclasses.dataclass(frozen=True)
class Part:
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Whole:
    width: int
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    pair: tuple[str, int] = ("x", 1)
    part: Part | None = None


def read(raw: bytes, kind: Any = dict[str, Any]) -> Any:
    return schema.make(schema.parse(raw, "a.json"), kind, "a.json")


@pytest.mark.parametrize(
    ("raw", "kind", "says"),
    [
        (b"", dict, "not JSON: Expecting value"),
        (b"{'a': 1}", dict, "not JSON: "),
        (b'{"a": "\xff"}', dict, "not JSON: "),
        (b'{"a": "\\ud800"}', dict, "a string in it is not valid Unicode"),
        (b"[1]", dict, "its content is [1]; allowed: an object"),
        (b'{"a": 1, "a": 2}', dict, "'a' is repeated"),
        (b"[" * 100_000, dict, "nested too deeply; allowed: 100 levels"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, dict, "nested too deeply; allowed: 100 levels"),
        (b'{"size": ' + b"9" * 5000 + b"}", dict, "not JSON: "),
        (b'{"inner": null}', Outer, "the key 'size' is missing"),
        (b'{"size": true}', Outer, "size is true; allowed: a whole number of 1 to 2147483647"),
        (
            b'{"size": 2147483648}',
            Outer,
            "size is 2147483648; allowed: a whole number of 1 to 2147483647",
        ),
        (b'{"size": 0}', Outer, "size is 0; allowed"),
        (b'{"size": 4.0}', Outer, "size is 4.0; allowed"),
        (b'{"size": 1, "inner": "abc"}', Outer, 'inner is "abc"; allowed: an object or null'),
        (
            b'{"size": 1, "inner": {"factor": "2"}}',
            Outer,
            'inner.factor is "2"; allowed: a number above 0 or null',
        ),
        (b'{"size": 1, "inner": {"factor": 1e999}}', Outer, "inner.factor is Infinity; allowed"),
        (b'{"size": 1, "inner": {"factor": NaN}}', Outer, "inner.factor is NaN; allowed"),
        (b'{"size": 1, "inner": {"factor": 1' + b"0" * 400 + b"}}", Outer, "inner.factor is 1000"),
        (
            b'{"size": 1, "inner": {"names": ["a", 3]}}',
            Outer,
            'inner.names is ["a", 3]; allowed: null or a list, each a text',
        ),
        (b"{}", Whole, "the key 'width' is missing"),
        (
            b'{"widht": 3}',
            Whole,
            "'widht' is not known; allowed: kind, pair, part, sizes, width (nearest: width",
        ),
        (b'{"width": "3"}', Whole, 'width is "3"; allowed: a whole number'),
        (b'{"width": 3, "kind": "c"}', Whole, 'kind is "c"; allowed: "a", "b"'),
        (b'{"width": 3, "sizes": [1, "2"]}', Whole, 'sizes[1] is "2"; allowed: a whole number'),
        (b'{"width": 3, "pair": ["x"]}', Whole, 'pair is ["x"]; allowed: a list of 2'),
        (b'{"width": 3, "part": {"share": "x"}}', Whole, 'part.share is "x"; allowed: a number'),
        (
            b'{"width": 3, "part": {"shear": 1}}',
            Whole,
            "part: 'shear' is not known; allowed: share",
        ),
    ],
)
def test_what_is_refused(raw: bytes, kind: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        read(raw, kind)
    assert (
        str(error.value).startswith("a.json: ")
        and says in str(error.value)
        and "\n" not in str(error.value)
    )


def test_what_is_read() -> None:
    assert read(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert read(b'{"a": 1, "a": 1}') == {"a": 1}
    assert read(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert read(b'{"size": 2, "more": [1], "inner": {"factor": 2}}', Outer) == {
        "size": 2,
        "more": [1],
        "inner": {"factor": 2.0},
    }
    whole = Whole(3, "b", (1, 2), ("y", 4), Part(1.0))
    assert (
        read(
            b'{"width": 3, "kind": "b", "sizes": [1, 2], "pair": ["y", 4], "part": {"share": 1}}',
            Whole,
        )
        == whole
    )
    assert isinstance(whole.part, Part) and read(b'{"width": 3, "part": null}', Whole) == Whole(3)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
NAMES = st.sampled_from(["width", "kind", "sizes", "pair", "part", "share"])


@given(
    st.recursive(LEAVES, lambda some: st.lists(some) | st.dictionaries(NAMES, some), max_leaves=8)
)
def test_anything_is_read_or_refused_in_one_line(value: Any) -> None:
    """And what is read is what the dataclass declares: written and read again it is the same."""
    try:
        made = read(json.dumps(value).encode(), Whole)
    except InputError as error:
        assert re.fullmatch(r"a\.json: [^\n]*", str(error))
    else:
        assert read(json.dumps(dataclasses.asdict(made)).encode(), Whole) == made


def test_only_regular_files_of_a_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    pipe = tmp_path / "pipe.json"
    with pytest.raises(InputError, match=r"the file 'a\.json' is missing"):
        schema.read(file)
    assert schema.read(file, missing=True) == {}
    file.write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to(file)
    assert schema.read(tmp_path / "link.json") == {"a": 1}
    os.mkfifo(pipe)
    for special in (pipe, Path("/dev/zero"), Path("/proc/self/environ"), tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            schema.read(special)
    monkeypatch.setattr(limits, "_now", limits.Limits(json_bytes=7))
    with pytest.raises(InputError, match="larger than 7 bytes"):
        schema.read(file)
