"""Named groups of inputs connected to named groups of outputs by a bipartite pattern."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel import ops, tree
from jaxmodel.errors import InputError, one_of
from jaxmodel.layers.connect.full import add_bias, by_name, fan_in, starts
from jaxmodel.layers.leaf import leaf
from jaxmodel.leaves import decode
from jaxmodel.ops.edges import EdgeBlock, Edges, edges_of

type Pattern = tuple[tuple[str, str], ...]
"""The edges: pairs (group of inputs, group of outputs)."""

COMBINE = ("sum", "product")


class Groups(nn.Module):
    """A bipartite connection of groups of inputs s and groups of outputs t.

    It computes `y_t = b_t + sum (or product) over edges s -> t of importance_st * W_st x_s`. With
    one edge for each branch of the input, every branch has its own group of outputs before they
    are merged. Branches that are combined by a product interact. With all edges it is a full
    connection.

    Leaves: for each edge, or each name that edges share, a weight `[D_t, N_s]` under that name;
    GROUP_bias `[D_t]`; and optionally importance `[E]`, in the order of the edges. Edges that share
    a weight are one leaf, so they stay equal and count once.

    Attributes:
      pattern: the edges.
      widths: pairs (group of outputs, its width D_t) for all groups that the edges name.
      policy: dtypes and placement.
      combine: "sum" or "product".
      share: rules, name of an edge -> name of its weight; other edges have their own weights.
      importance: whether each edge has its own learnt factor, which `importances` reports.

    >>> import jax
    >>> xs = {"left": jnp.ones((2, 3)), "right": jnp.ones((2, 5))}
    >>> pattern = (("left", "x"), ("right", "y"))  # a group for each branch
    >>> apart = Groups(pattern, (("x", 4), ("y", 2)), ops.Policy())
    >>> y, variables = jax.jit(apart.init_with_output)(jax.random.key(0), xs)
    >>> {group: a.shape for group, a in y.items()}
    {'x': (2, 4), 'y': (2, 2)}
    >>> {name: leaf.shape for name, leaf in variables["params"].items()}
    {'left->x': (4, 3), 'right->y': (2, 5), 'x_bias': (4,), 'y_bias': (2,)}
    """

    pattern: Pattern
    widths: tuple[tuple[str, int], ...]
    policy: ops.Policy
    combine: str = "sum"
    share: tree.Rules = ()
    importance: bool = False

    @nn.compact
    def __call__(self, xs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs of each group, `[B, D_t]` by name."""
        xs = by_name(xs)
        check_pattern(self.pattern, xs, dict(self.widths), self.combine)
        weights = weight_names(self.pattern, self.share)
        factors = (
            leaf(self, "importance", nn.initializers.ones, (len(self.pattern),))
            if self.importance
            else None
        )
        out: dict[str, Array] = {}
        for i, (source, target) in enumerate(self.pattern):
            shape = (dict(self.widths)[target], xs[source].shape[-1])
            weight = leaf(self, weights[edge_name(source, target)], fan_in, shape)
            if tuple(weight.shape) != shape:
                raise InputError(
                    f"share: the edge {edge_name(source, target)} needs a weight {list(shape)}; "
                    f"the shared one is {list(weight.shape)}"
                )
            y = ops.einsum("BN,DN->BD", xs[source], weight, self.policy)
            y = y if factors is None else y * factors[i].astype(y.dtype)
            if target in out:
                y = out[target] * y if self.combine == "product" else out[target] + y
            out[target] = y
        return {target: add_bias(self, out[target], f"{target}_bias") for target, _ in self.widths}

    def edges(self, params: tree.Params) -> Edges:
        """Return the same connections as a list.

        They go from the features of all groups of inputs to those of all groups of outputs.
        """
        weights = self._weights(params)
        factors = params.get("importance")
        if factors is not None:
            weights = {
                edge: factors[i] * weight for i, (edge, weight) in enumerate(weights.items())
            }
        width = dict(sorted((source, weight.shape[1]) for (source, _), weight in weights.items()))
        first = dict(zip(width, starts(width.values()), strict=False))
        groups = sorted(self.widths)
        begins = starts(n for _, n in groups)
        blocks = []
        for (group, _), target in zip(groups, begins, strict=False):
            blocks.append(EdgeBlock(params[f"{group}_bias"], (), target))
            into = [edge for edge in self.pattern if edge[1] == group]
            if self.combine == "product":
                runs = tuple(first[source] for source, _ in into)
                blocks.append(
                    EdgeBlock(
                        functools.reduce(_outer, [weights[edge] for edge in into]), runs, target
                    )
                )
            else:
                blocks += [EdgeBlock(weights[edge], (first[edge[0]],), target) for edge in into]
        return edges_of(blocks, sum(width.values()), begins[-1])

    def importances(self, params: tree.Params) -> dict[str, float]:
        """Return the share of each edge in the total importance `|importance| * norm(W)`.

        The shares sum to 1.

        A factor alone means nothing, because the weight may grow where the factor shrinks; their
        product does not change then. Of edges that are multiplied with each other only the total
        product is determined, so each counts as their geometric mean. The size of the inputs is not
        included: groups should have the same scale (normalised or standardised).

        Args:
          params: the parameters of this layer; without a leaf `importance` all factors are one.

        Returns:
          A dict, name of an edge -> its share.
        """
        factors = np.abs(
            np.asarray(params.get("importance", np.ones(len(self.pattern))), np.float64)
        )
        norms = [
            float(jnp.linalg.norm(weight.astype(jnp.float32)))
            for weight in self._weights(params).values()
        ]
        sizes = factors * np.asarray(norms)
        if self.combine == "product":
            targets = np.asarray([target for _, target in self.pattern])
            for target in set(targets):
                sizes[targets == target] = np.prod(sizes[targets == target]) ** (
                    1 / np.sum(targets == target)
                )
        shares = sizes / max(sizes.sum(), 1e-30)
        return {
            edge_name(*edge): float(share) for edge, share in zip(self.pattern, shares, strict=True)
        }

    def _weights(self, params: tree.Params) -> dict[tuple[str, str], Array]:
        """Return the weight of each edge."""
        names = weight_names(self.pattern, self.share)
        return {edge: decode(params[names[edge_name(*edge)]]) for edge in self.pattern}


def edge_name(source: str, target: str) -> str:
    """Return the name of an edge in rules and reports.

    >>> edge_name("left", "middle")
    'left->middle'
    """
    return f"{source}->{target}"


def weight_names(pattern: Pattern, share: tree.Rules = ()) -> dict[str, str]:
    """Return the name of the weight of each edge.

    It is the name that the first matching rule gives, or else that of the edge.

    Args:
      pattern: the edges.
      share: rules, name of an edge -> name of a weight.

    Raises:
      InputError: a rule matches no edge, or a name belongs to another leaf of the layer.

    >>> weight_names((("a", "x"), ("b", "x"), ("c", "x")), (("[ab]->x", "both"),))
    {'a->x': 'both', 'b->x': 'both', 'c->x': 'c->x'}
    """
    names = [edge_name(*edge) for edge in pattern]
    for _, name in share:
        if name == "importance" or name.endswith("_bias") or "/" in name:
            raise InputError(
                f"share: {name!r} given; allowed: a name without '/' other than importance and "
                "..._bias"
            )
    given = tree.assign([*share, (tree.optional(".*"), None)], dict.fromkeys(names, 0))
    return {name: given[name] or name for name in names}


def check_pattern(
    pattern: Pattern, sources: Iterable[str], targets: Iterable[str], combine: str = "sum"
) -> None:
    """Refuse a pattern with an unknown group, a repeated edge, or a group without edges.

    Raises:
      InputError: the pattern is wrong; the message says where.
    """
    sources = list(sources)
    targets = list(targets)
    for source, target in pattern:
        one_of("edges: group of inputs", source, sources)
        one_of("edges: group of outputs", target, targets)
    if len(set(pattern)) != len(pattern):
        raise InputError(f"edges: {pattern} given; allowed: each edge once")
    if slashed := [name for edge in pattern for name in edge if "/" in name]:
        raise InputError(
            f"edges: {slashed[0]!r} has a slash, which separates the keys of a path; allowed: "
            "names without slashes"
        )
    for group in [
        *(s for s in sources if s not in dict(pattern)),
        *(t for t in targets if t not in {t for _, t in pattern}),
    ]:
        raise InputError(f"edges: the group {group!r} has none; each group needs at least one")
    one_of("combine", combine, COMBINE)


def _outer(left: Float[Array, "D ..."], right: Float[Array, "D J"]) -> Float[Array, "D ... J"]:
    """Return `[D, ..., J]`, the products of each output's weights."""
    return left[..., None] * right.reshape(right.shape[0], *[1] * (left.ndim - 1), right.shape[1])
