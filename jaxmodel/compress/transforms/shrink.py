"""Removal of units: smaller leaves, and a model of that shape."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxmodel import axes, tree
from jaxmodel.axes import Group, groups
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.prune.units import choose_units, reads, score_units, unit_groups
from jaxmodel.compress.stats import places, stats_of
from jaxmodel.compress.transforms.moves import one_reader, survey
from jaxmodel.compress.transforms.rotate import streams, turn_stream
from jaxmodel.compress.transforms.transform import Transform
from jaxmodel.errors import InputError
from jaxmodel.models import Model
from jaxmodel.models.family import build_of
from jaxmodel.models.untie import untied
from jaxmodel.schema import Count, Range

type Kept = Annotated[float, Range(0, 1, above=0)]


@dataclasses.dataclass(frozen=True)
class Shrink(Transform):
    """Remove the units that matter least, from all leaves that have them.

    A unit is one of a set that the model's axes name (`axes.groups`): a hidden unit of a
    feed-forward part, a head of keys and values with its queries, an expert, a channel. What is
    left computes what the whole computes when the leaves of the removed units are zero; if all
    layers keep equally many and the family has such a size, the config says so, and else the
    bundle's folder names the layers.

    The score of a unit is the sum over its leaves of the squares of its weights, in each leaf
    relative to their mean over the units (DepGraph: Fang et al., 2023); or of what its weights
    make of its measured inputs (`|x|^2 |w|^2`, Wanda's measure for whole units).

    Attributes:
      keep: the share of the units that stay.
      units: the letter of the units: F hidden units, K heads of keys and values, H heads of a
        reader, E experts, C channels.
      score: "magnitude" of the weights, or "activity", by statistics.
      scope: "set" keeps the same share in each layer; "model" compares the scores of all layers
        whose units are alike.
      multiple: the number that stays is a multiple of it.
    """

    keep: Kept = 0.5
    units: Literal["F", "K", "H", "E", "C"] = "F"
    score: Literal["magnitude", "activity"] = "magnitude"
    scope: Literal["set", "model"] = "set"
    multiple: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "activity":
            object.__setattr__(self, "needs", ("square",))

    def inputs(self, model: Model, params: tree.Params) -> frozenset[str]:
        """Return the leaves that read the units, if their activity is the score."""
        if self.score != "activity":
            return frozenset()
        known = axes.assign(model.axes, params)
        return frozenset(
            member.path
            for group in self._groups(model, params).values()
            for member in group.members
            if reads(known, member)
        )

    def change(
        self, model: Model, params: tree.Params, stats: Stats, key: jax.Array
    ) -> tuple[Model, tree.Params]:
        """Return the smaller model and its parameters."""
        self._groups(model, params)
        scores = score_units(model.axes, params, self.units, self.score, stats)
        units = choose_units(
            scores,
            1 - self.keep,
            self.scope == "model",
            multiple=self.multiple,
            least=getattr(model.config, "experts_per_token", 1) if self.units == "E" else 1,
        )
        smaller = axes.select(model.axes, params, units)
        return of_that_shape(model, smaller), smaller

    def _groups(self, model: Model, params: tree.Params) -> dict[str, Group]:
        try:
            return unit_groups(model.axes, params, self.units)
        except InputError as error:
            raise InputError(f"shrink: {error}") from None


@dataclasses.dataclass(frozen=True)
class Slice(Transform):
    """Make the residual stream narrower: rotate it into its principal axes, and keep the first.

    The axes are those of the second moments of what all parts read, measured behind their norms
    (SliceGPT: Ashkboos et al., 2024, with one rotation for the whole stream). A tied head gets a
    leaf of its own. Norms must not subtract the mean.

    Attributes:
      keep: the share of the stream's units that stay.
      multiple: the number that stays is a multiple of it.
    """

    keep: Kept = 0.75
    multiple: Count = 1

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def inputs(self, model: Model, params: tree.Params) -> frozenset[str]:
        """Return one reader of each norm of a stream."""
        known = survey(model.axes, params)
        return frozenset(one_reader(known, feed) for feed in known.feeds if feed.norm)

    def change(
        self, model: Model, params: tree.Params, stats: Stats, key: jax.Array
    ) -> tuple[Model, tree.Params]:
        """Return the narrower model and its parameters."""
        if model.axes.norm_mean:
            raise InputError(
                "slice: the norms of this model subtract the mean of the stream, which changes "
                "when it gets narrower; allowed: models with RMS norms"
            )
        model, params = untied(model, params)
        known = survey(model.axes, params)
        leaves = tree.flatten(tree.unstack(params))
        where = places(stats, leaves)
        found, weights = streams(self, model, params, known)
        offset = known.axes.norm_offset
        units = {}
        for name, group in found.items():
            members = {member.path for member in group.members}
            norms = [f for f in known.feeds if f.norm and set(f.sources) <= members]
            moments = jnp.zeros((group.size, group.size))
            for feed in norms:
                weight = leaves[feed.sources[0]].astype(jnp.float32) + offset
                path = one_reader(known, feed)
                seen = stats_of(path, stats, where)
                if seen is None:  # the input of a head that was tied is that of the table
                    continue
                size = jnp.maximum(jnp.abs(weight), 1e-6)
                moments = moments + seen["gram"] / (size[:, None] * size[None])
            _, vectors = jnp.linalg.eigh(moments)
            turn_stream(known, leaves, group, weights, vectors[:, ::-1])
            n = max(1, round(self.keep * group.size / self.multiple)) * self.multiple
            units[name] = jnp.arange(min(n, group.size))
            factor = math.sqrt(group.size / len(units[name]))  # the mean is over fewer units
            for path in {path for feed in norms for path in feed.sources}:
                leaves[path] = (leaves[path] + offset) * factor - offset
        smaller = axes.select(model.axes, tree.stack(tree.unflatten(leaves)), units)
        return of_that_shape(model, smaller), smaller


def of_that_shape(model: Model, params: tree.Params) -> Model:
    """Return the model of the family whose config has the sizes of the parameters.

    Sizes of a config that are multiples of a set's old size are tried, one or two at a time. If no
    config fits, as when layers differ, the model stays: it runs parameters with fewer units.
    """
    build = build_of(model)
    if build is None:
        return model
    shapes = lambda params: {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    key = jax.random.key(0)
    init = lambda model: jax.eval_shape(lambda key: tree.unstack(model.init(key)), key)
    sized = lambda model, params: {
        name: group.size for name, group in groups(model.axes, params).items()
    }
    whole = init(model)
    wanted = shapes(jax.eval_shape(tree.unstack, params))
    if wanted == shapes(whole):
        return model
    before = groups(model.axes, whole)
    units = sized(model, params)
    fewer = axes.narrower(model.axes, whole, params)
    sizes = {(before[name].size, n) for name, n in fewer.items()}
    fields = [
        (field.name, value // old * new)
        for field in dataclasses.fields(model.config)
        for old, new in sizes
        if isinstance(value := getattr(model.config, field.name), int)
        and not isinstance(value, bool)
        and value
        and value % old == 0
    ]
    for number in (1, 2):
        for some in itertools.combinations(fields, number):
            try:
                other = build(dataclasses.replace(model.config, **dict(some)), model.policy)
                # equal shapes may be of other units: half as many heads, or heads half as wide
                if shapes(found := init(other)) == wanted and sized(other, found) == units:
                    return other
            except InputError:
                continue
    return model
