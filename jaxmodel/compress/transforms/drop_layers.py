"""Removal of whole layers: a model with fewer of them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel import axes, tree
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.transforms.transform import Transform
from jaxmodel.errors import InputError
from jaxmodel.layers.moe import real_tokens
from jaxmodel.leaves import decode
from jaxmodel.models import Model, check_params
from jaxmodel.models.family import build_of
from jaxmodel.models.model import Inputs, begin, by_name
from jaxmodel.schema import Range


@dataclasses.dataclass(frozen=True)
class DropLayers(Transform):
    """Remove the layers that matter least.

    A layer may go if another has the same leaves and reads and writes the same units: what stood in
    front of it is then read by the one behind it. The layers are those of `params["blocks"]`, which
    in a model that reads a source are the decoder's.

    Attributes:
      keep: the share of the layers that stay.
      score: "change", by how much a layer changes what it is given: one minus the cosine of what
        goes in and what comes out, the mean over the tokens ("block influence" of ShortGPT: Men et
        al., 2024); or "magnitude", the squares of its weights, in each leaf relative to their mean
        over the layers.
    """

    keep: Annotated[float, Range(0, 1, above=0)] = 0.75
    score: Literal["change", "magnitude"] = "change"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "change":
            object.__setattr__(self, "needs", ("change",))

    def measure(self, model: Model, params: tree.Params, batches: Sequence[Inputs] | None) -> Stats:
        """Return what each layer changes, by the path of the layer, with the number of tokens."""
        self.layers(model, params)
        if self.score != "change":
            return {}
        start, step = programs(model)
        layers = tree.unstack(params)[tree.BLOCKS]
        total: dict[str, Any] = {}
        for inputs in self.given(batches):
            x, context = start(params, inputs)
            for number in range(tree.depth(layers)):
                i = jnp.int32(number)
                x, found = step(layers[str(number)], i, x, context, inputs)
                path = f"{tree.BLOCKS}/{number}"
                total[path] = jax.tree.map(jnp.add, total[path], found) if path in total else found
        return total

    def change(
        self, model: Model, params: tree.Params, stats: Stats, key: jax.Array
    ) -> tuple[Model, tree.Params]:
        """Return the shorter model and its parameters."""
        alike = self.layers(model, params)
        layers = tree.unstack(params)[tree.BLOCKS]
        depth = tree.depth(layers)
        if self.score == "magnitude":
            scores = _magnitudes({number: layers[str(number)] for number in alike})
        else:
            of = {number: stats[f"{tree.BLOCKS}/{number}"] for number in alike}
            scores = {n: float(one["change"] / one["count"]) for n, one in of.items()}
        gone = sorted(alike, key=scores.__getitem__)[: depth - max(1, round(self.keep * depth))]
        stay = [number for number in range(depth) if number not in gone]
        blocks = {str(n): layers[str(number)] for n, number in enumerate(stay)}
        smaller = _of_layers(model, stay)
        params = tree.stack({**params, tree.BLOCKS: blocks})
        check_params(smaller, params)
        return smaller, params

    def layers(self, model: Model, params: tree.Params) -> list[int]:
        """Return the layers that may go.

        Raises:
          InputError: there are none, with the reason.
        """
        if model.parts.block is None or tree.BLOCKS not in params:
            raise InputError("drop_layers: this model has no stack of layers that runs by itself")
        if build_of(model) is None or not hasattr(model.config, "depth"):
            raise InputError("drop_layers: the config of this model names no number of layers")
        kinds: dict[int, set[Any]] = collections.defaultdict(set)
        for path, letters in axes.assign(model.axes, params).items():
            first, _, rest = path.partition("/")
            if first == tree.BLOCKS:
                number, _, name = rest.partition("/")
                declared = "_" not in str(letters)  # else it may read anything
                kinds[int(number)].add((name, letters if declared else number))
        times = collections.Counter(map(frozenset, kinds.values()))
        found = [number for number in sorted(kinds) if times[frozenset(kinds[number])] > 1]
        if not found:
            raise InputError(
                "drop_layers: each layer of this model has leaves or units of its own, which the "
                "one behind it could not do without"
            )
        return found


def _of_layers(model: Model, layers: Sequence[int]) -> Model:
    """Return the model of the family that has only these layers."""
    build, config = build_of(model), model.config
    assert build is not None
    of = getattr(config, "of_layers", None)  # where the config says something about single layers
    smaller = dataclasses.replace(config, depth=len(layers)) if of is None else of(layers)
    return build(smaller, model.policy)


def _magnitudes(layers: Mapping[int, tree.Params]) -> dict[int, float]:
    """Return the squares of the weights of each layer, in each leaf relative to their mean."""
    squares = jax.jit(lambda leaf: jnp.sum(decode(leaf, jnp.float32) ** 2))
    by_name: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for number, layer in layers.items():
        for name, leaf in tree.flatten(layer).items():
            by_name[name][number] = float(squares(leaf))
    total = dict.fromkeys(layers, 0.0)
    for found in by_name.values():
        mean = max(float(np.mean(list(found.values()))), 1e-30)
        for number, square in found.items():
            total[number] += square / mean
    return total


@functools.lru_cache(maxsize=8)
def programs(model: Model) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return compiled functions: inputs -> activations and context, and one layer, measured."""
    block = model.parts.block
    assert block is not None
    names = tuple(model.inputs(1, 1))

    @jax.jit
    def start(params: tree.Params, inputs: Inputs) -> Any:
        return begin(model, params, inputs)[:2]

    @jax.jit
    def step(layer: tree.Params, i: Array, x: Array, context: Any, inputs: Inputs) -> Any:
        y = block(layer, x, context, None, i, None, False)[0]
        real = real_tokens(by_name(inputs, names))
        off = 1 - _cosine(x.astype(jnp.float32), y.astype(jnp.float32))
        each = jnp.ones_like(off)
        if real is not None and real.shape == off.shape:  # padding is no token
            each = real.astype(jnp.float32)
        return y, {"change": jnp.sum(off * each), "count": jnp.sum(each)}

    return start, step


def _cosine(x: Float[Array, "*n D"], y: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    length = jnp.sqrt(jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1))
    return jnp.sum(x * y, axis=-1) / jnp.maximum(length, 1e-30)
