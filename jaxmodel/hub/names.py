"""Names and forms of a model's leaves in other people's files.

A `Name` maps the path of a leaf (with `{}` for the layer) to the name of a tensor, and states how
the two differ in form. The tables of each family are in `jaxmodel.hub.families`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any

import jax
import numpy as np

from jaxmodel import schema, tree
from jaxmodel.errors import InputError, border
from jaxmodel.hub.gguf import GGUFFile
from jaxmodel.models import Model, families
from jaxmodel.ops import Policy


@dataclasses.dataclass(frozen=True)
class Name:
    """The tensor of the leaf `path` in a file, and its form there.

    Attributes:
      path: of the leaf, `{}` for the layer.
      tensor: its name in the file, `{}` for the layer, `{expert}` for the expert.
      transposed: whether the file has `[in, out]` (GPT-2), after the experts if one tensor holds
        them all (gpt-oss).
      part: (index, sizes): the leaf is one of several that the file joins along our first axis,
        with lengths in these proportions (GPT-2's q, k, v: 1, 1, 1).
      woven: whether equal parts alternate along the file's last axis, instead of following one
        another (gpt-oss).
      pairs: number of heads, if the rows of a rotary pair are neighbours (GGUF's q and k); else 0.
      trailing: axes of the file that our last axis flattens (the kernel of a convolution).
      lead: number of leading axes of length one that only the file has.
      experts: number of experts, if the file has a tensor for each; else 0.
    """

    path: str
    tensor: str
    transposed: bool = False
    part: tuple[int, tuple[int, ...]] | None = None
    woven: bool = False
    pairs: int = 0
    trailing: tuple[int, ...] = ()
    lead: int = 0
    experts: int = 0

    @property
    def packed(self) -> str:
        """The unique name of a stored compressed leaf; it includes a part's own name."""
        if self.experts:
            return self.tensor.replace("{expert}.", "")
        if self.part is None:
            return self.tensor
        stem, kind = self.tensor.rsplit(".", 1)
        return f"{stem}.{self.path.rsplit('/', 1)[1].removesuffix('_bias')}.{kind}"

    @property
    def joined(self) -> int:
        """The axis of the file along which parts are joined."""
        return -1 if self.transposed or self.woven else 0

    @property
    def alone(self) -> Name:
        """The entry for a part that is stored by itself because its siblings have another form."""
        return dataclasses.replace(self, tensor=self.packed, part=None, woven=False)

    def at(self, layer: str, expert: int = 0) -> str:
        """Return the name of the file's tensor for the leaf of a layer, or for one expert of it."""
        return self.tensor.replace("{expert}", str(expert)).format(layer)

    def tensors(self, layer: str) -> Iterator[str]:
        """Return the names for all experts, lazily, since a config can claim any number of them."""
        return (self.at(layer, expert) for expert in range(max(self.experts, 1)))

    def rows(self, count: int) -> np.ndarray:
        """Return the indices of our leaf's rows in a file whose rows are in rotary pairs."""
        return np.arange(count).reshape(self.pairs, -1, 2).swapaxes(1, 2).reshape(-1)

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the file's whole tensor for a leaf of this shape."""
        shape = shape[1:] if self.experts else shape
        shape = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        if self.part is not None:
            index, sizes = self.part
            whole = shape[self.joined] // sizes[index] * sum(sizes)
            shape = (*shape[:-1], whole) if self.joined else (whole, *shape[1:])
        return (*(1,) * self.lead, *(shape[:-1] if self.trailing else shape), *self.trailing)


class Tensors:
    """The tensors of a file or folder. `where` names it in messages."""

    where: str = ""

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        raise NotImplementedError

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives."""
        raise NotImplementedError

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """Return a tensor, or a part of it.

        Args:
          name: of the tensor.
          index: slices of the first axes; the first may be an array of rows.
        """
        raise NotImplementedError


def read_leaf(
    tensors: Tensors, name: Name, layer: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """Return a part of a layer's leaf, reading no more of the file than it needs.

    Args:
      tensors: the file.
      name: the leaf's entry.
      layer: its number as text.
      shape: of the whole leaf.
      index: a slice for each axis of the leaf, with its start and stop.
    """
    if name.experts:
        return np.stack(
            [
                _read(tensors, name.at(layer, e), name, shape[1:], index[1:])
                for e in range(index[0].start, index[0].stop)
            ]
        )
    return _read(tensors, name.at(layer), name, shape, index)


def _read(
    tensors: Tensors, stored: str, name: Name, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    place: list[Any] = [*index[:-2], index[-1], index[-2]] if name.transposed else list(index)
    if name.woven and name.part is not None:
        of = len(name.part[1])
        last = place[-1]
        place[-1] = slice(of * last.start, of * last.stop)
        found = tensors.read(stored, tuple(place))[..., name.part[0] :: of]
        return np.swapaxes(found, -1, -2) if name.transposed else found
    if name.part is not None:
        at, sizes = name.part
        axis = name.joined
        first = (shape[-2] if name.transposed else shape[0]) // sizes[at] * sum(sizes[:at])
        place[axis] = slice(place[axis].start + first, place[axis].stop + first)
    if name.pairs:
        place[0] = name.rows(shape[0])[place[0]]
    if name.trailing:
        whole = tensors.read(stored, (slice(0, 1),) * name.lead + tuple(place[:-1]))
        return whole.reshape(*whole.shape[name.lead : -len(name.trailing)], -1)[..., index[-1]]
    found = tensors.read(stored, (slice(0, 1),) * name.lead + tuple(place))
    found = found.reshape(found.shape[name.lead :])
    return np.swapaxes(found, -1, -2) if name.transposed else found


def to_file(name: Name, leaf: np.ndarray) -> np.ndarray:
    """Return a plain leaf (of one expert) in the file's form, before parts are joined."""
    leaf = np.swapaxes(leaf, -1, -2) if name.transposed else leaf
    leaf = leaf.reshape(*leaf.shape[:-1], *name.trailing) if name.trailing else leaf
    return leaf.reshape((1,) * name.lead + leaf.shape)


_WRAPPERS = (
    "_orig_mod.",
    "module.",
    "model.",
    "language_model.",
    "model.language_model.",
    "transformer.",
    "_orig_mod.module.",
)
_WRAPPERS += ("module._orig_mod.", "base_model.model.", "base_model.")
_OLD_NORMS = re.compile(r"(LayerNorm|layer_norm)\.(weight|bias)$")


def _old_norm(found: re.Match[str]) -> str:
    """Return TensorFlow's name of the weight or bias of a norm, which the earliest files use."""
    return f"{found[1]}.{'gamma' if found[2] == 'weight' else 'beta'}"


@dataclasses.dataclass(frozen=True)
class Family:
    """The file layout of one architecture.

    Attributes:
      architecture: its name, as `models.families()` and `Model.family` have it.
      kinds: values of `model_type` in config.json that it reads.
      classes: values of `architectures` there that it reads whatever the `model_type` is.
      names: config -> entries for HF folders.
      config_from_hf: config.json -> Config.
      config_to_hf: Config -> config.json, with the `model_type` that fits it; None if no HF family
        has this config.
      unread: regular expression of keys of config.json that do not change what is computed; see
        `keys.check_asked`.
      ignored: regular expression of tensors that are not weights (masks, tables, a copy of the tied
        embedding).
      prefix: of HF names, which some files omit.
      spellings: alternative beginnings of our names: (ours, theirs).
      view: the tensors of a folder -> those that `names` refers to, where files pack some.
      card: config.json -> facts for the bundle's card that are not in the config.
      gguf_kinds: values of `general.architecture` that it reads.
      gguf_names: config -> entries for GGUF.
      config_from_gguf: an open GGUF file -> Config.
      gguf_ignored: like `ignored`, for GGUF: the tensors that `config_from_gguf` reads.
      copies: tensor -> the leaf that it must equal, where a file may hold a copy of a tied leaf.
      head: the one of `copies` that is the head of a model whose head is not tied.
      settle: a config and whether the file has its own head (None for no head at all) -> the config
        that the file means.
    """

    architecture: str
    kinds: tuple[str, ...]
    names: Callable[[Any], Iterable[Name]]
    config_from_hf: Callable[[dict[str, Any]], Any]
    config_to_hf: Callable[[Any], dict[str, Any] | None]
    classes: tuple[str, ...] = ()
    ignored: str = r"(?!)"
    prefix: str = ""
    gguf_kinds: tuple[str, ...] = ()
    gguf_names: Callable[[Any], Iterable[Name]] | None = None
    config_from_gguf: Callable[[GGUFFile], Any] | None = None
    gguf_ignored: str = r"(?!)"
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head: str = "lm_head.weight"
    spellings: tuple[tuple[str, str], ...] = ()
    card: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}
    unread: str = r"(?!)"
    view: Callable[[Tensors], Tensors] = lambda tensors: tensors
    settle: Callable[[Any, bool | None], Any] = lambda config, own: (
        dataclasses.replace(config, tied=False) if own else config
    )

    def spelt(self, tensor: str) -> Iterator[str]:
        """Yield the names that a tensor may have in a file."""
        spelt = list(
            dict.fromkeys([tensor, tensor.removeprefix(self.prefix), tensor.removeprefix("model.")])
        )
        spelt += [
            theirs + tensor.removeprefix(ours)
            for ours, theirs in self.spellings
            if tensor.startswith(ours)
        ]
        spelt += [_OLD_NORMS.sub(_old_norm, name) for name in spelt if _OLD_NORMS.search(name)]
        yield from spelt
        for wrapper in _WRAPPERS:  # modules that contained this one when it was saved
            yield from (wrapper + name for name in spelt)

    def model(self, config: Any, policy: Policy) -> Model:
        """Return the model of a config."""
        return families()[self.architecture].model(config, policy)


def find(names: Iterable[Name], layer_path: str) -> tuple[Name, str]:
    """Return the entry for a layer's leaf (`blocks/7/attn/q`) and the layer's number as text."""
    layer = re.search(r"(?:^|/)(\d+)/", layer_path)
    template = layer_path if layer is None else layer_path.replace(f"/{layer[1]}/", "/{}/", 1)
    for name in names:
        if name.path == template:
            return name, layer[1] if layer else ""
    raise InputError(f"hub: no file name is known for the leaf {layer_path!r}")


def check_fields(config: Any, where: str) -> Any:
    """Return a config made from a file, after checking its fields against the types of its class.

    Raises:
      InputError: a field of another type, or a size below 1.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = kinds[field.name]
        if dataclasses.is_dataclass(value):
            check_fields(value, where)
        else:
            least = field.metadata.get("least", 0 if field.default == 0 else 1)
            kind = Annotated[int, schema.Range(least, 2**31 - 1)] if kind is int else kind
            schema.make(value, kind, where, field.name)
    return config


def fixed(hf: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a config.json in which a key has a value that this family does not support.

    Args:
      hf: config.json.
      values: key -> what is allowed; the first is the meaning of a missing key.

    Raises:
      InputError: such a key.
    """
    for key, allowed in values.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise InputError(
                f"config.json: {key} is {hf[key]!r}; allowed: {' or '.join(map(repr, allowed))}"
            )


def layer_shapes(model: Model) -> tree.Params:
    """Return the shapes of all leaves, one layer at a time.

    Raises:
      InputError: sizes too large for arrays.
    """
    with border("config: its sizes are too large for arrays, or do not fit together"):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves: dict[str, Any] = {}
    for path, leaf in tree.flatten(shapes).items():
        for layer in tree.layer_paths(path):
            leaves[layer] = jax.ShapeDtypeStruct(tree.layer_shape(path, leaf), leaf.dtype)
    return tree.unflatten(leaves)
