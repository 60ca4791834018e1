"""A network of named branches, connected in a pattern that the config chooses.

It consists of extractors, a merge of the branches, a body and a head. Each pattern is a layer of
`jaxmodel.layers.connect`; "concat" is the dense connectivity of Huang et al. (2017) on features.

>>> connected = model(SIZES["tiny"])
>>> params = jax.jit(connected.init)(jax.random.key(0))
>>> inputs = {"left": jnp.ones((2, 16)), "right": jnp.ones((2, 16))}
>>> jax.jit(connected.apply)(params, inputs).logits.shape
(2, 8)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, at_least, one_of
from jaxmodel.layers import LayerNorm, activation, connect, dense
from jaxmodel.layers.connect.groups import check_pattern, weight_names
from jaxmodel.layers.connect.sparse import check_blocks
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, read
from jaxmodel.models.parts import Parts, head_of, init_in_turn

EXTRACT = ("none", "own", "shared")
MERGE = ("full", "bilinear", "factorised", "groups")
BODY = ("full", "sparse", "learnt", "concat")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes and connection patterns of a member of the family.

    Attributes:
      branches: (name, features N) of each input.
      classes: the number of classes C.
      width: the width D that the branches are merged to.
      depth: the number of layers L of the body.
      extract: the extractor of each branch: "none", its "own" map, or one "shared" by all.
      features: the number of features that an extractor returns.
      merge: "full", the branches in the order of their names; "bilinear" (two branches);
        "factorised"; or "groups", along `edges`.
      rank: the rank of a factorised merge.
      edges: pairs (branch, group of outputs); all groups have the same width. With one edge for
        each branch, each has its own group.
      combine: how the edges of a group are combined, "sum" or "product".
      share: rules, name of an edge -> name of its weight; see `connect.Groups`.
      importance: whether each edge has a factor that is learnt; see `importances`.
      body: "full", "sparse" (a fixed choice of blocks) or "learnt" (a learnt choice), each with a
        residual connection; or "concat", where each layer reads the outputs of all before it.
      block: height and width of the blocks of a sparse body.
      kept: the number of blocks in each block row of a sparse body.
      growth: the number of features that a layer of "concat" adds.
      activation: see `layers.activation`.
      norm_eps: added to the variance by the layer norms.
    """

    branches: tuple[tuple[str, int], ...]
    classes: int
    width: int
    depth: int
    extract: str = "own"
    features: int = 32
    merge: str = "full"
    rank: int = 8
    edges: tuple[tuple[str, str], ...] = ()
    combine: str = "sum"
    share: tuple[tuple[str, str], ...] = ()
    importance: bool = False
    body: str = "full"
    block: tuple[int, int] = (8, 8)
    kept: int = 1
    growth: int = 8
    activation: str = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_sizes(self, ("classes", "width", "depth", "features", "rank", "kept", "growth"))
        for name, allowed in (("extract", EXTRACT), ("merge", MERGE), ("body", BODY)):
            one_of(name, getattr(self, name), allowed)
        activation(self.activation)
        for name in ("branches", "edges", "share", "block"):
            if not isinstance(getattr(self, name), tuple):
                raise InputError(
                    f"{name}: {getattr(self, name)!r} given; allowed: a tuple, so that the config "
                    f"can be hashed"
                )
        names = [name for name, _ in self.branches]
        for name, n in self.branches:
            at_least(f"branches: {name}", n)
        if (
            len(set(names)) != len(names)
            or not names
            or (self.merge == "bilinear" and len(names) != 2)
        ):
            raise InputError(
                f"branches: {names} given; allowed: different names, and two of them for a "
                "bilinear merge"
            )
        if self.extract == "shared" and len({n for _, n in self.branches}) > 1:
            raise InputError(
                f"branches: {dict(self.branches)} given; allowed for a shared extractor: the same "
                "number of features in each"
            )
        if self.merge == "groups":
            check_pattern(self.edges, names, [group for group, _ in self.groups], self.combine)
            if self.width % max(len(self.groups), 1):
                raise InputError(
                    f"edges: {len(self.groups)} groups given; allowed: a divisor of the width "
                    f"{self.width}"
                )
            weight_names(self.edges, self.share)
        elif self.edges or self.share or self.importance:
            raise InputError(
                f"edges, share, importance: given with the merge {self.merge!r}; allowed: with "
                f"'groups'"
            )
        if self.body in ("sparse", "learnt"):
            check_blocks(self.width, self.width, self.block, self.kept)

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """The groups of outputs that the edges name, with their widths."""
        names = list(dict.fromkeys(group for _, group in self.edges))
        return tuple((name, self.width // len(names)) for name in names)


_TWO = (("left", 16), ("right", 16))

SIZES = {
    "tiny": Config(
        _TWO, 8, 64, 3, extract="shared", features=16, merge="bilinear", body="sparse", kept=4
    ),
    "tiny-groups": Config(
        (*_TWO, ("third", 8)),
        *(8, 32, 4),
        merge="groups",
        edges=(("left", "x"), ("right", "x"), ("right", "y"), ("third", "y")),
        share=(("(left|right)->x", "both"),),
        importance=True,
        body="concat",
        growth=16,
    ),
    "two-towers": Config(
        (("query", 384), ("item", 384)),
        *(2, 1024, 4),
        features=1024,
        merge="factorised",
        rank=256,
        body="sparse",
        block=(64, 64),
        kept=2,
    ),
}

AXES = Axes(
    (
        ("head_bias", "c"),
        (tree.optional(".*(norm/(weight|bias)|_bias|importance|scores)"), "_", P()),
        (tree.optional("extract.*/weight"), "__", P("tensor", "fsdp")),
        ("merge/.*", "__", P("tensor", "fsdp")),
        (tree.optional("blocks/.*/map/(weight|all)"), "__", P("tensor", "fsdp")),
        (tree.optional("blocks/.*/map/kept"), "___", P(None, "tensor", "fsdp")),
        ("head", "c_", P("tensor", "fsdp")),
    )
)


class _Branches(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, xs: Mapping[str, jax.Array]) -> jax.Array:
        c = self.config
        act = activation(self.config.activation)
        if c.extract == "shared":
            xs = connect.Shared(connect.Full(c.features, self.policy, parent=None), name="extract")(
                xs
            )
        elif c.extract == "own":
            xs = {
                n: connect.Full(c.features, self.policy, name=f"extract_{n}")(x)
                for n, x in xs.items()
            }
        xs = xs if c.extract == "none" else {n: act(x) for n, x in xs.items()}
        if c.merge == "bilinear":
            y = connect.Bilinear(c.width, self.policy, name="merge")(
                *(xs[n] for n, _ in c.branches)
            )
        elif c.merge == "factorised":
            y = connect.Factorised(c.width, c.rank, self.policy, name="merge")(xs)
        elif c.merge == "groups":
            y = connect.merged(_groups(c, self.policy, name="merge")(xs))
        else:
            y = connect.Full(c.width, self.policy, name="merge")(connect.merged(xs))
        # products have another scale than their factors
        return LayerNorm(c.norm_eps, name="merge_norm")(y)


class _Block(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, layer: Any) -> jax.Array:
        c = self.config
        y = activation(c.activation)(LayerNorm(c.norm_eps, name="norm")(x))
        if c.body == "concat":
            return jnp.concatenate([x, connect.Full(c.growth, self.policy, name="map")(y)], axis=-1)
        if c.body == "full":
            return x + connect.Full(c.width, self.policy, name="map")(y)
        return x + _map(c, self.policy, name="map")(y, layer)


class _Head(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(
            self,
            LayerNorm(self.config.norm_eps, name="norm")(x),
            "head",
            self.config.classes,
            self.policy,
            "float32",
        )


def _groups(config: Config, policy: ops.Policy = ops.Policy(), **kwargs: Any) -> connect.Groups:
    c = config
    return connect.Groups(c.edges, c.groups, policy, c.combine, c.share, c.importance, **kwargs)


def _map(config: Config, policy: ops.Policy = ops.Policy(), **kwargs: Any) -> connect.BlockLinear:
    return connect.BlockLinear(
        config.width, config.block, config.kept, policy, config.body == "learnt", **kwargs
    )


def settle(config: Config, params: tree.Params) -> tree.Params:
    """Store each choice of blocks of a "sparse" or "learnt" body in a `BlockSparse` leaf.

    The function stays the same, and only the kept blocks are stored and run.

    Raises:
      InputError: the body has no blocks.
    """
    if config.body not in ("sparse", "learnt"):
        raise InputError(
            f"body: {config.body!r} given; allowed: 'sparse', 'learnt', which have blocks"
        )
    single = tree.unstack(params)
    module = _map(config)
    for layer, own in single["blocks"].items():
        own["map"] = connect.settle_blocks(module, own["map"], int(layer), config.width)
    return tree.stack(single)


def importances(config: Config, params: tree.Params) -> dict[str, float]:
    """Return the importance of each edge of a merge by groups; see `connect.Groups.importances`.

    >>> params = jax.jit(model(SIZES["tiny-groups"]).init)(jax.random.key(0))
    >>> list(importances(SIZES["tiny-groups"], params))
    ['left->x', 'right->x', 'right->y', 'third->y']
    """
    if config.merge != "groups":
        raise InputError(
            f"merge: {config.merge!r} given; allowed: 'groups', whose edges have names"
        )
    return _groups(config).importances(params["merge"])


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    branches, block_module, head_module = (
        module(config, policy) for module in (_Branches, _Block, _Head)
    )

    def embed(
        params: Any, inputs: Any, cache: Any = None, rng: Any = None, train: bool = False
    ) -> Any:
        xs = {
            name: read(inputs, name, "BN").astype(policy.activation_dtype)
            for name, _ in config.branches
        }
        return branches.apply({"params": params}, xs), {}

    def block(
        params: Any,
        x: Any,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ) -> Any:
        return block_module.apply({"params": params}, x, layer), cache, {}

    def init(key: jax.Array) -> tree.Params:
        first_key, head_key, *keys = jax.random.split(key, config.depth + 2)
        zeros = {n: jnp.zeros(a.shape, policy.activation_dtype) for n, a in inputs(1, 1).items()}
        x, own = branches.init_with_output(first_key, zeros)
        x, blocks = init_in_turn(block_module, keys, x, ((i,) for i in range(config.depth)))
        return tree.stack(
            {**own["params"], "blocks": blocks, **head_module.init(head_key, x)["params"]}
        )

    def inputs(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((batch, n), jnp.float32) for name, n in config.branches}

    parts = Parts(embed, block, head_of(head_module))
    return Model(config, policy, init, parts, inputs, None, AXES)
