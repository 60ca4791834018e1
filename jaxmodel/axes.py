"""Axes: what a model declares about its leaves, once.

A model's `Axes` gives each leaf of one layer its axes in the letters that `ops.einsum` reads:
`("blocks/.*/attn/q", "(KGh)D")` for a weight `[K * G * h, D]`. A letter stands for a set of units:
hidden units `F`, groups of heads `K`, experts `E`, channels `C`, the residual stream `D`, the
vocabulary `V`. From the declaration follow where leaves lie on a mesh (`specs`), which leaves are
matrices, tables or vectors (`roles`), and which axes of which leaves belong together (`groups`):
what prunes, merges, permutes or scales a unit has to treat all of them alike.

How a leaf's axes are written. One letter is one axis. Letters in parentheses share an axis, the
first of them slowest, so `(KGh)` is heads one after the other. Names in brackets stand one behind
the other along an axis: `[C0+C1]` is a concatenation. A letter may carry a number (`C0`, `C12`). A
capital letter is a set of units in no order: if they change places in all leaves of their group,
the model computes the same. A small letter (`h` of a head, which rotary positions order; `x` of a
kernel, `c` of classes) and those that `Axes.ordered` lists (`V`) have an order that something
outside of the weights knows; `_` is an axis that nothing is said about. A word may follow: `table`
for rows that are looked up, `router` for a matrix whose outputs choose experts, `measured` for
statistics that no optimiser trains. `...` alone says nothing about any axis, however many there
are; what such a leaf is, is guessed from its name and shape.

Which letters are the same units. A letter belongs to its layer, and outside of layers to its
folder: `F` of `blocks/3` and of `blocks/4` are two sets. Those that `Axes.shared` lists (by default
`D` and `V`) and all with a number are one set in the whole tree.

>>> mlp = Axes((("blocks/.*/up", "FD"), ("blocks/.*/down", "DF"), ("norm", "D")))
>>> params = {"norm": jnp.ones(2), "blocks": {"0-1": {"up": jnp.ones((2, 3, 2)), "down": jnp.ones((2, 2, 3))}}}
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

The first entry counts whose mesh axis no earlier axis of the leaf took.
"""

ROLES = ("matrix", "experts", "router", "table", "head", "vector", "measured")
"""What a leaf of one layer is: a matrix, a matrix for each expert (`E` in front), the matrix that
chooses experts, a table whose rows are looked up, a matrix whose outputs are those of the model
(`V` or `c` in front), a vector or scalar, a statistic.
"""

type Roles = Callable[[str, tuple[int, ...]], str]  # path and shape of one layer's leaf -> its role

type Product = tuple[str, ...]
type Axis = tuple[Product, ...]  # the parts of a concatenation; most axes have one

_OUTSIDE = ((("V",),), (("c",),))  # what comes out of a head
_VECTORS = re.compile(r"(?i)(.*/)?([^/]*norm[^/]*/[^/]*|[^/]*bias|scale|[^/]*token|cls|class)")
_TABLES = re.compile(r"(.*/)?[^/]*(embed|positions|tokens)[^/]*")
_HEADS = re.compile(r"(.*/)?[^/]*head[^/]*")
_EXPERTS = (("E",),)
_STATE = "state/"  # what a foreign module keeps stands there
_ANY = "..."
_AXIS = re.compile(r"_|[A-Za-z]\d*|\(([A-Za-z]\d*)+\)|\[[^\[\]]*\]")
_UNITS = re.compile(r"_|[A-Za-z]\d*")
_UNKNOWN: Axis = (("_",),)


class Letters(NamedTuple):
    """The axes of one leaf, read from their text."""

    axes: tuple[Axis, ...]
    role: str

    def __str__(self) -> str:
        return "".join(map(written, self.axes))


@dataclasses.dataclass(frozen=True)
class Axes:
    """The declaration of a model.

    Attributes:
      rules: (pattern of layer paths, letters), or with a third entry, the `PartitionSpec` of leaves
        that lie in another way than their letters say. The patterns are those of `tree`: the first
        match wins, `tree.optional` may match nothing.
      sizes: (letter, size) of letters that the shapes do not tell, such as `h` where heads share an
        axis.
      shared: letters without a number that are one set in the whole tree.
      ordered: capital letters whose order something outside of the weights knows: the vocabulary,
        always; `D` where the model returns activations or adds fixed positions, channels that group
        norms take by groups.
      fused: names of leaves of one folder that read one input, and that the model's layers also
        read where they are one leaf; see `layers.fuse`.

    Raises:
      InputError: letters that cannot be read.
    """

    rules: tuple[tuple[str, str] | tuple[str, str, PartitionSpec], ...]
    sizes: tuple[tuple[str, int], ...] = ()
    shared: tuple[str, ...] = ("D", "V")
    ordered: tuple[str, ...] = ("V",)
    fused: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for _, text, *_ in self.rules:
            read(text)

    @property
    def highest(self) -> int:
        """The highest number of a letter, -1 if none has one."""
        return max(
            (int(n) for _, text, *_ in self.rules for n in re.findall(r"\d+", text)), default=-1
        )

    def under(self, prefix: str, number: int) -> Axes:
        """The declaration of the same leaves below a prefix, for a model that holds several.

        Args:
          prefix: of the paths, without its slash.
          number: of the letters that are one set in the whole tree: `D` becomes `D1`, so that each
            model keeps a `D` of its own. A letter that has a number gets one that is higher by
            `number + 1`.

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
        sizes = tuple((other(letter), size) for letter, size in self.sizes)
        return Axes(tuple(rules), sizes, self.shared, tuple(map(other, self.ordered)), self.fused)


class Member(NamedTuple):
    """One axis of one layer's leaf, or a part of it, in which a group's units stand:

    `[before, size, after]` from `start` on.
    """

    path: str
    axis: int
    start: int
    before: int
    after: int


class Group(NamedTuple):
    """A set of units and all places where they stand.

    `ordered` says that the units cannot change places without changing what the model computes.
    """

    letter: str
    size: int
    ordered: bool
    members: tuple[Member, ...]


@functools.cache
def read(text: str) -> Letters:
    """Read the axes of a leaf, as the head of this file says how they are written.

    >>> read("(Kh)D").axes
    ((('K', 'h'),), (('D',),))

    Raises:
      InputError: the text is something else.
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
    """The role of a leaf that nobody declared, from its name and shape: of another's module, or of
    an optimiser used by itself.

    A leaf of three axes or more that is longer than one along one of them only is a vector.

    >>> guessed("Dense_0/kernel", (4, 3)), guessed("LayerNorm_0/scale", (3,)), guessed("cls", (1, 1, 3)), guessed("embed", (9, 3))
    ('matrix', 'vector', 'vector', 'table')
    """
    if path.startswith(_STATE):
        return "measured"
    long = len(shape) if len(shape) < 3 else sum(n > 1 for n in shape)
    if long < 2 or _VECTORS.fullmatch(path):
        return "vector"
    return "table" if _TABLES.fullmatch(path) else "head" if _HEADS.fullmatch(path) else "matrix"


def role_of(axes: Axes) -> Roles:
    """Tell the role of single leaves, which may be some of a model's."""
    known = [(re.compile(pattern), read(text).role) for pattern, text, *_ in axes.rules]

    @functools.cache
    def role(path: str, shape: tuple[int, ...]) -> str:
        found = next((role for pattern, role in known if pattern.fullmatch(path)), _ANY)
        return guessed(path, shape) if found == _ANY else found

    return role


UNDECLARED = Axes(((".*", _ANY),))
"""The axes of a model of which nothing is known; every device has all of it."""


def trainable(axes: Axes) -> Callable[[str], bool]:
    """Tell which leaves train where nobody says: all but statistics, which have no gradient, yet
    an optimiser's decay would move them.

    Returns:
      layer path -> bool, for `tree.partition`.
    """
    role = role_of(axes)
    return lambda path: role(path, ()) != "measured"


def heads(axes: Axes, params: tree.Params) -> set[str]:
    """The layer paths of the model's head: the leaves whose outputs are those of the model (`V` or
    `c` among their axes) and that are no tables, and what stands in one folder with them.

    >>> head = {"classes": jnp.ones((3, 2)), "pool": jnp.ones((2, 4))}
    >>> sorted(heads(Axes((("head/classes", "cF"), ("head/pool", "FD"), ("norm", "D"))), {"head": head, "norm": jnp.ones(4)}))
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
    """The letters of each layer path.

    Raises:
      InputError: a leaf without letters, with more or fewer than it has axes, or a rule that
        decides nothing.
    """
    texts = tree.assign([(pattern, text) for pattern, text, *_ in axes.rules], params)
    found = {}
    for path, shape in _shapes(params).items():
        letters = read(texts[path])
        if letters.role == _ANY:
            letters = Letters((_UNKNOWN,) * len(shape), letters.role)
        if len(letters.axes) != len(shape):
            raise InputError(
                f"axes: the leaf {path!r} has the shape {list(shape)} but the axes {str(letters)!r}"
            )
        found[path] = letters
    return found


def roles(axes: Axes, params: tree.Params) -> dict[str, str]:
    """The role of each layer path: one of `ROLES`.

    Raises:
      InputError: see `assign`.
    """
    assign(axes, params)
    role = role_of(axes)
    return {path: role(path, shape) for path, shape in _shapes(params).items()}


@functools.cache
def specs(axes: Axes, placement: tuple[tuple[str, str], ...] = PLACEMENT) -> tree.Rules:
    """Rules path -> `PartitionSpec`, for `sharding.shardings`.

    Args:
      axes: of a model.
      placement: see `PLACEMENT`.
    """
    return tuple(
        (pattern, own[0] if own else _spec(read(text), placement))
        for pattern, text, *own in axes.rules
    )


def groups(axes: Axes, params: tree.Params) -> dict[str, Group]:
    """All sets of units by name: `D` where the whole tree shares it, `blocks/7/F` where it belongs
    to a layer.

    Args:
      axes: of the model.
      params: arrays, compressed leaves or shapes.

    Raises:
      InputError: see `assign`; sizes that contradict each other or that nothing tells.
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
            letter := name.split("/")[-1], sizes[name], _is_ordered(axes, letter), tuple(where)
        )
        for name, where in members.items()
    }


def select(axes: Axes, params: tree.Params, units: Mapping[str, jax.Array]) -> tree.Params:
    """Keep some units of groups, in the order given, in every leaf that has them; a permutation
    keeps all.

    Args:
      axes: of the model.
      params: plain arrays.
      units: name of a group -> indices, int `[n]`.

    Raises:
      InputError: a name that is no group's.
    """
    known = groups(axes, params)
    params = tree.unstack(params)
    for name in units:
        if name not in known:
            raise InputError(f"units: {name!r} given; allowed: {', '.join(known)}")
    for name, index in units.items():
        group = groups(axes, params)[name]
        leaves = tree.flatten(params)
        # The last part of a concatenation first, so that what stands before it has not moved yet.
        for member in sorted(group.members, key=lambda member: member.start, reverse=True):
            leaves[member.path] = _take(leaves[member.path], member, index, group.size)
        params = tree.unflatten(leaves)
    return tree.stack(params)


def narrower(axes: Axes, whole: tree.Params, params: tree.Params) -> dict[str, int]:
    """The groups of units of which parameters have fewer than a model's config says, with how many
    they have.

    Args:
      axes: of the model.
      whole: the shapes of its config.
      params: what is there.

    Raises:
      InputError: leaves that differ in anything else, such as one that is missing or narrower than
        its group.
    """
    wanted = groups(axes, whole)
    there = groups(axes, params)
    fewer = {
        name: group.size
        for name, group in there.items()
        if name in wanted and group.size != wanted[name].size
    }
    for name, size in fewer.items():
        if wanted[name].ordered or size > wanted[name].size:
            path = there[name].members[0].path
            raise InputError(
                f"params: {path!r} has {size} of {name}; the config needs {wanted[name].size}"
            )
    return fewer


def shapes(axes: Axes, whole: tree.Params, fewer: Mapping[str, int]) -> tree.Params:
    """The shapes of parameters with fewer units in some groups (see `narrower`), a layer each.

    Raises:
      InputError: a name that is no group's, or one of units in an order, or more of them than the
        config says.
    """
    known = groups(axes, whole)
    for name, size in fewer.items():
        if name not in known or known[name].ordered or not 0 < size <= known[name].size:
            most = (
                f"1 to {known[name].size}"
                if name in known and not known[name].ordered
                else "sets of units in no order"
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
    if len(taken) == 1 and taken[0] == "fsdp":  # a vector is too small to be gathered for every use
        taken = []
    while taken and taken[-1] is None:
        taken.pop()
    return PartitionSpec(*taken)


def _is_ordered(axes: Axes, letter: str) -> bool:
    return letter.islower() or letter in axes.ordered or letter[0] in axes.ordered


def _shapes(params: tree.Params) -> dict[str, tuple[int, ...]]:
    return {
        layer: tree.layer_shape(path, leaf)
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
    }


def _scoped(axes: Axes, path: str, letter: str) -> str:
    """The name of a letter's set of units: its layer's or folder's path in front, unless the whole
    tree shares it.
    """
    if len(letter) > 1 or letter in axes.shared:
        return letter
    keys = path.split("/")
    at = next(
        (i + 1 for i in range(1, len(keys)) if keys[i - 1] == tree.BLOCKS and tree.span(keys[i])),
        len(keys) - 1,
    )
    return "/".join([*keys[:at], letter])


def _sizes(
    axes: Axes, by_path: Mapping[str, Letters], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """The size of each set of units: axes of one unknown letter tell it, until no axis tells
    anything new.
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
            parts, length, path = left[0]
            unknown = sorted(name for name in _flat(parts) if size(name) is None)
            names = ", ".join(unknown)
            raise InputError(
                f"axes: no leaf tells how the {length} of {path!r} part into {names}; give them "
                f"as sizes"
            )
        waiting = left
    return known


def _solve(parts, length, name, size) -> int:
    """The size of the one unknown letter of an axis."""
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
    """The text of an axis."""
    products = ["".join(product) for product in axis]
    if len(products) > 1:
        return f"[{'+'.join(products)}]"
    return f"({products[0]})" if len(axis[0]) > 1 else products[0]
