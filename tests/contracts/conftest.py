"""The members that the laws are about: every size whose name begins with `tiny`, of every file in
jaxmodel/models.

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
import optax
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
B = 3
T = 8
TINY = [name for name in sizes() if name.split("/")[1].startswith("tiny")]
KINDS = [
    *(name for name in TINY if name.endswith("/tiny")),
    *("clip/tiny-siglip", "connected/tiny-groups", "llama/tiny-sparse"),
    *("resnet/tiny-group", "rnn/tiny-gru", "vit/tiny-attention"),
]
"""For laws about what all members share: one of each family, and those whose layers are of another
kind than that one's.
"""


FAMILIES = [*(name for name in TINY if name.endswith("/tiny")), "llama/tiny-sparse"]
"""For laws that compile a program for each of them: one of each family, and one with experts."""

FORMS = ("clip/tiny", "llama/tiny", "llama/tiny-sparse", "resnet/tiny", "rnn/tiny", "t5/tiny")
"""For laws about code that all models share: two towers, stacked blocks, experts, convolutions,
recurrence, and a text that is read and another that is written.
"""

CACHED = ("gpt_oss/tiny", "llama/tiny")
"""For laws about code that all caches share: with windows that differ by layer, and without."""


def is_decoder(name: str) -> bool:
    """Whether a member reads one text and continues it."""
    module, config = sizes()[name]
    return module.model(config).continues


def example(model: Model, batch: int, length: int, seed: int = 0) -> dict[str, jax.Array]:
    """Inputs with the shapes that the model says it needs."""
    rng = np.random.default_rng(seed)

    def one(a: jax.ShapeDtypeStruct) -> jax.Array:
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        return jnp.asarray(
            rng.integers(0, model.config.vocab, a.shape) if whole else rng.normal(size=a.shape),
            a.dtype,
        )

    return {name: one(a) for name, a in model.inputs(batch, length).items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A member with parameters that are large everywhere, biases and norms too, and what is
    compiled once for all laws.
    """

    name: str
    module: Any
    model: Model
    shapes: tree.Params  # of what `init` gives
    params: tree.Params
    inputs: dict[str, jax.Array]
    traces: list[Model] = dataclasses.field(default_factory=list)  # what `run` was traced for

    @property
    def tokens(self) -> jax.Array:
        return self.inputs["tokens"]

    @functools.cached_property
    def run(self) -> Any:
        """jitted: model, params, inputs -> logits and what the head reads."""

        def run(model, params, inputs):
            self.traces.append(model)
            out = model.apply(params, inputs)
            return out.logits, out.hidden

        return jax.jit(run, static_argnums=0)

    def apply(self, params: tree.Params, inputs: Any) -> jax.Array:
        """The logits of this member."""
        return self.run(self.model, params, inputs)[0]

    @functools.cached_property
    def init(self) -> Any:
        """jitted: key -> params."""
        return jax.jit(self.model.init)

    @staticmethod
    def loss(model: Model, params: tree.Params, inputs: dict[str, jax.Array]) -> jax.Array:
        """Cross entropy of some fixed classes in training, for whatever the last axis of the logits
        is.
        """
        logits = model.apply(params, inputs, rng=jax.random.key(0), train=True).logits
        classes = (
            jnp.arange(logits[..., 0].size, dtype=jnp.int32).reshape(logits.shape[:-1])
            % logits.shape[-1]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

    @functools.cached_property
    def gradients(self) -> Any:
        """jitted: params, inputs -> the loss and its gradients."""
        return jax.jit(jax.value_and_grad(functools.partial(self.loss, self.model)))

    @functools.cached_property
    def apart(self) -> tree.Params:
        """The parameters with each layer in a segment of its own."""
        return jax.tree.map(jnp.asarray, tree.unstack(jax.device_get(self.params)))

    @functools.cached_property
    def mixed(self) -> tree.Params:
        """Every leaf of two axes or more, which only the operations may read: another kind in each
        layer, a table int8.
        """

        def compress(path: str, leaf: jax.Array) -> object:
            if leaf.ndim < 2:
                return leaf
            keys = path.split("/")
            if "blocks" not in keys:
                return quantise(leaf, 8)
            return COMPRESSED[int(keys[keys.index("blocks") + 1]) % len(COMPRESSED)](leaf)

        return tree.map_leaves(compress, self.apart)

    @functools.cached_property
    def of_mixed(self) -> jax.Array:
        """The logits of `mixed`."""
        return self.apply(self.mixed, self.inputs)


pack = jax.jit(QTensor.from_codes, static_argnames=("bits", "group"))


def quantise(w: jax.Array, bits: int, group: int | None = None) -> QTensor:
    group = group if group and w.shape[-1] % group == 0 else w.shape[-1]
    grouped = np.asarray(w).reshape(*w.shape[:-1], -1, group)
    scale = np.maximum(np.abs(grouped).max(-1), 1e-9) / (2 ** (bits - 1) - 1)
    codes = np.round(grouped / scale[..., None]).astype(np.int32).reshape(w.shape)
    group = group if group < w.shape[-1] else None
    return pack(codes, scale, bits=bits, group=group)


def half(w: jax.Array) -> Sparse:
    size = np.abs(np.asarray(w))
    return Sparse.from_dense(w, jnp.asarray(size >= np.median(size, axis=-1, keepdims=True)))


COMPRESSED = (lambda w: quantise(w, 8), lambda w: quantise(w, 4, group=16), half)


def make_case(name: str) -> Case:
    module, config = sizes()[name]
    model = module.model(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    arrays = jax.tree.map(lambda a: (rng.normal(size=a.shape) * 0.2).astype(a.dtype), shapes)
    params = jax.tree.map(jnp.asarray, tree.map_leaves(meaningful, arrays))
    return Case(name, module, model, shapes, params, example(model, B, T))


def meaningful(path: str, leaf: np.ndarray) -> np.ndarray:
    """Variances must be above zero to mean anything; cosines of random vectors are small and much
    alike, so CLIP's scale makes logits of the others' size of them.
    """
    if path.endswith("variance"):
        return np.abs(leaf) + leaf.dtype.type(0.5)
    return leaf + leaf.dtype.type(2) if path == "scale" else leaf


@pytest.fixture(scope="session")
def member(request) -> Case:
    return make_case(request.param)


@pytest.fixture
def case(member) -> Case:
    """Any member: for laws about what it declares and computes."""
    return member


@pytest.fixture
def kind(member) -> Case:
    """One of each kind: for laws about what members share."""
    return member


@pytest.fixture
def chosen(member) -> Case:
    """One of each family: for costly laws about what members share."""
    return member


@pytest.fixture
def form(member) -> Case:
    """One of each form: for laws about code that is one for all."""
    return member


@pytest.fixture
def cached(member) -> Case:
    """One of each kind of cache: for laws about code that is one for all of them."""
    return member


@pytest.fixture
def decoder(member) -> Case:
    """A member that reads one text and continues it."""
    return member


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All six are one fixture of the session, so that pytest runs the tests of a member, of all
    files, one after the other.
    """
    if "member" in metafunc.fixturenames:
        decoders = [name for name in TINY if is_decoder(name)]
        lists = {
            "kind": KINDS,
            "chosen": FAMILIES,
            "form": FORMS,
            "decoder": decoders,
            "cached": CACHED,
        }
        names = next(
            (names for fixture, names in lists.items() if fixture in metafunc.fixturenames), TINY
        )
        metafunc.parametrize("member", names, indirect=True, scope="session")
