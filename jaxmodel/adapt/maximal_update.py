"""Maximal update parametrisation (muP): models of all widths share one learning rate.

Source: Yang et al., 2022, "Tensor Programs V", table 8. Each leaf is compared with that of a *base*
model, the narrow one whose learning rate is known. Let `m` be how many times wider the input of a
leaf is than in the base. Then, with Adam and its relatives:

    leaf                                   deviation at first    learning rate
    grows in both axes (a hidden matrix)   times m ** -0.5       times 1 / m
    grows in its input only (a readout)    times 1 / m           times 1 / m
    all others (tables, biases, norms)     as in the base        as in the base

How it is used, with a base of width 64 for which 3e-3 was found to be best:

    wide = mup(model, 64)  # or the config of the base, where it has more widths than one
    params = jax.jit(lambda key: initialize(wide.model, key, wide.init))(jax.random.key(0))
    optimizer = optax.chain(optim.optimizer("adamw", 3e-3), scale_by_path(wide.rates))
    state, history = train.fit(wide.model, stream, config, params=params, optimizer=optimizer)

and `coord_check` shows whether it holds for a model of your own. It is there for every family that
declares its axes, in the package or not: how much wider a leaf is follows from its shapes in both
models, what is looked up, a readout or an expert from its axes, and how a table or a vector is read
from a trace. A kernel's places count like inputs, and of a sparse matrix only what is there. The
family's own first weights are measured in the base, so they may depend on the width in any way.

Attention scores are divided by the width of a head instead of its square root. A head tied to the
embedding needs a factor 1 / m on the logits. Here the norm in front of it has that factor in its
initial weights and in its learning rate, which with Adam is the same function at every step. So the
config still describes the model, and a saved bundle needs no information about muP.

>>> from jaxmodel.models import gpt2
>>> from jaxmodel.adapt import initialize
>>> import dataclasses, optax
>>> config = dataclasses.replace(gpt2.SIZES["tiny"], width=128, heads=16)
>>> wide = mup(gpt2.model(config), 32)
>>> params = jax.jit(lambda key: initialize(wide.model, key, wide.init))(jax.random.key(0))
>>> optimizer = optax.chain(optax.adam(1e-3), scale_by_path(wide.rates))
>>> tree.assign(wide.rates, params)["blocks/0/mlp/up"]
0.25
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmodel import axes, tree
from jaxmodel.adapt.initializers import Constant, Own
from jaxmodel.errors import InputError
from jaxmodel.leaves import BlockSparse
from jaxmodel.models.checks import check_params
from jaxmodel.models.family import build_of
from jaxmodel.models.model import Inputs, Model
from jaxmodel.models.reads import Read, reads, scales

_GROWING = ("width", "mlp_width", "expert_width", "heads", "kv_heads", "growth")
"""The fields of a config that shrink with its width, where the base is given by its width."""

_SCALES = {
    "embed_scale": lambda c: c.width**0.5,
    "head_scale": lambda c: c.scale,
    "query_scale": lambda c: c.head_width**-0.5,
}
"""Factors in a config that go with the width where they are None, and what they are then."""


class Mup(NamedTuple):
    """The result of `mup`.

    Attributes:
      model: the model, with the scale of its attention scores set.
      init: rules for `initialize`.
      rates: rules, path -> factor of the learning rate, for `scale_by_path`.
    """

    model: Model
    init: tree.Rules
    rates: tree.Rules


class _Leaf(NamedTuple):
    """A leaf of one layer: the sizes of its axes, and of a product of letters the input's size."""

    shape: tuple[int, ...]
    inputs: float
    kind: Any  # its dtype, or the type of a compressed leaf


def mup(model: Model, base: int | Any) -> Mup:
    """Return a model with rules for its first weights and learning rates that follow muP.

    The settings that are best for the base model are then best for this one. At the base's own
    width nothing changes. All rules are optional, so your own rules may stand in front of them
    (`[("head", "zeros"), *rules]`, which the paper recommends).

    Args:
      model: a model of a family that declares its axes, not wrapped.
      base: the config of the base model, or its width. A width means that the feed-forward width
        and the numbers of heads shrink in proportion and that heads keep their width.

    Raises:
      InputError: a wrapped model, one of no family or without axes, a base that differs in more
        than its widths, heads of another width in a family whose config has no scale of the scores,
        or a tied head without a norm in front.
    """
    config = model.config
    build = build_of(model)
    if not model.family or any(text == "..." for _, text, *_ in model.axes.rules):
        raise InputError(
            f"model: {'one whose axes are not declared' if model.family else 'one of no family'} "
            f"given; allowed: a family that declares what its leaves' axes are (see models.family)"
        )
    if build is None:
        raise InputError(
            "model: a wrapped model given; allowed: a model as its family makes it (wrap the "
            "result instead)"
        )
    base = _narrower(config, base) if isinstance(base, int) else base
    if type(base) is not type(config):
        raise InputError(
            f"base: {type(base).__name__} given; allowed: a width, or a config of {model.family}"
        )
    small = build(base, model.policy)
    wide = build(_settled(model, small), model.policy)
    leaves, narrow = _leaves(wide), _leaves(small)
    if unlike := sorted(leaves.keys() ^ narrow.keys()):
        raise InputError(
            f"base: it differs from the model in the leaf {unlike[0]!r}; allowed: another width "
            f"of the same model"
        )
    if leaves == narrow:
        return Mup(wide, ((".*", None),), ((".*", 1.0),))
    role = axes.role_of(model.axes)
    found = reads(wide)
    first = _sizes_at_first(small)
    factors: dict[str, tuple[Any, float]] = {}
    for path, leaf in leaves.items():
        kind = role(path, leaf.shape)
        if kind == "vector" and path in found and "dot_general" in found[path].by:
            kind = "head"  # its products with activations are summed
        factors[path] = _factors(path, leaf, narrow[path], kind, first.get(path, 0.0))
    factors |= _tied(wide, leaves, narrow, found)
    return Mup(wide, *_rules(factors))


def scale_by_path(rules: tree.Rules) -> optax.GradientTransformation:
    """Multiply the updates of each leaf by a factor.

    Chain it behind an optimiser; it scales the optimiser's weight decay too.

    Args:
      rules: path -> factor of the learning rate; layers of a segment may differ.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factors = tree.assign(rules, updates)

        def scaled(path: str, leaf: jax.Array) -> jax.Array:
            of_layers = [factors[layer] for layer in tree.layer_paths(path)]
            if len(set(of_layers)) == 1:
                return leaf * jnp.asarray(of_layers[0], leaf.dtype)
            return leaf * jnp.asarray(of_layers, leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))

        return tree.map_leaves(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def coord_check(model: Model, params: tree.Params, inputs: Inputs) -> dict[str, jax.Array]:
    """Measure the mean size of the activations at each place, for a coordinate check.

    Plot them over widths: if a parametrisation is right, none grows or shrinks with the width after
    some training steps.

    Returns:
      Mean absolute values (scalars) of `embed`, `blocks/0`, ... (the output of each layer),
      `blocks/0/added`, ... (what the layer added) and `logits`.
    """
    check_params(model, params)
    embed, block, head = model.parts
    given = inputs if isinstance(inputs, Mapping) else {next(iter(model.inputs(1, 1))): inputs}
    x, context = embed(params, dict(given), None, None, False)
    context.pop("aux", None)
    found = {"embed": _size(x)}
    for layer, leaves in tree.unstack(params)["blocks"].items() if block is not None else ():
        assert block is not None
        before = x
        x, _, _ = block(leaves, x, context, None, int(layer), None, False)
        found[f"blocks/{layer}"] = _size(x)
        if x.shape == before.shape:
            found[f"blocks/{layer}/added"] = _size(x - before)
    return {**found, "logits": _size(head(params, x, None, False))}


def _size(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(x.astype(jnp.float32)))


def _rules(factors: Mapping[str, tuple[Any, float]]) -> tuple[tree.Rules, tree.Rules]:
    """Return the rules of the first weights and of the rates.

    Layers that agree have one rule.
    """
    kinds: dict[str, dict[tuple[Any, float], list[str]]] = {}
    for path, pair in factors.items():
        kinds.setdefault(_kind(path), {}).setdefault(pair, []).append(path)
    init: list[tuple[str, Any]] = []
    rates: list[tuple[str, Any]] = []
    for kind, pairs in kinds.items():
        for (start, rate), paths in pairs.items():
            pattern = (
                re.escape(kind).replace("/N/", r"/\d+/")
                if len(pairs) == 1
                else "|".join(map(re.escape, paths))
            )
            if start is not None:
                init.append((tree.optional(pattern), start))
            if rate != 1:
                rates.append((tree.optional(pattern), rate))
    return (*init, (".*", None)), (*rates, (".*", 1.0))


def _kind(path: str) -> str:
    """Return the path without the numbers of its layer."""
    return re.sub(r"(^|/)blocks/\d+/", r"\1blocks/N/", path)


def _leaves(model: Model) -> dict[str, _Leaf]:
    found = {}
    for path, leaf in tree.flatten(jax.eval_shape(model.init, jax.random.key(0))).items():
        for layer in tree.layer_paths(path):
            shape = tree.layer_shape(path, leaf)
            inputs = float(shape[-1]) if shape else 1.0
            if isinstance(leaf, BlockSparse):  # an output reads those of its blocks only
                inputs = leaf.values.size / math.prod(leaf.shape[:-1])
            found[layer] = _Leaf(shape, inputs, leaf.dtype if hasattr(leaf, "ndim") else type(leaf))
    return found


def _sizes_at_first(model: Model) -> dict[str, float]:
    """Measure the root mean square of each layer's own first weights.

    It is that of all layers together where they agree as far as so many numbers tell, and 0 for
    leaves of one value.
    """

    @jax.jit
    def measure(key: jax.Array) -> dict[str, jax.Array]:
        found = {}
        for path, a in tree.flatten(model.init(key)).items():
            if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating):
                within = tuple(range(tree.is_stacked(path), a.ndim))
                a = a.astype(jnp.float32)
                varies = jnp.ptp(a, axis=within) > 0
                found[path] = jnp.where(varies, jnp.mean(jnp.square(a), axis=within), 0)
        return found

    squares: dict[str, float] = {}
    for path, found in jax.device_get(measure(jax.random.key(0))).items():
        squares |= dict(zip(tree.layer_paths(path), map(float, found.reshape(-1)), strict=True))
    kinds: dict[str, list[str]] = {}
    for path in squares:
        kinds.setdefault(_kind(path), []).append(path)
    for paths in kinds.values():
        mean = sum(squares[path] for path in paths) / len(paths)
        if all(abs(squares[path] - mean) <= 0.3 * mean for path in paths):
            squares |= dict.fromkeys(paths, mean)
    return {path: float(f"{math.sqrt(value):.4g}") for path, value in squares.items()}


def _narrower(config: Any, width: int) -> Any:
    """Return the config of a base of this width with heads of the same width."""
    own = getattr(config, "width", None)
    if not own:
        raise InputError(
            f"base: {width} given; allowed: a config, as {type(config).__module__} has no `width` "
            f"from which its other sizes follow"
        )
    sizes = {name: getattr(config, name) for name in _GROWING if hasattr(config, name)}
    if width < 1 or any(size * width % own for size in sizes.values()):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
        raise InputError(
            f"base: the width {width} given; allowed: a width that scales {told} to whole numbers, "
            "or a config"
        )
    return dataclasses.replace(
        config, **{name: size * width // own for name, size in sizes.items()}
    )


def _settled(model: Model, small: Model) -> Any:
    """Return the config with scores divided by the width of a head.

    Every other setting that is not a size is as in the base.
    """
    config, base = model.config, small.config
    changed = {}
    for name, default in _SCALES.items():
        if hasattr(config, name):
            own = getattr(base, name)
            changed[name] = default(base) if own is None else own
    heads, narrow = _head_widths(model), _head_widths(small)
    both = heads.keys() & narrow.keys()
    unlike = next((name for name in sorted(both) if heads[name] != narrow[name]), None)
    if unlike is None:
        changed.pop("query_scale", None)
    elif "query_scale" in changed:
        changed["query_scale"] *= narrow[unlike] / heads[unlike]
    else:
        raise InputError(
            f"base: heads of width {narrow[unlike]} given, but the model's have {heads[unlike]}; "
            "allowed: the same, because this family's config cannot scale attention scores"
        )
    changed = {name: value for name, value in changed.items() if value != _value(config, name)}
    return dataclasses.replace(config, **changed) if changed else config


def _value(config: Any, name: str) -> Any:
    own = getattr(config, name)
    return _SCALES[name](config) if own is None else own


def _head_widths(model: Model) -> dict[str, int]:
    """Return the widths of heads by the name of their group.

    They are ordered units that share an output axis with unordered ones.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    inside = {
        letter
        for found in axes.assign(model.axes, params).values()
        for axis in found.axes[:-1]
        for product in axis
        if any(letter[0].isupper() for letter in product)
        for letter in product
        if letter[0].islower()
    }
    return {
        name: group.size
        for name, group in axes.groups(model.axes, params).items()
        if group.letter in inside
    }


def _factors(path: str, leaf: _Leaf, narrow: _Leaf, role: str, first: float) -> tuple[Any, float]:
    """Return how a leaf starts (None: as the model has it) and the factor of its learning rate."""
    shape, before = leaf.shape, narrow.shape
    if len(shape) != len(before):
        raise InputError(
            f"base: {path!r} has the shape {list(before)}, but the model's has {list(shape)}; "
            "allowed: the same number of axes"
        )
    if role == "measured" or (shape == before and leaf.inputs == narrow.inputs):
        return None, 1.0
    times = leaf.inputs / narrow.inputs
    if role in ("table", "vector") or times == 1:
        start, rate = 1.0, 1.0
    else:
        hidden = role in ("matrix", "experts") and shape[-2] != before[-2]
        start, rate = 1 / math.sqrt(times) if hidden else 1 / times, 1 / times
    return Own(rms=float(f"{start * first:.4g}")) if first else None, rate


def _tied(
    wide: Model,
    leaves: Mapping[str, _Leaf],
    narrow: Mapping[str, _Leaf],
    found: Mapping[str, Read],
) -> dict[str, tuple[Any, float]]:
    """Return the first weights and the rate of the norm in front of a head that is a table.

    Both are those of the base times `1 / m`. It is what the table meets last: a weight that
    multiplies, and perhaps a bias behind it.
    """
    role = axes.role_of(wide.axes)
    out: dict[str, tuple[Any, float]] = {}
    for table, read in found.items():
        if role(table, leaves[table].shape) != "table" or "dot_general" not in read.by:
            continue
        times = leaves[table].inputs / narrow[table].inputs
        norm = scales(found, table)
        if not norm or any(role(path, leaves[path].shape) != "vector" for path in norm):
            raise InputError(
                f"model: its head is the table {table!r} without a norm in front; allowed: a head "
                f"of its own, or a norm, which muP's factor of the logits goes into"
            )
        for path in norm:
            # what is added to the weight has to be scaled with it
            offset = getattr(wide.config, "norm_offset", 0.0) if path == norm[-1] else 0.0
            start = Constant(offset / times - offset) if offset else Own(1 / times)
            out[path] = start, 1 / times
    return out
