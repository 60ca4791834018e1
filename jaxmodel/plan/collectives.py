"""The collectives of a compiled program: their kinds, bytes and counts.

They are read from the text of the optimised module (`jax.stages.Compiled.as_text()`), which holds
all of them, whether `jit` inserted them or `shard_map` wrote them. A collective in a loop counts
as often as the loop runs, a pair of start and done counts once, and one in a branch counts as if
the branch were taken.

Bytes of one collective on one device:

| kind | bytes | on the links, among n devices |
|---|---|---|
| all-gather | of the result | (n - 1) / n of that |
| reduce-scatter | of the operand | the same |
| all-reduce | twice those of the operand: a reduce-scatter and an all-gather | the same |
| all-to-all | of the operand | the same |
| collective-permute | of the operand, times the share of the devices that send | all of it |

>>> text = '''
... HloModule step, num_partitions=8
...
... ENTRY %main (x: f32[4,8]) -> f32[4,8] {
...   %x = f32[4,8]{1,0} parameter(0)
...   ROOT %sum = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8]
... }
... '''
>>> collectives(text)
[Collective(kind='all-reduce', bytes=256, group=4, times=1, source='')]
>>> moved(collectives(text))
{'all-reduce': 256}
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import jax

from jaxmodel.errors import InputError

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: the bytes of one execution on one device, by the table above.
      group: the number of devices that take part together.
      times: how often the collective runs.
      source: the operation of the program that it comes from, if the module says so.
    """

    kind: str
    bytes: int
    group: int
    times: int
    source: str = ""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    type: str
    opcode: str
    text: str  # operands and attributes

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.text)
        return found[1] if found else None


type _Module = dict[str, dict[str, _Instruction]]  # computation -> instructions by name

_HEAD = re.compile(r"^(ENTRY )?%?([\w.~-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.~-]+) = ")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLS = (
    "body|calls|to_apply|true_computation|false_computation|branch_computations|called_computations"
)
_CALLED = re.compile(rf"({_CALLS})=(\{{[^}}]*\}}|[^ ,]+)")


def collectives(program: jax.stages.Compiled | str) -> list[Collective]:
    """Return all collectives of a program that involve more than one device.

    Args:
      program: the result of `jax.jit(f).lower(...).compile()`, or the text of its module.

    Raises:
      InputError: the text is not a module, or a collective is in a loop whose number of iterations
        the module does not tell.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    module, entry = _parse(text)
    devices = math.prod(
        int(n)
        for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n\n")[0])
    )
    found: list[Collective] = []
    parts: dict[tuple[str, int, str], Collective] = {}
    for computation, name, times, fused in _runs(module, entry):
        one = _read(module[computation][name], computation, devices, times)
        if one is None or one.group == 1:
            continue
        channel = module[computation][name].attribute(r"channel_id=(\d+)")
        if not fused or channel is None or one.kind == "reduce-scatter":
            found.append(one)
        # a TPU runs one collective in pieces, between other work; all pieces have the same channel
        else:
            key = (one.kind, one.bytes, channel)
            parts[key] = max(one, parts.get(key, one), key=lambda each: each.times)
    return found + list(parts.values())


def moved(found: Iterable[Collective]) -> dict[str, int]:
    """Return the bytes of all executions of these collectives on one device, by kind."""
    total: collections.Counter[str] = collections.Counter()
    for one in found:
        total[one.kind] += one.bytes * one.times
    return dict(sorted(total.items()))


# --------------------------------------------------------------------------------------- the module


def _parse(text: str) -> tuple[_Module, str]:
    module: _Module = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = module[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            kind, rest = _type(line[found.end() :])
            opcode, _, after = rest.partition("(")
            current[found[1]] = _Instruction(kind, opcode.strip(), after)
    if not entry:
        raise InputError(
            "collectives: this text is not an XLA module; allowed: that of `compiled.as_text()`"
        )
    return module, entry


def _type(text: str) -> tuple[str, str]:
    """Split off the type at the front of an instruction."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :].lstrip()
    return text, ""


def _runs(
    module: _Module, computation: str, times: int = 1, fused: bool = False
) -> Iterator[tuple[str, str, int, bool]]:
    """Yield every instruction that runs: its computation, name, count, and whether it is fused."""
    for name, instruction in module[computation].items():
        yield computation, name, times, fused
        if instruction.opcode.endswith(("-done", "-update")):
            continue
        for role, names in _CALLED.findall(instruction.text):
            for called in re.findall(r"%?([\w.~-]+)", names):
                if called not in module or not _holds(module, called):
                    continue
                rounds = _rounds(module, instruction, name) if role == "body" else 1
                yield from _runs(
                    module, called, times * rounds, fused or instruction.opcode == "fusion"
                )


def _holds(module: _Module, computation: str) -> bool:
    """Return whether a computation, or one that it calls, holds a collective."""
    return any(
        _kind(instruction.opcode) is not None
        or any(
            called in module and _holds(module, called)
            for _, names in _CALLED.findall(instruction.text)
            for called in re.findall(r"%?([\w.~-]+)", names)
        )
        for instruction in module[computation].values()
    )


def _rounds(module: _Module, loop: _Instruction, name: str) -> int:
    """Return how often a loop runs, as XLA or its condition (`i < constant`, from 0) says."""
    if (known := loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')) is not None:
        return int(known)
    condition = module.get(loop.attribute(r"condition=%?([\w.~-]+)") or "", {})
    for compare in condition.values():
        if compare.opcode == "compare" and "direction=LT" in compare.text:
            for operand in re.findall(r"%([\w.~-]+)", compare.text.split(")")[0]):
                constant = condition.get(operand)
                if constant is not None and constant.opcode == "constant":
                    return int(constant.text.split(")")[0])
    raise InputError(
        f"collectives: the module does not state how often its loop {name!r} runs, which contains "
        "collectives"
    )


def _kind(opcode: str) -> str | None:
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def _read(
    instruction: _Instruction, computation: str, devices: int, times: int
) -> Collective | None:
    kind = _kind(instruction.opcode)
    if kind is None:
        return None
    started = instruction.opcode.endswith("-start")
    sizes = _sizes(instruction.type)
    source = instruction.attribute(r'op_name="([^"]*)"') or ""
    if kind == "collective-permute":
        operand = _sizes(_parts(instruction.type)[0]) if started else sizes
        pairs = re.findall(
            r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=\{(\{.*?\})\}") or ""
        )
        senders = sum(a != b for a, b in pairs)
        return Collective(
            kind, sum(operand) * senders // devices, 2 if senders else 1, times, source
        )
    group = _group(instruction, devices)
    if started and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]
    total = sum(sizes)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        # a TPU's module writes it as an all-reduce fused with the slice of its result
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        total *= group
    elif kind == "all-reduce":
        total *= 2
    return Collective(kind, total, group, times, source)


def _group(instruction: _Instruction, devices: int) -> int:
    """Return the number of devices of a group.

    There are three ways to write it: all devices, a grid, or axes of a mesh.
    """
    text = instruction.text.partition("replica_groups=")[2]
    if found := re.match(r"\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    if found := re.match(r"\[(\d+),(\d+)\]<=", text):
        return int(found[2])
    if found := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", text):
        axes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", found[1])}
        return math.prod(axes.get(name, devices) for name in re.findall(r"'([^']*)'", found[2]))
    return devices


def _parts(kind: str) -> list[str]:
    """Return the elements of a tuple's type."""
    inner = kind[1:-1]
    depth = 0
    parts = []
    start = 0
    for i, letter in enumerate(inner):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(inner[start:i])
            start = i + 1
    return [*parts, inner[start:]]


def _sizes(kind: str) -> list[int]:
    """Return the bytes of each array of a type."""
    return [
        math.prod(int(n) for n in dims.split(",") if n) * _width(dtype)
        for dtype, dims in _SHAPE.findall(kind)
    ]


def _width(dtype: str) -> int:
    """Return the bytes of an element; packed types count a whole byte."""
    bits = re.search(r"\d+", dtype)
    return 1 if dtype == "pred" or bits is None else max(int(bits[0]) // 8, 1)
