"""`Model`: a frozen record of pure functions, and `Output`, what a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxmodel import axes, layers, ops, tree
from jaxmodel.errors import InputError, at_least
from jaxmodel.leaves.leaf import register
from jaxmodel.models.checks import check_inputs, runs_on
from jaxmodel.models.parts import Inputs, Parts
from jaxmodel.ops.norms import BatchStatsProbe
from jaxmodel.rng import fold


@register
class Output:
    """The result of `apply`, a pytree.

    Attributes:
      logits: `[B, T, V]` (or `[B, C]`), float32.
      hidden: `[B, T, D]`, the input of the head.
      cache: the cache after these tokens, or None.
      aux: named scalars, summed over the layers (a load-balancing loss).
    """

    logits: Any = None
    hidden: Any = None
    cache: Any = None
    aux: Any = dataclasses.field(default_factory=dict)


@runtime_checkable
class Apply(Protocol):
    """The type of `Model.apply` and `Model.hidden`."""

    def __call__(
        self,
        params: tree.Params,
        inputs: Inputs,
        cache: Any = None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> Output:
        """Run the model; see `Model`."""
        ...


def _no_family(policy: ops.Policy) -> Model:
    raise InputError(
        "policy: this model was made by hand; allowed: a model of a family (see models.family), "
        "or one with with_policy"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model is its config and pure functions over a parameter tree.

    `apply` and `hidden` are composed of `parts` and cannot be replaced alone: changing a part also
    changes what the losses, the prefill and the evaluation run (see `wrap`).

    Attributes:
      config: the family's frozen `Config`.
      policy: how it computes.
      init: key -> params.
      parts: see `Parts`.
      inputs: (batch, length) -> the shapes and dtypes of the inputs that `apply` requires, by name.
        `length` is the number of tokens in a row; models of images and features ignore it, since
        their config fixes the sizes.
      init_cache: (batch, capacity) -> cache; None for a model that does not decode.
      axes: the axes of the leaves. Rules path -> PartitionSpec, which only place the leaves, are
        accepted too.
      with_policy: policy -> the same model with that policy; `models.family` provides it.
      family: the name of its family in `models.families()`; "" for none.
      apply: (params, inputs, cache=None, rng=None, train=False) -> Output. Inputs are a dict of
        `tokens` `[B, T]` and, if wanted, `positions`, `segments` (packed documents, 0 for padding)
        and `mask` (true for tokens; padding stands on the right). An array alone is taken as the
        one input that the model needs. `counts`, bool `[B]`, names the rows that do not only fill
        the batch up, for batch norms in training.
      hidden: `apply` without the head: `logits` is None. For a prefill, features, and losses that
        chunk the vocabulary.
    """

    config: Any
    policy: ops.Policy
    init: Callable[[jax.Array], tree.Params] = dataclasses.field(repr=False)
    parts: Parts = dataclasses.field(repr=False)
    inputs: Callable[[int, int], dict[str, jax.ShapeDtypeStruct]] = dataclasses.field(repr=False)
    init_cache: Callable[[int, int], Any] | None = dataclasses.field(repr=False)
    axes: axes.Axes = dataclasses.field(repr=False)
    with_policy: Callable[[ops.Policy], Model] = dataclasses.field(default=_no_family, repr=False)
    family: str = ""
    apply: Apply = dataclasses.field(init=False, repr=False)
    hidden: Apply = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        given: Any = self.axes
        if not isinstance(given, axes.Axes):
            object.__setattr__(
                self, "axes", axes.Axes(tuple((pattern, "...", spec) for pattern, spec in given))
            )
        parts = self.parts
        policy = self.policy
        names = tuple(self.inputs(1, 1))

        def hidden(
            params: tree.Params,
            inputs: Inputs,
            cache: Any = None,
            rng: Any = None,
            train: bool = False,
        ) -> Output:
            with runs_on(self, params):
                given = unpadded(by_name(inputs, names))
                check_inputs(given, cache, getattr(self.config, "vocab", None))
                return _hidden(
                    parts,
                    policy,
                    *_counted(self.axes, params, given),
                    cache,
                    rng,
                    train,
                )

        def apply(
            params: tree.Params,
            inputs: Inputs,
            cache: Any = None,
            rng: Any = None,
            train: bool = False,
        ) -> Output:
            with runs_on(self, params, layers=False):  # `hidden` checks the layers
                params, inputs = _counted(self.axes, params, by_name(inputs, names))
                out = self.hidden(params, inputs, cache, rng, train)
                return dataclasses.replace(
                    out, logits=parts.head(params, out.hidden, _key(rng, "head"), train)
                )  # pyright: ignore

        object.__setattr__(self, "hidden", hidden)
        object.__setattr__(self, "apply", apply)

    @property
    def rules(self) -> tree.Rules:
        """Path -> PartitionSpec of the axes of one layer, derived from `axes`."""
        return axes.specs(self.axes)

    @property
    def continues(self) -> bool:
        """True for a decoder without an encoder: it continues a text, its only input `tokens`."""
        return self.init_cache is not None and list(self.inputs(1, 1)) == ["tokens"]


def wrap(model: Model, change: Callable[[Parts], Parts]) -> Model:
    """Return the model with other parts, which it keeps under another policy too.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> cooler = wrap(model, lambda parts: parts._replace(head=lambda *args: parts.head(*args) / 2))
    >>> params, tokens = jax.jit(model.init)(jax.random.key(0)), jnp.zeros((1, 4), jnp.int32)
    >>> halved = jax.jit(model.apply)(params, tokens).logits / 2
    >>> bool(jnp.allclose(jax.jit(cooler.apply)(params, tokens).logits, halved))
    True
    """
    return dataclasses.replace(
        model,
        parts=change(model.parts),
        with_policy=lambda policy: wrap(model.with_policy(policy), change),
    )


def with_hidden(model: Model, hidden: Apply) -> Model:
    """Return the model with another function `hidden`.

    A pipeline uses it, where the layers do not run at the place where the loss is computed.
    """
    changed = dataclasses.replace(model)
    object.__setattr__(changed, "hidden", hidden)
    return changed


def begin(
    model: Model, params: tree.Params, inputs: Inputs, rng: Any = None, train: bool = False
) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array]]:
    """Run what `hidden` does before the layers, without a cache.

    Returns:
      The activations, the context, and the aux values.
    """
    given = unpadded(by_name(inputs, tuple(model.inputs(1, 1))))
    x, context = model.parts.embed(params, given, None, _key(rng, "embed"), train)
    return x, context, context.pop("aux", {})


def check_sizes(config: Any, names: Iterable[str]) -> None:
    """Raise InputError if one of these sizes of a config is not a positive integer."""
    for name in names:
        at_least(name, getattr(config, name))


def read(inputs: Mapping[str, jax.Array], name: str, axes: str = "") -> jax.Array:
    """Return one of a model's inputs.

    Args:
      inputs: the inputs by name.
      name: the name of the input.
      axes: its expected axes, one letter each; "" for any.

    Raises:
      InputError: the input is missing, or has another number of axes.
    """
    if name not in inputs:
        raise InputError(f"inputs: {', '.join(inputs) or 'none'} given; {name!r} is needed")
    if axes and inputs[name].ndim != len(axes):
        raise InputError(
            f"{name}: the shape {list(inputs[name].shape)} given; allowed: [{', '.join(axes)}]"
        )
    return inputs[name]


_PADDED = {"tokens": "mask", "positions": "mask", "types": "mask", "source": "source_mask"}
"""The inputs of token ids and positions, and the mask of each."""


def _key(rng: Any, name: str) -> Any:
    return None if rng is None else fold(rng, name)  # layer i folds in i


def by_name(inputs: Inputs, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Return inputs as a dict; an array alone is the one input that a model needs.

    Raises:
      InputError: the model needs several.
    """
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if len(names) != 1:
        raise InputError(f"inputs: an array given; allowed: a dict of {', '.join(names)}")
    return {names[0]: inputs}


def unpadded(
    inputs: dict[str, jax.Array], names: Mapping[str, str] = _PADDED
) -> dict[str, jax.Array]:
    """Set the inputs to zero where a mask marks padding.

    An id in the padding may be outside of a table, whose row is then NaN; and since a weight of
    zero times NaN is NaN, no attention mask would keep it from the tokens.

    >>> tokens, mask = jnp.array([[7, -1]]), jnp.array([[True, False]])
    >>> unpadded({"tokens": tokens, "mask": mask})["tokens"].tolist()
    [[7, 0]]
    """
    padded = {
        name: jnp.where(
            inputs[mask].astype(jnp.bool_), inputs[name], jnp.zeros((), inputs[name].dtype)
        )
        for name, mask in names.items()
        if name in inputs and mask in inputs and jnp.shape(inputs[name]) == jnp.shape(inputs[mask])
    }
    return {**inputs, **padded}


COUNTS = "counts"
"""The input that marks the rows that count; the others only fill up the batch."""


def _counted(
    of: axes.Axes, params: tree.Params, inputs: dict[str, jax.Array]
) -> tuple[tree.Params, dict[str, jax.Array]]:
    """Tell the batch norms which rows count.

    The norms are in parts of a model that no input reaches, so the rows replace the means that the
    axes declare as statistics.
    """
    if (counts := inputs.pop(COUNTS, None)) is None:
        return params, inputs
    if isinstance(params.get("state"), dict):  # a foreign module, which reads it as an input
        inputs[COUNTS] = counts
        return params, inputs
    trains = axes.trainable(of)

    def told(path: str, leaf: Any) -> Any:
        if not path.endswith("/mean") or trains(tree.layer_paths(path)[0]):
            return leaf
        measured = leaf if isinstance(leaf, BatchStatsProbe) else BatchStatsProbe(leaf, own=False)
        return dataclasses.replace(
            measured, counts=jnp.broadcast_to(counts, (*leaf.shape[:-1], *counts.shape))
        )

    return tree.map_leaves(told, params), inputs


def _hidden(
    parts: Parts,
    policy: ops.Policy,
    params: tree.Params,
    inputs: dict[str, Any],
    cache: Any,
    rng: Any,
    train: bool,
) -> Output:
    x, context = parts.embed(params, inputs, cache, _key(rng, "embed"), train)
    cache = context.pop("cache", cache)
    aux = context.pop("aux", {})
    if parts.block is not None:
        how = policy.remat, policy.microbatches, policy.unroll
        x, cache, more = layers.repeat(
            parts.block, params["blocks"], x, context, cache, rng, train, *how
        )
        aux = {**aux, **more}
    if cache is not None:
        x = cache.checked(x)
        mask = inputs.get("mask")
        cache = cache.advance(
            x.shape[1] if mask is None else jnp.sum(mask, axis=1, dtype=jnp.int32)
        )
    return Output(hidden=x, cache=cache, aux=aux)


def token_inputs(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the inputs of a model of one text: `tokens` `[B, T]`."""
    return {"tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32)}


def positions_of(inputs: Mapping[str, jax.Array], places: jax.Array | None = None) -> jax.Array:
    """Return the positions `[B, T]` of the tokens.

    They are the given ones, else `places`, else 0, 1, 2, ... Padding has position 0, so that it may
    extend beyond the context.
    """
    if "positions" in inputs:
        return inputs["positions"]
    tokens = inputs["tokens"]
    if places is None:
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return unpadded({**inputs, "positions": places})["positions"]


def encoder_sees(inputs: Mapping[str, jax.Array], head: str) -> ops.AttentionMask:
    """Return what the tokens of an encoder see: all tokens of their text.

    Args:
      inputs: the inputs by name.
      head: the head of the model; only "mlm", which has a result for each token, takes packed
        texts.

    Raises:
      InputError: segments are given to another head.
    """
    segments = inputs.get("segments")
    if segments is not None and head != "mlm":
        raise InputError(
            f"segments: given to the head {head!r}, for which each row is one text; leave them out"
        )
    pair = None if segments is None else (segments, segments)
    return ops.AttentionMask(segments=pair, valid=inputs.get("mask"), causal=False)


def decoder_context(
    inputs: Mapping[str, jax.Array], cache: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Return the positions `[B, T]` and the context of a causal decoder.

    The context says what each token sees, if there is no cache to say it.

    Raises:
      InputError: segments are given with a cache, in which a row is one document.
    """
    segments = inputs.get("segments")
    if cache is not None:
        if segments is not None:
            raise InputError(
                "segments: given with a cache; a row of a cache is one document, so leave them out"
            )
        return positions_of(inputs, cache.positions(inputs["tokens"].shape[1])), {}
    positions = positions_of(inputs)
    seen = ops.AttentionMask(
        segments=None if segments is None else (segments, segments), valid=inputs.get("mask")
    )
    return positions, {"seen": seen}
