"""Seeded damage: to bytes, to what JSON says, to what kind of thing stands in a place, and to
command lines.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        2**31 - 1,
        2**31,
        2**63,
        10**30,
        0.5,
        -1.5,
        1e30,
        1e999,
        float("nan"),
    ),
    *(
        "",
        "abc",
        "0",
        "../../x",
        "/etc/hostname",
        "\x1b[31m",
        "\u0000",
        "<script>",
        "a" * 5000,
        "{{ 1/0 }}",
        "é😀",
    ),
    *([], [1], ["a"], [[]], {}, {"a": 1}, {"type": "Sequence"}, [None] * 50),
]
_TEXTS = [
    "{{",
    "{% for i in range(9999999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{{ ''.__class__ }}",
    "{{ 'a' * 10**9 }}",
    "{{ messages | tojson(indent=10**9) }}",
    "(a+)+$",
    "[",
    "\\",
    "a{1000000}",
    "%s%n",
]


def damage(folder: Path, rng: random.Random) -> str:
    """Change one thing in a folder; what was changed, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = rng.choice(files)
    name = str(path.relative_to(folder))
    way = rng.random()
    if way < 0.08:
        return f"{name}: {_other_thing(path, rng)}"
    if path.suffix == ".json" and way < 0.85:
        try:
            return f"{name}: {_json(path, rng)}"
        except ValueError:
            pass
    return f"{name}: {_bytes(path, rng)}"


def _other_thing(path: Path, rng: random.Random) -> str:
    kind = rng.choice(["gone", "pipe", "device", "folder", "empty", "loop", "sparse"])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**36)
    return kind


def _bytes(path: Path, rng: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    said = []
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        at = min(
            len(raw), int(len(raw) * rng.random() ** rng.choice([1, 4]))
        )  # headers stand in front
        kind = rng.choice(["flip", "set", "cut", "insert", "zero", "number", "twice", "swap"])
        if kind == "cut":
            del raw[at : rng.choice([len(raw), at + 1, at + 4, at + 100])]
        elif kind == "insert":
            raw[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
        elif kind == "zero":
            raw[at : at + 32] = bytes(len(raw[at : at + 32]))
        elif kind == "number":
            size = rng.choice([4, 8])
            value = rng.choice(
                [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
            ) % 2 ** (8 * size)
            raw[at : at + size] = value.to_bytes(size, "little")
        elif kind == "twice":
            raw[at:at] = raw[at : at + 64]
        elif kind == "swap":
            raw[at : at + 8] = raw[at : at + 8][::-1]
        elif at < len(raw):
            raw[at] = raw[at] ^ (1 << rng.randrange(8)) if kind == "flip" else rng.randrange(256)
        said.append(f"{kind} at {at}")
    path.write_bytes(raw)
    return ", ".join(said)


def _places(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:20])
        if isinstance(value, list)
        else ()
    )
    return [(*trail, key) for key, _ in pairs] + [
        p for key, one in pairs for p in _places(one, (*trail, key))
    ]


def _json(path: Path, rng: random.Random) -> str:
    value = json.loads(path.read_text())
    said = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = _places(value)
        if not places:
            break
        place = rng.choice(places)
        if rng.random() < 0.7:  # those on top mean more
            place = rng.choice([p for p in places if len(p) == 1])
        inside = value
        for key in place[:-1]:
            inside = inside[key]
        kind = rng.choice(["value", "value", "value", "value", "text", "gone", "name", "deep"])
        if kind == "gone":
            del inside[place[-1]]
        elif kind == "name" and isinstance(inside, dict):
            inside[str(place[-1]) + "x"] = inside.pop(place[-1])
        elif kind == "deep":
            inside[place[-1]] = json.loads("[" * 500 + "]" * 500)
        else:
            inside[place[-1]] = rng.choice(_TEXTS if kind == "text" else _VALUES)
        said.append(f"{kind} {'.'.join(map(str, place))}")
    path.write_text(json.dumps(value))
    return ", ".join(said)


_WORDS = [
    *(
        "",
        "-1",
        "0",
        "1",
        "2",
        "nan",
        "inf",
        "1e999",
        "99999999999999999999",
        "abc",
        "--",
        "-",
        "..",
        "/",
        "/dev/zero",
        "/proc/self/environ",
    ),
    *(
        "a,b",
        "data=*",
        "data=9999999",
        "int8",
        "rtn(bits=99)",
        "rtn(bits=4) | rtn(",
        "magnitude(2)",
        "__import__('os')",
        "\x1b[2J",
    ),
    *(
        "http://127.0.0.1:9/a",
        "ftp://127.0.0.1/a",
        "file:///etc/hostname",
        "zip://a::b",
        "memory://a",
        "hf:",
        "gs://",
        "\udc80",
        "é",
        "a" * 3000,
    ),
    *("{{7*7}}", "*", "?", "**", "~", "%s", "\n", "\t", "[]", "{}", "null", "true"),
]
_OPTIONS = [
    "--seed",
    "--steps",
    "--prompt",
    "--data",
    "--window",
    "--max-windows",
    "--temperature",
    "--top-p",
    "--top-k",
    "--max-new-tokens",
    "--json",
    "--recipe",
    "--out",
    "--mesh",
    "--dtype",
    "--chat",
    "--context",
    "--batch",
    "--vocab",
    "--input",
    "--devices",
    "--heads",
    "--weights",
    "--checkpoints",
    "--schedule",
    "--stop",
    "--beams",
    "--runs",
    "--help",
    "--version",
    "--nothing",
]


def command(base: list[str], rng: random.Random) -> list[str]:
    """A command line with one or a few words changed, left out, doubled or added; steps at its end
    stay few.
    """
    kept = base[-2:] if "--steps" in base[-2:] else []
    words = base[: len(base) - len(kept)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(words)) if words else 0
        kind = rng.choice(["change", "change", "gone", "twice", "add", "option", "cut"])
        if kind == "change" and words:
            words[at] = rng.choice(_WORDS)
        elif kind == "gone" and words:
            del words[at]
        elif kind == "twice" and words:
            words.insert(at, words[at])
        elif kind == "add":
            words.insert(at, rng.choice(_WORDS))
        elif kind == "option":
            words += [rng.choice(_OPTIONS), rng.choice(_WORDS)]
        elif words:
            words[at] = words[at][: len(words[at]) // 2]
    return words + kept


def copy(sample: Path, to: Path) -> Path:
    """A copy of a sample to be damaged."""
    return shutil.copytree(sample, to)
