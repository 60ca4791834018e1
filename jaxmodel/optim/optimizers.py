"""Optimisers by name, from optax, and Adam with 8-bit moments.

`optimizer(name, rate)` is an optax transformation like any other, to be chained with others. To add
one, write a line in `optimizer`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxmodel import tree
from jaxmodel.axes import Roles, guessed
from jaxmodel.errors import at_least, one_of
from jaxmodel.leaves import Compressed, QTensor
from jaxmodel.optim.quantized import by_layer, flat
from jaxmodel.optim.rounding import curved, group_of, straight

SMALLEST = 4096
"""Leaves with fewer elements keep float32 moments.

These are norms and biases, which take little memory and are sensitive to rounding.
"""

NAMES = ("adamw", "adamw8", "sgd", "lion", "adafactor", "muon")
"""The names that `optimizer` knows."""

type Rate = float | optax.Schedule
type Mask = Callable[[Any], Any]


def optimizer(
    name: str,
    rate: Rate,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    roles: Roles = guessed,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Make an optimiser by name, with decoupled weight decay `w <- w - rate (u + weight_decay w)`.

    - "adamw" (Loshchilov & Hutter, 2019); "adamw8" is the same with 8-bit moments;
    - "sgd" with momentum b1, without dampening (b1 = 0 for no momentum);
    - "lion" (Chen et al., 2023): use a third to a tenth of Adam's rate, and as much more decay;
    - "adafactor" (Shazeer & Stern, 2018): second moments by rows and columns, steps relative to the
      size of the weights;
    - "muon" (Jordan et al., 2024): each layer's momentum matrix (0.95) is made orthogonal and
      scaled to the size of Adam's steps (Liu et al., 2025); tables, heads and leaves that are no
      matrices use AdamW, as in the authors' code.

    Args:
      name: one of these names.
      rate: the learning rate, or a schedule of it.
      b1: the decay of the mean of gradients.
      b2: the decay of the mean of squared gradients; for lion, of its momentum.
      eps: added to the root of the second moment.
      weight_decay: the factor of the weight decay.
      mask: tree -> tree of bool, which leaves decay; None for matrices, tables and heads.
      roles: the role of each leaf, `axes.role_of(model.axes)`; by default guessed from its name
        and shape.
      seed: the seed of the rounding of "adamw8".

    Raises:
      InputError: the name is unknown.

    >>> params = {"w": jnp.array([[1.0, -2.0]]), "bias": jnp.ones(1)}
    >>> sgd = optimizer("sgd", 0.1, weight_decay=0.5)
    >>> grads = {"w": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(1)}
    >>> updates, _ = sgd.update(grads, sgd.init(params), params)
    >>> updates["w"].tolist(), updates["bias"].tolist()  # -0.1 (g + 0.5 w); a bias does not decay
    ([[-0.15000000596046448, 0.10000000149011612]], [-0.0])
    """
    one_of("optimizer", name, NAMES)
    directions = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
        "adamw8": lambda: scale_by_adam8(b1, b2, eps, seed=seed),
        "sgd": lambda: optax.trace(b1) if b1 else optax.identity(),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        "adafactor": lambda: each_layer(
            optax.chain(optax.adafactor(None), optax.scale(-1.0)), roles
        ),
        "muon": lambda: _muon(b1, b2, eps, roles),
    }
    mask = functools.partial(decaying, roles) if mask is None else mask
    decay = (decayed(weight_decay, mask),) if weight_decay else ()
    return optax.chain(directions[name](), *decay, optax.scale_by_learning_rate(rate))


def decaying(roles: Roles, params: Any) -> Any:
    """Return which leaves decay by default: matrices, tables and heads.

    It does not depend on how layers are stacked.

    >>> leaves = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3), "cls": jnp.ones((1, 1, 3))}
    >>> decaying(guessed, {"Dense_0": leaves})
    {'Dense_0': {'bias': False, 'cls': False, 'kernel': True}}
    >>> decaying(guessed, {"blocks": {"0-1": {"attn_norm": {"weight": jnp.ones((2, 3))}}}})
    {'blocks': {'0-1': {'attn_norm': {'weight': False}}}}
    """

    def one(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        role = roles(tree.layer_paths(name)[0], tree.layer_shape(name, leaf))
        return role not in ("vector", "measured")

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda node: isinstance(node, Compressed)
    )


def each_layer(
    direction: optax.GradientTransformation, roles: Roles = guessed
) -> optax.GradientTransformation:
    """Apply a transformation that looks at whole leaves to each layer, and each expert, separately.

    How layers are stacked is a matter of storage: a leaf `[layers, out, in]` is several matrices.
    Adam, momentum, signs and the global norm do not depend on it. Transformations that look at a
    leaf as a whole (Adafactor, LAMB, LARS, clipping by blocks) are correct only with this wrapper.

    Args:
      direction: the transformation, without extra arguments.
      roles: see `optimizer`; they tell which leaves have a matrix for each expert.

    >>> params = {"blocks": {"0-1": {"up": jnp.array([[[3.0, 4.0]], [[0.0, 1.0]]])}}}
    >>> unit = each_layer(optax.scale_by_trust_ratio())  # as in LARS: |w| / |u|
    >>> grads = {"blocks": {"0-1": {"up": jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]])}}}
    >>> unit.update(grads, unit.init(params), params)[0]["blocks"]["0-1"]["up"].tolist()
    [[[5.0, 0.0]], [[1.0, 0.0]]]
    """

    def apart(function: Callable[..., Any], path: str, leaf: Any) -> Callable[..., Any]:
        shape = tree.layer_shape(path, leaf)
        experts = roles(tree.layer_paths(path)[0], shape) == "experts"
        for _ in range(tree.is_stacked(path) + experts):
            function = jax.vmap(function)
        return function

    def init(params: Any) -> Any:
        paths, leaves, places = flat(params)
        return places.unflatten(
            [
                apart(direction.init, path, leaf)(leaf)
                for path, leaf in zip(paths, leaves, strict=True)
            ]
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        paths, leaves, places = flat(updates)
        beside = [
            places.flatten_up_to(other) for other in (state, updates if params is None else params)
        ]
        found = [
            apart(direction.update, path, u)(u, *rest)
            for path, u, *rest in zip(paths, leaves, *beside, strict=True)
        ]
        return tuple(places.unflatten([each[i] for each in found]) for i in range(2))  # pyright: ignore[reportReturnType]

    return optax.GradientTransformation(init, update)


# ----------------------------------------------------------------------------------- Adam in 8 bits


class Adam8State(NamedTuple):
    """The state of `scale_by_adam8`; a moment is a `QTensor`, or an array for a small leaf."""

    count: Any
    mu: Any
    nu: Any


def scale_by_adam8(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    group: int | None = None,
    smallest: int = SMALLEST,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Scale updates by Adam (Kingma & Ba, 2015) with 8-bit moments (Dettmers et al., 2022).

    There is a scale for each block of a moment.

    `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, `u = m' / (sqrt(v') + eps)`, with moments
    corrected for their start at zero. m is stored by its square root and v by its fourth root, so
    that small values are distinguished from zero. Both are stochastically rounded with an exact
    mean, because v moves by `1 - b2` of itself in a step, less than any 8-bit grid resolves. No
    update is larger than the gradients could have made it without rounding, by the Cauchy-Schwarz
    inequality.

    Args:
      b1: the decay of the first moment.
      b2: the decay of the second moment.
      eps: added to the root of the second moment.
      group: the length of a block along the last axis; None for the longest of 128, 64 and 32 that
        divides it.
      smallest: leaves with fewer elements per layer have float32 moments, as have vectors, and
        leaves whose last axis no block divides.
      seed: the seed of the rounding.

    >>> params = {"w": jnp.ones((64, 128)), "bias": jnp.ones(64)}
    >>> state = scale_by_adam8().init(params)
    >>> state.mu["w"].bits_per_weight, state.mu["bias"].dtype  # 8 bits of codes, 32 / 128 of scales
    (8.25, dtype('float32'))
    """
    groups = (group,) if group is not None else ()
    at_least("group", 1 if group is None else group)
    limit = _largest_update(b1, b2)

    def block(path: str, leaf: Any) -> int | None:
        shape = tree.layer_shape(path, leaf)
        if len(shape) < 2 or math.prod(shape) < smallest:
            return None
        return group_of(leaf.shape[-1], groups) if groups else group_of(leaf.shape[-1])

    def zeros(path: str, leaf: Any, second: bool) -> Any:
        size = block(path, leaf)
        if size is None:
            return jnp.zeros(leaf.shape, jnp.float32)
        scale = jnp.zeros((*leaf.shape[:-1], leaf.shape[-1] // size), jnp.float32)
        codes = jnp.zeros(leaf.shape, jnp.uint8 if second else jnp.int8)
        return QTensor(codes, scale, scale + 0 if second else None)

    def init(params: Any) -> Adam8State:
        paths, leaves, places = flat(params)
        moments = [
            [zeros(*one, second) for one in zip(paths, leaves, strict=True)]
            for second in (False, True)
        ]
        return Adam8State(jnp.zeros((), jnp.int32), *map(places.unflatten, moments))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Adam8State]:
        count = state.count + jnp.int32(1)
        t = count.astype(jnp.float32)
        first = 1 - jnp.float32(b1) ** t
        second = 1 - jnp.float32(b2) ** t
        key = jax.random.fold_in(jax.random.key(seed), count)

        def wide(g: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
            g = g.astype(jnp.float32)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            return m, v, (m / first) / (jnp.sqrt(v / second) + eps)

        def narrow(
            g: Array, mu: QTensor, nu: QTensor, key: Array
        ) -> tuple[Array, QTensor, QTensor]:
            m, v, u = wide(g, straight(mu, 2), straight(nu, 4))
            size = g.shape[-1] // mu.groups
            keys = [jax.random.fold_in(key, i) for i in (0, 1)]
            u = jnp.clip(u, -limit, limit).astype(g.dtype)
            return u, curved(m, size, 2, True, keys[0]), curved(v, size, 4, False, keys[1])

        found = []
        paths, leaves, places = flat(updates)
        moments = zip(
            paths,
            leaves,
            places.flatten_up_to(state.mu),
            places.flatten_up_to(state.nu),
            strict=True,
        )
        for path, g, mu, nu in moments:
            if isinstance(mu, QTensor):
                found.append(by_layer(path, narrow, key, (g, mu, nu)))
            else:
                m, v, u = wide(g, mu, nu)
                found.append((u.astype(g.dtype), m, v))
        new, mu, nu = (places.unflatten([each[i] for each in found]) for i in range(3))
        return new, Adam8State(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _largest_update(b1: float, b2: float) -> float:
    """Return the largest |m| / sqrt(v) that any gradients lead to.

    It is `(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))`, and at least 1.
    """
    if not b1 * b1 < b2 < 1:
        return math.inf
    return max(1.0, (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2)))


# ------------------------------------------------------------------------------------------ by name


def decayed(weight_decay: float, mask: Mask | None = None) -> optax.GradientTransformation:
    """Add weight decay: `u + weight_decay w`, in the dtype of u.

    `optax.add_decayed_weights` would turn bfloat16 updates into float32.
    """

    def init(params: Any) -> Any:
        if mask is not None:
            mask(params)  # refuse rules that do not fit now, not at the first update
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        chosen = jax.tree.map(lambda _: True, updates) if mask is None else mask(params)
        add = lambda u, w, yes: (
            (u.astype(jnp.float32) + weight_decay * w.astype(jnp.float32)).astype(u.dtype)
            if yes
            else u
        )
        return jax.tree.map(add, updates, params, chosen), state

    return optax.GradientTransformation(init, update)


def _muon(b1: float, b2: float, eps: float, roles: Roles) -> optax.GradientTransformation:
    matrices = functools.partial(_matrices, roles)
    settings: dict[str, Any] = {"adam_b1": b1, "adam_b2": b2, "eps": eps, "consistent_rms": 0.2}
    steps = optax.contrib.muon(1.0, muon_weight_dimension_numbers=matrices, **settings)
    return optax.chain(steps, optax.scale(-1.0))


def _matrices(roles: Roles, params: Any) -> Any:
    """Return the axes of a layer's matrix `[out, in]` for each leaf, None if it uses Adam."""

    def axes(path: str, leaf: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # the leaf uses Adam
            return leaf
        shape = tree.layer_shape(path, leaf)
        role = roles(tree.layer_paths(path)[0], shape)
        if role != "experts" and (role != "matrix" or len(shape) != 2):
            return None
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=leaf.ndim - 1, output_axis=leaf.ndim - 2
        )

    return tree.map_leaves(axes, params)
