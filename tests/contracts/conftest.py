"""The members that the laws are about: every size whose name begins with `tiny`, of every file in jaxmodel/models.

And of one family from outside of the package, which docs/how_to/own_model.md declares.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.models import Model, sizes

PAGE = Path(__file__).parent.parent.parent / "docs" / "how_to" / "own_model.md"


def declare_family_of_page() -> int:
    """Run the file that the how-to shows, and return its lines."""
    source = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    module = sys.modules.setdefault("parallel", types.ModuleType("parallel"))
    if not hasattr(module, "model"):
        exec(compile(source, str(PAGE), "exec"), module.__dict__)
    return len(source.splitlines())


LINES_OF_PAGE = declare_family_of_page()
B, T = 3, 8
TINY = [name for name in sizes() if name.split("/")[1].startswith("tiny")]


def is_decoder(name: str) -> bool:
    """Whether a member reads one text and continues it."""
    module, config = sizes()[name]
    return module.model(config).continues


def example(model: Model, batch: int, length: int, seed: int = 0) -> dict[str, jax.Array]:
    """Inputs with the shapes that the model says it needs."""
    rng = np.random.default_rng(seed)

    def one(a: jax.ShapeDtypeStruct) -> jax.Array:
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        return jnp.asarray(rng.integers(0, model.config.vocab, a.shape) if whole else rng.normal(size=a.shape), a.dtype)

    return {name: one(a) for name, a in model.inputs(batch, length).items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A member with parameters that are large everywhere, biases and norms too."""

    name: str
    module: Any
    model: Model
    params: tree.Params
    inputs: dict[str, jax.Array]
    apply: Any  # jitted: params, inputs -> logits

    @property
    def tokens(self) -> jax.Array:
        return self.inputs["tokens"]

    def shapes(self, size: str) -> tree.Params:
        """The shapes of the parameters of a size of this member's family."""
        return shapes_of(f"{self.name.split('/')[0]}/{size}")

    @functools.cached_property
    def init(self) -> Any:
        """jitted: key -> params; compiled once for all laws."""
        return jax.jit(self.model.init)

    @functools.cached_property
    def mixed(self) -> tree.Params:
        """Every leaf of two axes or more, which only the operations may read: another kind in each layer, a table int8."""

        def compress(path: str, leaf: jax.Array) -> object:
            if leaf.ndim < 2:
                return leaf
            keys = path.split("/")
            if "blocks" not in keys:
                return quantise(leaf, 8)
            return KINDS[int(keys[keys.index("blocks") + 1]) % len(KINDS)](leaf)

        return tree.map_leaves(compress, tree.unstack(self.params))

    @functools.cached_property
    def of_mixed(self) -> jax.Array:
        """The logits of `mixed`."""
        return self.apply(self.mixed, self.inputs)


def quantise(w: jax.Array, bits: int, group: int | None = None, **static) -> QTensor:
    group = group if group and w.shape[-1] % group == 0 else w.shape[-1]
    grouped = np.asarray(w).reshape(*w.shape[:-1], -1, group)
    scale = np.maximum(np.abs(grouped).max(-1), 1e-9) / (2 ** (bits - 1) - 1)
    codes = np.round(grouped / scale[..., None]).astype(np.int32).reshape(w.shape)
    group = group if group < w.shape[-1] else None
    return QTensor.from_codes(jnp.asarray(codes), jnp.asarray(scale), bits=bits, group=group, **static)


def half(w: jax.Array) -> Sparse:
    size = np.abs(np.asarray(w))
    return Sparse.from_dense(w, jnp.asarray(size >= np.median(size, axis=-1, keepdims=True)))


KINDS = (lambda w: quantise(w, 8), lambda w: quantise(w, 4, group=16), half)


@functools.cache
def shapes_of(name: str) -> tree.Params:
    """The shapes of a member's parameters, big ones too, without their arrays."""
    module, config = sizes()[name]
    return jax.eval_shape(module.model(config).init, jax.random.key(0))


def make_case(name: str) -> Case:
    module, config = sizes()[name]
    model = module.model(config)
    rng = np.random.default_rng(0)
    shapes = shapes_of(name)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.2, a.dtype), shapes)
    params = visible(positive(params))
    apply = jax.jit(lambda params, inputs: model.apply(params, inputs).logits)
    return Case(name, module, model, params, example(model, B, T), apply)


def positive(params: tree.Params) -> tree.Params:
    """Statistics that are variances must be above zero to mean anything."""
    return tree.map_leaves(lambda path, leaf: jnp.abs(leaf) + 0.5 if path.endswith("variance") else leaf, params)


def visible(params: tree.Params) -> tree.Params:
    """Cosines of random vectors are small and much alike: CLIP's scale makes logits of the others' size of them."""
    return tree.map_leaves(lambda path, leaf: leaf + 2 if path == "scale" else leaf, params)


@pytest.fixture(scope="module", params=TINY)
def case(request) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module", params=[name for name in TINY if is_decoder(name)])
def decoder(request) -> Case:
    return make_case(request.param)
