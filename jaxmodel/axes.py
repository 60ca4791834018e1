"""Axes: a model's single declaration of what the axes of its parameters mean.

A model's `Axes` names the axes of each leaf of one layer, in the letters that `ops.einsum` reads:
`("blocks/.*/attn/q", "(KGh)D")` for a weight `[K * G * h, D]`. A letter stands for a set of units:
hidden units `F`, groups of heads `K`, experts `E`, channels `C`, the residual stream `D`, the
vocabulary `V`. Three things follow from the declaration: how each leaf is placed on a mesh
(`specs`), whether a leaf is a matrix, a table or a vector (`roles`), and which axes of which leaves
belong together (`groups`). Code that prunes, merges, permutes or scales a unit must treat all axes
of its group alike.

Syntax. One letter is one axis. Letters in parentheses share an axis, slowest first: `(KGh)` is one
head after another. Brackets denote a concatenation along an axis: `[C0+C1]`. A letter may carry a
number (`C0`, `C12`). A capital letter is a set of unordered units: if they are permuted in all
leaves of their group, the model computes the same. A small letter (`h` of a head, which rotary
positions order; `x` of a kernel; `c` of classes; `t` of learnt positions) and the letters listed in
`Axes.ordered` (`V`) have an order that is fixed by something other than the weights. `_` is an axis
about which nothing is declared. A word may follow: `table` for rows that are looked up, `router`
for a matrix whose outputs choose experts, `measured` for statistics that no optimiser trains. `...`
alone declares nothing about any axis, however many there are; the role of such a leaf is guessed
from its name and shape.

Scope. A letter belongs to its layer, and outside of layers to its folder: `F` of `blocks/3` and `F`
of `blocks/4` are two sets. The letters listed in `Axes.shared` (by default `D` and `V`) and all
letters with a number are one set in the whole tree.

>>> mlp = Axes((("blocks/.*/up", "FD"), ("blocks/.*/down", "DF"), ("norm", "D")))
>>> layers = {"up": jnp.ones((2, 3, 2)), "down": jnp.ones((2, 2, 3))}
>>> params = {"norm": jnp.ones(2), "blocks": {"0-1": layers}}
>>> {name: (group.size, len(group.members)) for name, group in groups(mlp, params).items()}
{'D': (2, 5), 'blocks/0/F': (3, 2), 'blocks/1/F': (3, 2)}
>>> smaller = select(mlp, params, {"blocks/1/F": jnp.array([0, 2])})
>>> smaller["blocks"]["1"]["up"].shape
(2, 2)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmodel import tree
from jaxmodel.errors import InputError

PLACEMENT = (
    *((letter, "tensor") for letter in "VKHFCP"),
    ("E", "expert"),
    *((letter, "fsdp") for letter in "DHFCn"),
)
"""Letter of a parameter's axis -> axis of the mesh.

The first entry whose mesh axis is still free in the leaf counts.
"""

ROLES = ("matrix", "experts", "router", "table", "head", "vector", "measured")
"""Roles of a layer's leaf: a matrix, a stack of matrices with one for each expert (`E` first), the
matrix that chooses experts, a table whose rows are looked up, a matrix whose outputs are those of
the model (`V` or `c` first), a vector or scalar, a statistic.
"""

type Roles = Callable[[str, tuple[int, ...]], str]  # path and shape of one layer's leaf -> its role

type Product = tuple[str, ...]
type Axis = tuple[Product, ...]  # the parts of a concatenation; most axes have only one

_OUTSIDE = ((("V",),), (("c",),))  # the outputs of a head
_VECTORS = re.compile(r"(?i)(.*/)?([^/]*norm[^/]*/[^/]*|[^/]*bias|scale|[^/]*token|cls|class)")
_TABLES = re.compile(r"(.*/)?[^/]*(embed|positions|tokens)[^/]*")
_HEADS = re.compile(r"(.*/)?[^/]*head[^/]*")
_EXPERTS = (("E",),)
_STATE = "state/"  # where the state of a foreign module is kept
_ANY = "..."
_AXIS = re.compile(r"_|[A-Za-z]\d*|\(([A-Za-z]\d*)+\)|\[[^\[\]]*\]")
_UNITS = re.compile(r"_|[A-Za-z]\d*")
_UNKNOWN: Axis = (("_",),)


class Letters(NamedTuple):
    """The axes of one leaf, parsed from their text."""

    axes: tuple[Axis, ...]
    role: str

    def __str__(self) -> str:
        return "".join(map(written, self.axes))


@dataclasses.dataclass(frozen=True)
class Axes:
    r"""The axes that a model declares for its leaves.

    Attributes:
      rules: (pattern of layer paths, letters), or with a third entry, the `PartitionSpec` of leaves
        that are not placed by their letters. The patterns are those of `tree`: the first match
        wins, and `tree.optional` may match nothing.
      sizes: (letter, size) of letters whose size the shapes do not determine, such as `h` where
        heads share an axis.
      shared: letters without a number that are one set in the whole tree.
      ordered: capital letters whose order is fixed by something other than the weights: always the
        vocabulary; `D` where the model returns activations or adds fixed positions; channels that a
        group norm divides into groups.
      fixed: letters of units that may change places, but of which there are always as many as the
        config says: the model's code takes their number from there.
      fused: names of leaves in one folder that read the same input and that the model's layers also
        accept as one leaf; see `layers.fuse`.
      feeds: where a positive factor of a unit may move: (pattern of leaves, pattern of others).
        What the first scale (a norm's weight and bias, or a linear map and its bias) is read by the
        others alone, each unit by itself, so the first may be divided by what the others are
        multiplied with. `\1` in the second stands for the first group of the match: a layer.
        Between maps whose axes end in a small letter (values and outputs of a head) the units of
        that letter may also be rotated. `compress.transforms` read it; a contract test proves it.
      norm_offset: what the norms of `feeds` add to their weights.
      norm_mean: whether these norms subtract the mean of the units.

    Raises:
      InputError: letters that cannot be parsed.
    """

    rules: tuple[tuple[str, str] | tuple[str, str, PartitionSpec], ...]
    sizes: tuple[tuple[str, int], ...] = ()
    shared: tuple[str, ...] = ("D", "V")
    ordered: tuple[str, ...] = ("V",)
    fixed: tuple[str, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    feeds: tuple[tuple[str, str], ...] = ()
    norm_offset: float = 0.0
    norm_mean: bool = False

    def __post_init__(self) -> None:
        for _, text, *_ in self.rules:
            read(text)

    @property
    def highest(self) -> int:
        """The highest number that a letter carries, or -1 if none carries one."""
        return max(
            (int(n) for _, text, *_ in self.rules for n in re.findall(r"\d+", text)), default=-1
        )

    def under(self, prefix: str, number: int) -> Axes:
        """Return the declaration of the same leaves under a prefix, for a model that has several.

        Args:
          prefix: of the paths, without the trailing slash.
          number: of the letters that are one set in the whole tree: `D` becomes `D1`, so that each
            model keeps its own `D`. A letter that already has a number is raised by `number + 1`.

        >>> Axes((("up", "FD"), ("norm", "D"))).under("image", 1).rules
        (('image/(?:up)', 'FD1'), ('image/(?:norm)', 'D1'))
        """
        lone = {*self.shared, *dict(self.sizes)}

        def other(letter: str) -> str:
            if len(letter) > 1:
                return f"{letter[0]}{int(letter[1:]) + number + 1}"
            return f"{letter}{number}" if letter in lone else letter

        rules = []
        for pattern, text, *spec in self.rules:
            letters, *role = text.split(" ")
            moved = " ".join([_UNITS.sub(lambda found: other(found[0]), letters), *role])
            kind = tree.optional if isinstance(pattern, tree.optional) else str
            rules.append((kind(f"{prefix}/(?:{pattern})"), moved, *spec))
        return dataclasses.replace(
            self,
            rules=tuple(rules),
            sizes=tuple((other(letter), size) for letter, size in self.sizes),
            ordered=tuple(map(other, self.ordered)),
            fixed=tuple(map(other, self.fixed)),
            feeds=tuple((f"{prefix}/(?:{a})", f"{prefix}/(?:{b})") for a, b in self.feeds),
        )


class Member(NamedTuple):
    """One axis of a layer's leaf, or a part of it, that holds the units of a group.

    The units are at `[before, size, after]`, beginning at `start`.
    """

    path: str
    axis: int
    start: int
    before: int
    after: int


class Group(NamedTuple):
    """A set of units and every place that holds them.

    `ordered` means that permuting the units changes what the model computes, `fixed` that none may
    go: they are ordered, or the model needs them all.
    """

    letter: str
    size: int
    ordered: bool
    fixed: bool
    members: tuple[Member, ...]


@functools.cache
def read(text: str) -> Letters:
    """Parse the axes of a leaf; the head of this file describes the syntax.

    >>> read("(Kh)D").axes
    ((('K', 'h'),), (('D',),))

    Raises:
      InputError: the text is not of this form.
    """
    letters, *words = text.split(" ") if text else [""]
    role = words[0] if words else ""
    if text == _ANY:
        return Letters((), _ANY)
    found = [part.group() for part in _AXIS.finditer(letters)]
    axes = tuple(
        tuple(tuple(_UNITS.findall(product)) for product in part.strip("[]").split("+"))
        for part in found
    )
    whole = "".join(found) == letters and all(map(all, axes))
    if not whole or len(words) > 1 or role not in ("", "table", "router", "measured"):
        raise InputError(
            f"axes: {text!r} cannot be read; write them as 'FD', '(Kh)D', 'C1(C0yx)', 'VD table', "
            f"'C measured'"
        )
    own = axes[1:] if axes[:1] == (_EXPERTS,) else axes
    kind = "experts" if own != axes else "head" if own[:1] and own[0] in _OUTSIDE else "matrix"
    return Letters(axes, role or ("vector" if len(own) < 2 else kind))


def guessed(path: str, shape: tuple[int, ...]) -> str:
    """Guess the role of an undeclared leaf from its name and shape.

    Such leaves belong to foreign modules, or to an optimiser that is used by itself. A leaf with
    three or more axes of which only one is longer than 1 is a vector.

    >>> guessed("Dense_0/kernel", (4, 3)), guessed("embed", (9, 3))
    ('matrix', 'table')
    >>> guessed("LayerNorm_0/scale", (3,)), guessed("cls", (1, 1, 3))
    ('vector', 'vector')
    """
    if path.startswith(_STATE):
        return "measured"
    long = len(shape) if len(shape) < 3 else sum(n > 1 for n in shape)
    if long < 2 or _VECTORS.fullmatch(path):
        return "vector"
    return "table" if _TABLES.fullmatch(path) else "head" if _HEADS.fullmatch(path) else "matrix"


def role_of(axes: Axes) -> Roles:
    """Return a function that gives the role of a leaf; the leaves need not be a whole model."""
    known = [(re.compile(pattern), read(text).role) for pattern, text, *_ in axes.rules]

    @functools.cache
    def role(path: str, shape: tuple[int, ...]) -> str:
        found = next((role for pattern, role in known if pattern.fullmatch(path)), _ANY)
        return guessed(path, shape) if found == _ANY else found

    return role


UNDECLARED = Axes(((".*", _ANY),))
"""The axes of a model about which nothing is declared; every device holds all of it."""


def trainable(axes: Axes) -> Callable[[str], bool]:
    """Return the default test of which leaves train: all but statistics.

    Statistics have no gradient, but the weight decay of an optimiser would change them.

    Returns:
      layer path -> bool, for `tree.partition`.
    """
    role = role_of(axes)
    return lambda path: role(path, ()) != "measured"


def heads(axes: Axes, params: tree.Params) -> set[str]:
    """Return the layer paths of the model's head.

    These are the leaves whose outputs are those of the model (`V` or `c` among their axes) and that
    are not tables, and all leaves in the same folder.

    >>> head = {"classes": jnp.ones((3, 2)), "pool": jnp.ones((2, 4))}
    >>> axes = Axes((("head/classes", "cF"), ("head/pool", "FD"), ("norm", "D")))
    >>> sorted(heads(axes, {"head": head, "norm": jnp.ones(4)}))
    ['head/classes', 'head/pool']
    """
    role = role_of(axes)
    shapes = _shapes(params)
    outside = re.compile(
        "|".join(
            f"(?:{pattern})"
            for pattern, text, *_ in axes.rules
            if (found := read(text)).role == "vector" and set(found.axes) & set(_OUTSIDE)
        )
        or "(?!)"
    )
    out = {
        path
        for path, shape in shapes.items()
        if role(path, shape) == "head" or outside.fullmatch(path)
    }
    folders = tuple(f"{path.rpartition('/')[0]}/" for path in out if "/" in path)
    return {path for path in shapes if path in out or path.startswith(folders)}


def assign(axes: Axes, params: tree.Params) -> dict[str, Letters]:
    """Return the letters of each layer path.

    Raises:
      InputError: a leaf without letters, or with a number of letters other than its number of axes,
        a letter that joins leaves of different sizes, or a rule that decides nothing.
    """
    try:
        texts = tree.assign([(pattern, text) for pattern, text, *_ in axes.rules], params)
    except InputError as error:
        raise InputError(f"axes: {str(error).removeprefix('rules: ')}") from None
    found = {}
    shapes = _shapes(params)
    for path, shape in shapes.items():
        letters = read(texts[path])
        if letters.role == _ANY:
            letters = Letters((_UNKNOWN,) * len(shape), letters.role)
        if len(letters.axes) != len(shape):
            raise InputError(
                f"axes: the leaf {path!r} has the shape {list(shape)} but the axes {str(letters)!r}"
            )
        found[path] = letters
    _sizes(axes, found, shapes, all_known=False)
    return found


def roles(axes: Axes, params: tree.Params) -> dict[str, str]:
    """Return the role of each layer path: one of `ROLES`.

    Raises:
      InputError: see `assign`.
    """
    assign(axes, params)
    role = role_of(axes)
    return {path: role(path, shape) for path, shape in _shapes(params).items()}


@functools.cache
def specs(axes: Axes, placement: tuple[tuple[str, str], ...] = PLACEMENT) -> tree.Rules:
    """Return the rules path -> `PartitionSpec` for `sharding.shardings`.

    Args:
      axes: of a model.
      placement: see `PLACEMENT`.
    """
    return tuple(
        (pattern, own[0] if own else _spec(read(text), placement))
        for pattern, text, *own in axes.rules
    )


def groups(axes: Axes, params: tree.Params) -> dict[str, Group]:
    """Return all sets of units by name.

    The name is `D` for a set of the whole tree, and `blocks/7/F` for a set of one layer.

    Args:
      axes: of the model.
      params: arrays, compressed leaves or shapes.

    Raises:
      InputError: see `assign`; also sizes that are contradictory or undetermined.
    """
    by_path = assign(axes, params)
    shapes = _shapes(params)
    sizes = _sizes(axes, by_path, shapes)
    members: dict[str, list[Member]] = {}
    for path, letters in by_path.items():
        for number, axis in enumerate(letters.axes):
            if axis == _UNKNOWN:
                continue
            start = 0
            for product in axis:
                lengths = [sizes[_scoped(axes, path, letter)] for letter in product]
                for i, letter in enumerate(product):
                    where = Member(
                        path, number, start, math.prod(lengths[:i]), math.prod(lengths[i + 1 :])
                    )
                    members.setdefault(_scoped(axes, path, letter), []).append(where)
                start += math.prod(lengths)
    return {
        name: Group(
            letter := name.split("/")[-1],
            sizes[name],
            ordered := _is_among(letter, axes.ordered) or letter.islower(),
            ordered or _is_among(letter, axes.fixed),
            tuple(where),
        )
        for name, where in members.items()
    }


def select(axes: Axes, params: tree.Params, units: Mapping[str, jax.Array]) -> tree.Params:
    """Keep the given units of groups, in the given order, in every leaf that contains them.

    A permutation keeps all units.

    Args:
      axes: of the model.
      params: plain arrays.
      units: name of a group -> indices, int `[n]`.

    Raises:
      InputError: the name of no group.
    """
    known = groups(axes, params)
    params = tree.unstack(params)
    for name in units:
        if name not in known:
            raise InputError(f"units: {name!r} given; allowed: {', '.join(known)}")
    for name, index in units.items():
        group = groups(axes, params)[name]
        leaves = tree.flatten(params)
        # Start with the last part of a concatenation: it must not move the parts before it.
        for member in sorted(group.members, key=lambda member: member.start, reverse=True):
            leaves[member.path] = _take(leaves[member.path], member, index, group.size)
        params = tree.unflatten(leaves)
    return tree.stack(params)


def narrower(axes: Axes, whole: tree.Params, params: tree.Params) -> dict[str, int]:
    """Return the groups with fewer units than the config says, and their sizes.

    Args:
      axes: of the model.
      whole: the shapes that follow from its config.
      params: the actual parameters.

    Raises:
      InputError: any other difference, such as a leaf that is missing or narrower than its group.
    """
    wanted = groups(axes, whole)
    there = groups(axes, params)
    fewer = {
        name: group.size
        for name, group in there.items()
        if name in wanted and group.size != wanted[name].size
    }
    for name, size in fewer.items():
        if wanted[name].fixed or size > wanted[name].size:
            path = there[name].members[0].path
            raise InputError(
                f"params: {path!r} has {size} of {name}; the config needs {wanted[name].size}"
            )
    return fewer


def shapes(axes: Axes, whole: tree.Params, fewer: Mapping[str, int]) -> tree.Params:
    """Return the shapes of parameters with fewer units in some groups, one layer at a time.

    Args:
      axes: of the model.
      whole: the shapes that follow from its config.
      fewer: name of a group -> number of its units; see `narrower`.

    Raises:
      InputError: the name of no group or of a fixed one, or more units than the config says.
    """
    known = groups(axes, whole)
    for name, size in fewer.items():
        if name not in known or known[name].fixed or not 0 < size <= known[name].size:
            most = (
                f"1 to {known[name].size}"
                if name in known and not known[name].fixed
                else "sets of units of which some may go"
            )
            raise InputError(f"narrow: {name!r}: {size} given; allowed: {most}")
    units = {name: jax.ShapeDtypeStruct((size,), jnp.int32) for name, size in fewer.items()}
    return jax.eval_shape(
        lambda params, units: tree.unstack(select(axes, params, units)), whole, units
    )


def _take(array: jax.Array, member: Member, index: jax.Array, size: int) -> jax.Array:
    axis = member.axis
    stop = member.start + member.before * size * member.after
    first, own, rest = jnp.split(array, [member.start, stop], axis=axis)
    lead = array.shape[:axis]
    tail = array.shape[axis + 1 :]
    own = own.reshape(*lead, member.before, size, member.after, *tail)
    own = jnp.take(own, index, axis=axis + 1).reshape(*lead, -1, *tail)
    return jnp.concatenate([first, own, rest], axis=axis)


def _spec(letters: Letters, placement: Sequence[tuple[str, str]]) -> PartitionSpec:
    taken: list[str | None] = []
    for axis in letters.axes:
        here = [letter[0] for product in axis for letter in product]
        free = (
            place
            for letter in here
            for own, place in placement
            if own == letter and place not in taken
        )
        taken.append(next(free, None))
    if len(taken) == 1 and taken[0] == "fsdp":  # a vector is too small to gather it for every use
        taken = []
    while taken and taken[-1] is None:
        taken.pop()
    return PartitionSpec(*taken)


def _is_among(letter: str, letters: tuple[str, ...]) -> bool:
    return letter in letters or letter[0] in letters


def _shapes(params: tree.Params) -> dict[str, tuple[int, ...]]:
    return {
        layer: tree.layer_shape(path, leaf)
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
    }


def _scoped(axes: Axes, path: str, letter: str) -> str:
    """Return the name of a letter's set: after its layer or folder, unless the tree shares it."""
    if len(letter) > 1 or letter in axes.shared:
        return letter
    keys = path.split("/")
    at = next(
        (i + 1 for i in range(1, len(keys)) if keys[i - 1] == tree.BLOCKS and tree.span(keys[i])),
        len(keys) - 1,
    )
    return "/".join([*keys[:at], letter])


def _sizes(
    axes: Axes,
    by_path: Mapping[str, Letters],
    shapes: Mapping[str, tuple[int, ...]],
    all_known: bool = True,
) -> dict[str, int]:
    """Solve for the size of each set of units.

    Axes with one unknown letter determine it; this is repeated until nothing new is found. What
    remains unknown is an error if `all_known`.
    """
    given = dict(axes.sizes)
    known = {}
    told = {}

    def size(name: str) -> int | None:
        return known.get(name, given.get(name.split("/")[-1]))

    waiting = [
        ([[_scoped(axes, path, letter) for letter in product] for product in axis], length, path)
        for path, letters in by_path.items()
        for axis, length in zip(letters.axes, shapes[path], strict=True)
        if axis != _UNKNOWN
    ]
    while waiting:
        left = []
        for parts, length, path in waiting:
            unknown = {name for names in parts for name in names if size(name) is None}
            if len(unknown) > 1:
                left.append((parts, length, path))
                continue
            for name in unknown:
                known[name], told[name] = _solve(parts, length, name, size), path
            for name in {name for names in parts for name in names} - set(known):
                known[name], told[name] = given[name.split("/")[-1]], path
            if sum(math.prod(known[name] for name in names) for names in parts) != length:
                said = ", ".join(
                    f"{name} = {known[name]} ({told[name]})" for name in dict.fromkeys(_flat(parts))
                )
                raise InputError(
                    f"axes: an axis of {path!r} has the length {length}, which does not fit {said}"
                )
        if len(left) == len(waiting):
            if not all_known:
                break
            parts, length, path = left[0]
            unknown = sorted(name for name in _flat(parts) if size(name) is None)
            names = ", ".join(unknown)
            raise InputError(
                f"axes: no leaf determines how {length} of {path!r} is split into {names}; give "
                f"their sizes"
            )
        waiting = left
    return known


def _solve(parts, length, name, size) -> int:
    """Return the size of the one unknown letter of an axis."""
    rest = sum(math.prod(size(other) for other in names) for names in parts if name not in names)
    with_it = sum(
        math.prod(size(other) for other in names if other != name)
        for names in parts
        if name in names
    )
    return max(0, length - rest) // with_it


def _flat(parts: Sequence[Sequence[str]]) -> Iterator[str]:
    return (name for names in parts for name in names)


def written(axis: Axis) -> str:
    """Return the text of an axis."""
    products = ["".join(product) for product in axis]
    if len(products) > 1:
        return f"[{'+'.join(products)}]"
    return f"({products[0]})" if len(axis[0]) > 1 else products[0]
