"""Connections of second order: products of two inputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.connect.full import by_name, fan_in, starts
from jaxmodel.layers.leaf import leaf
from jaxmodel.leaves import decode
from jaxmodel.ops.edges import EdgeBlock, Edges, edges_of


class Bilinear(nn.Module):
    """A bilinear map `y_d = sum_ij W_dij x_i z_j`.

    Every pair of inputs, one of each of two branches, is connected to every output. Its one leaf is
    pairs `[D * I, J]`, with the outputs first.

    Attributes:
      width: D, the number of outputs.
      policy: dtypes and placement.

    >>> import jax
    >>> x, z, module = jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]), Bilinear(1, ops.Policy())
    >>> params = {"pairs": jnp.array([[10.0], [100.0]])}
    >>> float(module.apply({"params": params}, x, z)[0, 0])  # 10 * 1 * 3 + 100 * 2 * 3
    630.0
    """

    width: int
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: Float[Array, "B I"], z: Float[Array, "B J"]) -> Float[Array, "B D"]:
        """Compute the bilinear map."""
        n = x.shape[-1]
        pairs = leaf(
            self,
            "pairs",
            nn.initializers.normal((n * z.shape[-1]) ** -0.5),
            (self.width * n, z.shape[-1]),
        )
        met = ops.einsum("BJ,(DI)J->BDI", z, pairs, self.policy, I=n)
        return jnp.sum(met.astype(jnp.float32) * x[:, None].astype(jnp.float32), axis=-1).astype(
            met.dtype
        )

    def edges(self, params: tree.Params) -> Edges:
        """Return the same connections as a list, of the features of x followed by those of z."""
        pairs = decode(params["pairs"]).reshape(self.width, -1, params["pairs"].shape[-1])
        n = pairs.shape[1]
        return edges_of([EdgeBlock(pairs, (0, n))], n + pairs.shape[2], self.width)


class Factorised(nn.Module):
    """A bilinear form of low rank for each pair of branches.

    It computes `y = P (sum over pairs of branches b < c of U_b x_b * U_c x_c)`: factorisation
    machines (Rendle, 2010) with branches as fields; for two branches the low-rank bilinear pooling
    of Kim et al. (2017). Leaves: factor_BRANCH `[R, N]` and out `[D, R]`. The sum over pairs needs
    only one product for each branch.

    Attributes:
      width: D of new leaves.
      rank: R of new leaves.
      policy: dtypes and placement.

    >>> import jax
    >>> xs = {name: jnp.ones((2, 3)) for name in ("age", "place", "time")}
    >>> params = jax.jit(Factorised(4, 8, ops.Policy()).init)(jax.random.key(0), xs)["params"]
    >>> {name: leaf.shape for name, leaf in params.items()}
    {'factor_age': (8, 3), 'factor_place': (8, 3), 'factor_time': (8, 3), 'out': (4, 8)}
    """

    width: int
    rank: int
    policy: ops.Policy

    @nn.compact
    def __call__(self, xs: Mapping[str, Array]) -> Float[Array, "B D"]:
        """Compute the sum of the products of all pairs of branches."""
        if len(xs) < 2:
            raise InputError(f"branches: {list(xs)} given; allowed: at least two, to be multiplied")
        met = seen = None
        for name, x in by_name(xs).items():
            factor = leaf(self, f"factor_{name}", fan_in, (self.rank, x.shape[-1]))
            y = ops.einsum("BN,RN->BR", x, factor, self.policy)
            if seen is not None:
                met = y * seen if met is None else met + y * seen
            seen = y if seen is None else seen + y
        assert met is not None
        return ops.einsum(
            "BR,DR->BD", met, leaf(self, "out", fan_in, (self.width, met.shape[-1])), self.policy
        )

    def edges(self, params: tree.Params) -> Edges:
        """Return the same connections as a list.

        There is an edge for each pair of features of two branches and each output.
        """
        factors = {name: decode(leaf) for name, leaf in sorted(params.items()) if name != "out"}
        first = dict(zip(factors, starts(f.shape[1] for f in factors.values()), strict=False))
        out = decode(params["out"])
        blocks = [
            EdgeBlock(
                jnp.einsum("dr,ri,rj->dij", out, factors[b], factors[c], precision="highest"),
                (first[b], first[c]),
            )
            for b, c in itertools.combinations(factors, 2)
        ]
        return edges_of(blocks, sum(f.shape[1] for f in factors.values()), out.shape[0])
