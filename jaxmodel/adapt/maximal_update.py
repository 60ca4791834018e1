"""Maximal update parametrisation (muP): models of all widths share one learning rate.

Source: Yang et al., 2022, "Tensor Programs V". Each leaf is compared with that of a *base* model,
the narrow one whose learning rate is known. Let `m` be how many times wider the input of a leaf is
than in the base. Then, with Adam:

    leaf                                   initial weights      learning rate
    grows in both axes (a hidden matrix)   times m ** -0.5      times 1 / m
    grows in its input only (a readout)    times 1 / m          times 1 / m
    all others (tables, biases, norms)     as in the base       as in the base

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

from jaxmodel import tree
from jaxmodel.adapt.initializers import Constant, Own
from jaxmodel.axes import role_of
from jaxmodel.errors import InputError
from jaxmodel.models.checks import check_params
from jaxmodel.models.family import build_of
from jaxmodel.models.model import Inputs, Model

FAMILIES = {"bert": "head/norm", "gpt2": "norm", "llama": "norm", "vit": None}
"""The norm in front of a head that is tied to the embedding, by family.

Only families whose own initial weights have the same deviation at every width are listed: the
factors above multiply these.
"""

_GROWING = ("width", "mlp_width", "heads", "kv_heads")


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


def mup(model: Model, base: int | Any) -> Mup:
    """Return a model with rules for its first weights and learning rates that follow muP.

    The settings that are best for the base model are then best for this one. At the base's own
    width nothing changes. All rules are optional, so your own rules may stand in front of them
    (`[("head", "zeros"), *rules]`, which the paper recommends).

    Args:
      model: a model of one of `FAMILIES`, not wrapped.
      base: the config of the base model, or its width. A width means that the feed-forward width
        and the numbers of heads shrink in proportion and that heads keep their width.

    Raises:
      InputError: another family, a wrapped model, a base that differs in more than its widths, or
        heads of another width in a family whose config has no scale of the scores.
    """
    config = model.config
    family = model.family
    if family not in FAMILIES:
        raise InputError(
            f"model: a config of {type(config).__module__} given; allowed: {', '.join(FAMILIES)}"
        )
    build = build_of(model)
    if build is None:
        raise InputError(
            "model: a wrapped model given; allowed: a model as its family makes it (wrap the "
            "result instead)"
        )
    base = _narrower(config, base) if isinstance(base, int) else base
    if type(base) is not type(config):
        raise InputError(
            f"base: {type(base).__name__} given; allowed: a width, or a config of {family}"
        )
    wide = _scored(config, base)
    shapes, narrow = (
        {
            layer: tree.layer_shape(path, leaf)
            for path, leaf in leaves.items()
            for layer in tree.layer_paths(path)
        }
        for leaves in (_shapes(build(c, model.policy)) for c in (wide, base))
    )
    if unlike := sorted(shapes.keys() ^ narrow.keys()):
        raise InputError(
            f"base: it differs from the model in the leaf {unlike[0]!r}; allowed: another width "
            f"of the same model"
        )
    role = role_of(model.axes)  # a table is looked up, so only its output has a width
    factors = {
        path: _factors(path, shape, narrow[path], role(path, shape))
        for path, shape in shapes.items()
    }
    factors |= _tied(FAMILIES[family], factors, config, base)
    kinds: dict[str, dict[tuple[Any, float], list[str]]] = {}
    for path, pair in factors.items():
        kinds.setdefault(re.sub(r"(^|/)blocks/\d+/", r"\1blocks/N/", path), {}).setdefault(
            pair, []
        ).append(path)
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
    return Mup(build(wide, model.policy), (*init, (".*", None)), (*rates, (".*", 1.0)))


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
        found |= {f"blocks/{layer}": _size(x), f"blocks/{layer}/added": _size(x - before)}
    return {**found, "logits": _size(head(params, x, None, False))}


def _size(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(x.astype(jnp.float32)))


def _shapes(model: Model) -> dict[str, Any]:
    return tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))


def _narrower(config: Any, width: int) -> Any:
    """Return the config of a base of this width with heads of the same width."""
    sizes = {name: getattr(config, name) for name in _GROWING if hasattr(config, name)}
    if width < 1 or any(size * width % config.width for size in sizes.values()):
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"base: the width {width} given; allowed: a width that scales {told} to whole numbers, "
            "or a config"
        )
    return dataclasses.replace(
        config, **{name: size * width // config.width for name, size in sizes.items()}
    )


def _scored(config: Any, base: Any) -> Any:
    """Return the config with scores divided by the width of a head.

    Every other setting that is not a size is as in the base.
    """
    wide, narrow = (getattr(c, "head_width", c.width // c.heads) for c in (config, base))
    changed: dict[str, Any] = {}
    if hasattr(config, "embed_scale"):  # Gemma's grows with the width
        changed["embed_scale"] = base.embed_scale
    if hasattr(config, "query_scale"):
        own = narrow**-0.5 if base.query_scale is None else base.query_scale
        changed["query_scale"] = config.query_scale if wide == narrow else own * narrow / wide
    elif wide != narrow:
        raise InputError(
            f"base: heads of width {narrow} given, but the model's have {wide}; allowed: the same, "
            "because this family's config cannot scale attention scores"
        )
    return dataclasses.replace(config, **changed)


def _factors(
    path: str, shape: tuple[int, ...], narrow: tuple[int, ...], role: str
) -> tuple[Any, float]:
    """Return how a leaf starts (None: unchanged) and the factor of its learning rate."""
    if len(shape) != len(narrow):
        raise InputError(
            f"base: {path!r} has the shape {list(narrow)}, but the model's has {list(shape)}; "
            "allowed: the same number of axes"
        )
    if shape[-1:] == narrow[-1:] or role not in ("matrix", "head", "experts", "router"):
        return None, 1.0
    times = shape[-1] / narrow[-1]
    hidden = shape[-2] != narrow[-2]
    return Own(1 / math.sqrt(times) if hidden else 1 / times), 1 / times


def _tied(
    norm: str | None, factors: Mapping[str, Any], config: Any, base: Any
) -> dict[str, tuple[Any, float]]:
    """Return the first weights and the rate of the norm in front of a tied head.

    Both are those of the base times `1 / m`.
    """
    times = config.width / base.width
    if norm is None or "head" in factors or f"{norm}/weight" not in factors or times == 1:
        return {}
    offset = getattr(config, "norm_offset", 0.0)  # added to the weight: their sum is to be scaled
    own = Constant(1 / times - offset) if offset else Own(1 / times)
    return {
        path: (own if path.endswith("/weight") else None, 1 / times)
        for path in factors
        if path.startswith(f"{norm}/")
    }
