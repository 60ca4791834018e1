"""New weights by rules: path -> initialiser. Whatever the rules leave to the model (value None)
starts as the model starts it.

A leaf of one layer is `[..., out, in]`: its last axis is the fan-in, the one before it the fan-out,
and the axes in front (experts) are matrices of their own. A convolution's kernel is
`[out, in * places]`, so its fan-in counts the places, and its fan-out does not.

>>> from jaxmodel.models import gpt2
>>> model = gpt2.model(gpt2.SIZES["tiny"])
>>> rules = [("blocks/.*/(q|k|v)", "orthogonal"), ("blocks/.*/up", "he"), ("embed", "normal(0.01)"), (".*", None)]
>>> params = jax.jit(lambda key: initialize(model, key, rules))(jax.random.key(0))
>>> q = params["blocks"]["0-2"]["attn"]["q"][1]
>>> bool(jnp.allclose(q @ q.T, jnp.eye(32), atol=1e-5))
True
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError, unknown
from jaxmodel.models.model import Model

DISTRIBUTIONS = ("normal", "truncated", "uniform")


@dataclasses.dataclass(frozen=True)
class Initializer:
    """Base of the initialisers: `(key, shape, dtype) -> array`, as those of `jax.nn.initializers`,
    but for `[..., out, in]`.

    A new one is a subclass; its class name in lower case is its text form.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if str(field.type).startswith("float") and not isinstance(value, float | int | None):
                raise TypeError(
                    f"{field.name} is {value!r}; a number is needed"
                )  # as any wrong type of an argument

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """New weights for the leaf of one layer.

        Raises:
          InputError: the shape has no fan-in where one is needed.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Initializer):
    """Every weight is `value`."""

    value: float

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Zeros(Initializer):
    """Every weight is 0."""

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Ones(Initializer):
    """Every weight is 1."""

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        return jnp.ones(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform(Initializer):
    """`U[low, high)`; `low` is `-high` where it is left out."""

    high: float = 0.01
    low: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (-self.high if self.low is None else self.low) < self.high:
            raise InputError(
                f"uniform: high {self.high}, low {self.low} given; allowed: a low below the high"
            )

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        low = -self.high if self.low is None else self.low
        return jax.random.uniform(key, shape, jnp.float32, low, self.high).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Normal(Initializer):
    """`N(0, std^2)`."""

    std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_zero("normal", "std", self.std)

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        return (self.std * jax.random.normal(key, shape)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Truncated(Initializer):
    """A normal distribution without its tails beyond `cut` of its deviations, widened so that what
    is left has `std`.
    """

    std: float = 0.02
    cut: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_zero("truncated", "std", self.std)
        if not self.cut > 0:
            raise InputError(f"truncated: cut is {self.cut}; allowed: above 0")

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        density = math.exp(-(self.cut**2) / 2) / math.sqrt(2 * math.pi)
        left = 1 - 2 * self.cut * density / math.erf(
            self.cut / math.sqrt(2)
        )  # variance of the standard normal when cut
        drawn = jax.random.truncated_normal(key, -self.cut, self.cut, shape)
        return (self.std / math.sqrt(left) * drawn).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Scaled(Initializer):
    """Mean 0 and a variance that follows from the shape.

    Attributes:
      distribution: one of `DISTRIBUTIONS`.
      gain: factor of the standard deviation.
    """

    distribution: str = "normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distribution not in DISTRIBUTIONS:
            raise unknown(f"{_name(type(self))}: distribution", self.distribution, DISTRIBUTIONS)
        _at_least_zero(_name(type(self)), "gain", self.gain)

    def variance(self, fan_in: int, fan_out: int) -> float:
        """The variance of one weight, without the gain."""
        raise NotImplementedError

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        _need_matrix(type(self), shape)
        std = self.gain * math.sqrt(self.variance(shape[-1], shape[-2]))
        if self.distribution == "uniform":
            return Uniform(math.sqrt(3) * std)(key, shape, dtype)
        return (Normal(std) if self.distribution == "normal" else Truncated(std))(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Xavier(_Scaled):
    """Variance `2 / (fan_in + fan_out)` (Glorot & Bengio, 2010)."""

    def variance(self, fan_in: int, fan_out: int) -> float:
        return 2 / (fan_in + fan_out)


@dataclasses.dataclass(frozen=True)
class He(_Scaled):
    """Variance `2 / fan_in`, for maps behind a ReLU (He et al., 2015)."""

    def variance(self, fan_in: int, fan_out: int) -> float:
        return 2 / fan_in


@dataclasses.dataclass(frozen=True)
class LeCun(_Scaled):
    """Variance `1 / fan_in` (LeCun et al., 1998)."""

    def variance(self, fan_in: int, fan_out: int) -> float:
        return 1 / fan_in


@dataclasses.dataclass(frozen=True)
class Orthogonal(Initializer):
    """`gain` times a matrix whose rows (columns, if they are fewer) are orthonormal, uniformly
    drawn (Saxe et al., 2014).
    """

    gain: float = 1.0

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        _need_matrix(type(self), shape)
        *lead, rows, columns = shape
        tall = jax.random.normal(key, (*lead, max(rows, columns), min(rows, columns)))
        q, r = jnp.linalg.qr(tall)
        signs = jnp.sign(
            jnp.diagonal(r, axis1=-2, axis2=-1)
        )  # else the draw would not be uniform (Mezzadri, 2007)
        q = q * signs[..., None, :]
        return (self.gain * (q if rows >= columns else jnp.swapaxes(q, -1, -2))).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Own(Initializer):
    """`scale` times what the model itself would start with; None in a rule is `own(1)`."""

    scale: float = 1.0

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        raise InputError("own: only `initialize` knows the model's own weights")


def initialize(model: Model, key: jax.Array, rules: tree.Rules) -> tree.Params:
    """New parameters of a model.

    Each layer's leaf draws from a key of its own, made of `key` and its path: layers of a segment
    are independent, and how they are stacked, how many there are or what other rules say changes
    nothing. Run it in `jax.jit` for big models: what is replaced is then never made.

    Args:
      model: its `init` is asked for the shapes, and for what the rules leave to it.
      key: the same key gives the same weights.
      rules: path of a layer's leaf -> an `Initializer`, its text (`"he"`, `"normal(0.02)"`,
        `"xavier('uniform')"`), any callable `(key, shape, dtype) -> array` that takes the shape of
        one layer, or None for the model's own.

    Returns:
      A tree as `model.init(key)` gives it.

    Raises:
      InputError: rules that do not fit the tree (see `tree.assign`), an unknown initialiser, one
        that needs a matrix where none is, or one that returns something else than what it was asked
        for.
    """
    own = model.init(key)
    chosen = {path: initializer(value) for path, value in tree.assign(rules, own).items()}

    def new(path: str, leaf: Any) -> Any:
        layers = tree.layer_paths(path)
        makers = [chosen[layer] for layer in layers]
        if all(maker is None for maker in makers):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"rules: the leaf {layers[0]!r} is {leaf.dtype}; allowed: None, which leaves it "
                f"to the model"
            )
        if not tree.is_stacked(path):
            return _draw(makers[0], key, path, leaf)
        if all(
            maker == makers[0] for maker in makers
        ):  # one program for all layers, not one for each
            words = jnp.asarray([_words(layer) for layer in layers], jnp.uint32)
            return jax.vmap(lambda w, one: _draw(makers[0], key, layers[0], one, w))(words, leaf)
        return jnp.stack(
            [
                _draw(maker, key, layer, leaf[i])
                for i, (maker, layer) in enumerate(zip(makers, layers, strict=True))
            ]
        )

    return tree.map_leaves(new, own)


def initializer(value: Any) -> Initializer | Callable[..., jax.Array] | None:
    """What a rule's value stands for; see `initialize`.

    Raises:
      InputError: an unknown name, arguments that it does not take, or a value of another kind.

    >>> initializer("truncated(0.02)")
    Truncated(std=0.02, cut=2.0)
    """
    if isinstance(value, str):
        return _parse(value)
    known = initializers()
    if value is None or (callable(value) and value not in known.values()):
        return value  # pyright: ignore[reportReturnType]
    names = ", ".join(sorted(known))
    raise InputError(
        f"rules: {value!r} is no initialiser; allowed: {names}, one that is made (`He()`), a "
        f"callable or None"
    )


def initializers() -> dict[str, type[Initializer]]:
    """Every initialiser by the name of its text form."""
    found: dict[str, type[Initializer]] = {}
    waiting = [Initializer]
    while waiting:
        waiting += (subclasses := waiting.pop().__subclasses__())
        found |= {_name(cls): cls for cls in subclasses if not cls.__name__.startswith("_")}
    return found


def _parse(text: str) -> Initializer:
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise InputError(
            f"initializer: {text!r} is not readable; write it as 'he' or 'normal(0.02)'"
        ) from None
    name = node.func if isinstance(node, ast.Call) else node
    known = initializers()
    if not isinstance(name, ast.Name) or name.id not in known:
        raise unknown("initializer", ast.unparse(name), known)
    try:
        args = [_literal(a) for a in node.args] if isinstance(node, ast.Call) else []
        kwargs = (
            {str(k.arg): _literal(k.value) for k in node.keywords}
            if isinstance(node, ast.Call)
            else {}
        )
        return known[name.id](*args, **kwargs)
    except InputError:
        raise
    except (TypeError, ValueError):
        fields = ", ".join(field.name for field in dataclasses.fields(known[name.id])) or "none"
        raise InputError(
            f"initializer: {text!r} cannot be made; the settings of {name.id} are: {fields}"
        ) from None


def _literal(node: ast.expr) -> Any:
    value = ast.literal_eval(node)
    return float(value) if isinstance(value, int) else value  # numbers are floats in every setting


def _draw(maker: Any, key: jax.Array, path: str, own: jax.Array, words: Any = None) -> jax.Array:
    """The leaf of one layer.

    Args:
      maker: an initialiser, or None.
      key: of the whole tree.
      path: of the layer, for messages.
      own: what the model starts with.
      words: of the layer's path, where it is not `path` (one trace serves all layers of a segment).
    """
    if maker is None:
        return own
    if isinstance(maker, Own):
        return (maker.scale * own).astype(own.dtype)
    high, low = _words(path) if words is None else words
    try:
        drawn = maker(jax.random.fold_in(jax.random.fold_in(key, high), low), own.shape, own.dtype)
    except InputError as error:
        raise InputError(f"rules: {path}: {error}") from None
    if drawn.shape != own.shape or drawn.dtype != own.dtype:
        raise InputError(
            f"rules: {path}: {maker!r} made {drawn.dtype}{list(drawn.shape)}; needed: "
            f"{own.dtype}{list(own.shape)}"
        )
    return drawn


def _words(path: str) -> tuple[int, int]:
    """64 bits of a path, as two numbers for `fold_in`."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def _name(cls: type[Initializer]) -> str:
    return cls.__name__.lower()


def _need_matrix(cls: type[Initializer], shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise InputError(
            f"{_name(cls)}: the shape {list(shape)} has no fan-in; allowed: a leaf of two axes or "
            f"more"
        )


def _at_least_zero(name: str, field: str, value: float) -> None:
    if not value >= 0:
        raise InputError(f"{name}: {field} is {value!r}; allowed: at least 0")
