"""Initial weights by rules: path -> initialiser.

A leaf whose rule has the value None starts as the model itself starts it. A leaf of one layer is
`[..., out, in]`: its last axis is the fan-in, the one before it the fan-out, and the axes in front
(experts) hold separate matrices. A convolution's kernel is `[out, in * places]`, so its fan-in
counts the positions of the kernel and its fan-out does not.

>>> from jaxmodel.models import gpt2
>>> model = gpt2.model(gpt2.SIZES["tiny"])
>>> rules = [("blocks/.*/(q|k|v)", "orthogonal"), ("embed", "normal(0.01)"), (".*", None)]
>>> params = jax.jit(lambda key: initialize(model, key, rules))(jax.random.key(0))
>>> q = params["blocks"]["0-2"]["attn"]["q"][1]
>>> bool(jnp.allclose(q @ q.T, jnp.eye(32), atol=1e-5))
True
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.models.model import Model
from jaxmodel.schema import FromZero, Positive
from jaxmodel.text_form import Member, members, name_of, read_one


@dataclasses.dataclass(frozen=True)
class Initializer(Member, kind="initializer", example="normal(0.02)"):
    """Base of the initialisers: `(key, shape, dtype) -> array`, for shapes `[..., out, in]`.

    They are called like those of `jax.nn.initializers`. To add one, write a subclass; its class
    name in snake case is its text form.
    """

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draw new weights for the leaf of one layer.

        Raises:
          InputError: the shape has no fan-in, and one is needed.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Initializer):
    """An initialiser that sets every weight to `value`.

    Attributes:
      value: the weights.
    """

    value: float

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Return an array of `value`."""
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Zeros(Initializer):
    """An initialiser that sets every weight to 0."""

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Return zeros."""
        return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Ones(Initializer):
    """An initialiser that sets every weight to 1."""

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Return ones."""
        return jnp.ones(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform(Initializer):
    """The uniform distribution `U[low, high)`.

    Attributes:
      high: the end of the range.
      low: its start; None for `-high`.
    """

    high: float = 0.01
    low: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (-self.high if self.low is None else self.low) < self.high:
            self.refuse("low", f"a low below the high, which is {self.high}")

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draw from the uniform distribution."""
        low = -self.high if self.low is None else self.low
        return jax.random.uniform(key, shape, jnp.float32, low, self.high).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Normal(Initializer):
    """The normal distribution `N(0, std^2)`.

    Attributes:
      std: the standard deviation.
    """

    std: FromZero = 0.02

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draw from the normal distribution."""
        return (self.std * jax.random.normal(key, shape)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Truncated(Initializer):
    """A normal distribution cut at `cut` deviations, widened so that its deviation is `std`.

    Attributes:
      std: the standard deviation after the cut.
      cut: standard deviations, before the cut, beyond which nothing is drawn.
    """

    std: FromZero = 0.02
    cut: Positive = 2.0

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draw from the truncated distribution."""
        density = math.exp(-(self.cut**2) / 2) / math.sqrt(2 * math.pi)
        # the variance of a standard normal distribution cut at `cut`
        left = 1 - 2 * self.cut * density / math.erf(self.cut / math.sqrt(2))
        drawn = jax.random.truncated_normal(key, -self.cut, self.cut, shape)
        return (self.std / math.sqrt(left) * drawn).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Scaled(Initializer):
    """A distribution of mean 0 whose variance follows from the shape.

    Attributes:
      distribution: the shape of the distribution.
      gain: factor of the standard deviation.
    """

    distribution: Literal["normal", "truncated", "uniform"] = "normal"
    gain: FromZero = 1.0

    def variance(self, fan_in: int, fan_out: int) -> float:
        """Return the variance of one weight, without the gain."""
        raise NotImplementedError

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draw from the distribution, with the variance that belongs to the shape."""
        _need_matrix(type(self), shape)
        std = self.gain * math.sqrt(self.variance(shape[-1], shape[-2]))
        if self.distribution == "uniform":
            return Uniform(math.sqrt(3) * std)(key, shape, dtype)
        return (Normal(std) if self.distribution == "normal" else Truncated(std))(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Xavier(_Scaled):
    """A distribution of variance `2 / (fan_in + fan_out)` (Glorot & Bengio, 2010)."""

    def variance(self, fan_in: int, fan_out: int) -> float:
        """Return `2 / (fan_in + fan_out)`."""
        return 2 / (fan_in + fan_out)


@dataclasses.dataclass(frozen=True)
class He(_Scaled):
    """A distribution of variance `2 / fan_in`, for layers followed by a ReLU (He et al., 2015)."""

    def variance(self, fan_in: int, fan_out: int) -> float:
        """Return `2 / fan_in`."""
        return 2 / fan_in


@dataclasses.dataclass(frozen=True)
class Lecun(_Scaled):
    """A distribution of variance `1 / fan_in` (LeCun et al., 1998)."""

    def variance(self, fan_in: int, fan_out: int) -> float:
        """Return `1 / fan_in`."""
        return 1 / fan_in


@dataclasses.dataclass(frozen=True)
class Orthogonal(Initializer):
    """`gain` times a random matrix with orthonormal rows (or columns, if they are fewer).

    The matrix is drawn uniformly (Saxe et al., 2014).

    Attributes:
      gain: the length of its rows, or columns.
    """

    gain: float = 1.0

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draw a matrix for each index of the leading axes."""
        _need_matrix(type(self), shape)
        *lead, rows, columns = shape
        tall = jax.random.normal(key, (*lead, max(rows, columns), min(rows, columns)))
        q, r = jnp.linalg.qr(tall)
        # without the signs the draw would not be uniform (Mezzadri, 2007)
        signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
        q = q * signs[..., None, :]
        return (self.gain * (q if rows >= columns else jnp.swapaxes(q, -1, -2))).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Own(Initializer):
    """`scale` times the model's own initial weights; None in a rule means `own(1)`.

    Attributes:
      scale: a factor.
      rms: their root mean square in each layer, in place of the model's; None for the model's.
    """

    scale: float = 1.0
    rms: float | None = None

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Raise an `InputError`: `initialize` handles this initialiser itself."""
        raise InputError("own: only `initialize` knows the model's own weights")


def initialize(model: Model, key: jax.Array, rules: tree.Rules) -> tree.Params:
    """Return new parameters of a model.

    The leaf of each layer is drawn from a key made of `key` and its path. So the layers of a
    segment are independent, and a leaf does not depend on how layers are stacked, how many there
    are or what other rules say. For big models call it in `jax.jit`: leaves that are replaced are
    then never made.

    Args:
      model: its `init` gives the shapes, and the leaves that the rules leave to it.
      key: the same key gives the same weights.
      rules: path of a layer's leaf -> an `Initializer`, its text (`"he"`, `"normal(0.02)"`,
        `"xavier('uniform')"`), any callable `(key, shape, dtype) -> array` that takes the shape of
        one layer, or None for the model's own.

    Returns:
      A tree of the same structure, shapes and dtypes as `model.init(key)`.

    Raises:
      InputError: rules that do not fit the tree (see `tree.assign`), an unknown initialiser, one
        that needs a matrix for a leaf that is none, or one that returns another shape or dtype.
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
                f"rules: the leaf {layers[0]!r} is {leaf.dtype}; allowed: None, for the model's "
                "own initial value"
            )
        if not tree.is_stacked(path):
            return _draw(makers[0], key, path, leaf)
        # one program for all layers, not one for each
        if all(maker == makers[0] for maker in makers):
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
    """Return the initialiser that the value of a rule stands for; see `initialize`.

    Raises:
      InputError: an unknown name, settings that the initialiser does not have, or a value of
        another kind.

    >>> initializer("truncated(0.02)")
    Truncated(std=0.02, cut=2.0)
    """
    if value is None or isinstance(value, str | Initializer):
        return read_one(Initializer, value)
    if callable(value) and not (isinstance(value, type) and issubclass(value, Initializer)):
        return value  # pyright: ignore[reportReturnType]
    names = ", ".join(sorted(members(Initializer)))
    raise InputError(
        f"rules: {value!r} is not an initialiser; allowed: {names}, an instance (`He()`), a "
        "callable or None"
    )


def _draw(maker: Any, key: jax.Array, path: str, own: jax.Array, words: Any = None) -> jax.Array:
    """Draw the leaf of one layer.

    Args:
      maker: an initialiser, or None.
      key: the key of the whole tree.
      path: the path of the layer, for messages.
      own: the model's own initial weights.
      words: the two numbers of the layer's path, if it is not `path` (one trace serves all layers
        of a segment).
    """
    if maker is None:
        return own
    if isinstance(maker, Own):
        size = jnp.sqrt(jnp.mean(jnp.square(own.astype(jnp.float32))))
        size = jnp.where(size == 0, jnp.ones_like(size), size)
        times = maker.scale if maker.rms is None else maker.scale * maker.rms / size
        return (times * own).astype(own.dtype)
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
    """Hash a path to 64 bits, as two numbers for `fold_in`."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def _need_matrix(cls: type[Initializer], shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise InputError(
            f"{name_of(cls)}: the shape {list(shape)} has no fan-in; allowed: a leaf of two axes "
            "or more"
        )
