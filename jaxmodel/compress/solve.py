"""Rounding and pruning with compensation: what one weight loses, those behind it make up.

The error of a layer's output is `|| (W - Q) X ||^2 = sum over rows of e H e^T` with `H = X^T X`.
Going through the columns, each is rounded or pruned, and the columns behind it move so that this
error grows least (OBS: Hassibi and Stork, 1993; GPTQ: Frantar et al., 2023; SparseGPT: Frantar and
Alistarh, 2023). Rows do not meet, so they may lie on several devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from jaxmodel.compress.draft import Grid

BLOCK = 128
"""How many columns are worked on before the ones behind them are updated."""


class Hessian(NamedTuple):
    """`H` of a layer, damped, and what inverts it.

    Attributes:
      matrix: `[in, in]`, the mean of `x x^T` plus the damping on its diagonal.
      factor: upper triangular U with `U^T U = H^-1`.
      damping: as a fraction of the mean of the diagonal; larger than asked for where H was not
        positive definite.
    """

    matrix: Float[Array, "in in"]
    factor: Float[Array, "in in"]
    damping: Float[Array, ""]


def hessian(gram: Float[Array, "in in"], count: Array, damping: float = 0.01) -> Hessian:
    """Damp a Gram matrix and factor its inverse.

    Inputs that were never seen, and a Gram matrix that is not finite, count as the identity.

    Args:
      gram: the sum of `x x^T`.
      count: of the x.
      damping: the fraction of the mean of the diagonal that is added to it; ten times as much, and
        again, while the matrix is not positive definite.
    """
    n = gram.shape[0]
    eye = jnp.eye(n)
    mean = gram / jnp.maximum(count, 1.0)
    mean = jnp.where(jnp.all(jnp.isfinite(mean)), mean, eye)
    dead = jnp.diagonal(mean) <= 0
    mean = mean + jnp.diag(jnp.where(dead, 1.0, 0.0))
    size = jnp.mean(jnp.diagonal(mean))

    factor = lambda damping: inverse_factor(mean + damping * size * eye)
    bad = lambda state: ~jnp.all(jnp.isfinite(state[0])) & (state[1] < 1e3)
    more = lambda state: (factor(state[1] * 10), state[1] * 10)
    first = jnp.maximum(jnp.float32(damping), 1e-6)
    upper, used = jax.lax.while_loop(bad, more, (factor(first), first))
    return Hessian(mean + used * size * eye, upper, used)


def inverse_factor(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return the upper triangular U with `U^T U` the inverse of a matrix; NaN if it has none."""
    # chol of the matrix read backwards: H = R R^T with R upper, so U = R^-1
    lower = jnp.linalg.cholesky(matrix[::-1, ::-1])
    return solve_triangular(lower[::-1, ::-1], jnp.eye(matrix.shape[0]), lower=False)


type Choose = Callable[[Float[Array, "columns out"], Array], Bool[Array, "columns out"]]


def compensate(
    weight: Float[Array, "out in"],
    upper: Float[Array, "in in"],
    grid: Grid | None = None,
    keep: Bool[Array, "out in"] | None = None,
    choose: Choose | None = None,
    every: int = BLOCK,
) -> tuple[Float[Array, "out in"], Bool[Array, "out in"] | None]:
    """Go through the columns: round each to the grid, prune it, and let those behind make up.

    Args:
      weight: the weights.
      upper: `Hessian.factor`.
      grid: the values that are allowed; None to round nothing.
      keep: the weights that are kept; None for all.
      choose: chooses what to keep of `every` columns at a time, by what each weight's loss would
        cost, and by how many of the columns are not padding; what `keep` leaves out and what is
        padding has the cost 0.
      every: divides `BLOCK`.

    Returns:
      The weights, and what is kept of them (None if nothing was pruned).
    """
    out, n = weight.shape
    blocks = -(-n // BLOCK)
    extra = blocks * BLOCK - n
    # columns are rows from here on, so that one is contiguous; padding loses nothing
    turned = jnp.pad(weight.T, ((0, extra), (0, 0)))
    upper = jnp.pad(upper, ((0, extra), (0, extra))) + jnp.diag(
        jnp.concatenate([jnp.zeros(n), jnp.ones(extra)])
    )
    prunes = keep is not None or choose is not None
    kept = jnp.ones((n, out), bool) if keep is None else keep.T
    kept = jnp.pad(kept, ((0, extra), (0, 0)))  # of the padding, nothing is
    grids = None if grid is None else _by_column(grid, n, extra)

    def one_block(later: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        rows = jax.lax.dynamic_slice_in_dim(upper, start, BLOCK, 0)
        own = jax.lax.dynamic_slice_in_dim(rows, start, BLOCK, 1)
        here = jax.lax.dynamic_slice_in_dim(later, start, BLOCK, 0)
        mine = jax.lax.dynamic_slice_in_dim(kept, start, BLOCK, 0)
        steps = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, BLOCK, 0), grids
        )

        def chosen(choose: Choose, here: Array, mine: Array, i: Array) -> Array:
            columns = jnp.clip(n - start - i, 0, every)
            window = lambda array: jax.lax.dynamic_slice_in_dim(array, i, every, 0)
            cost = (window(here) / window(jnp.diagonal(own))[:, None]) ** 2
            cost = jnp.where(window(mine), cost + 1e-30, 0.0)
            return jax.lax.dynamic_update_slice_in_dim(
                mine, choose(cost, columns) & window(mine), i, 0
            )

        def column(i: Array, state: Any) -> Any:
            here, mine, done, errors = state
            if choose is not None:
                mine = jax.lax.cond(
                    i % every == 0,
                    lambda choose=choose: chosen(choose, here, mine, i),
                    lambda: mine,
                )
            value = here[i]
            if steps is not None:
                at = jax.tree.map(lambda array: array[i], steps)
                value = at.round(value[:, None])[:, 0]
            if prunes:
                value = jnp.where(mine[i], value, 0.0)
            error = (here[i] - value) / own[i, i]
            # own is upper triangular: the columns in front do not move
            here = here - own[i][:, None] * error[None]
            return here, mine, done.at[i].set(value), errors.at[i].set(error)

        state = (here, mine, jnp.zeros_like(here), jnp.zeros_like(here))
        _, mine, done, errors = jax.lax.fori_loop(0, BLOCK, column, state)
        behind = jnp.arange(later.shape[0]) >= start + BLOCK
        moved = jnp.matmul(jnp.where(behind, rows, 0.0).T, errors, precision="highest")
        return later - moved, (done, mine)

    _, (done, mine) = jax.lax.scan(one_block, turned, jnp.arange(blocks) * BLOCK)
    restore = lambda array: array.reshape(blocks * BLOCK, out)[:n].T
    return restore(done), restore(mine) if prunes else None


def refine(
    weight: Float[Array, "out in"],
    rounded: Float[Array, "out in"],
    matrix: Float[Array, "in in"],
    grid: Grid | None,
    keep: Bool[Array, "out in"] | None = None,
    sweeps: int = 1,
) -> Float[Array, "out in"]:
    """Set each column, in turn, to the allowed value that is best while the others stay.

    Coordinate descent on `e H e^T` (as in QuantEase: Behdin et al., 2023); the error never grows.

    Args:
      weight: the original weights.
      rounded: where to begin.
      matrix: `Hessian.matrix`.
      grid: the values that are allowed; None for all.
      keep: the weights that are kept; None for all.
      sweeps: how often all columns have their turn.
    """
    out, n = weight.shape
    blocks = -(-n // BLOCK)
    extra = blocks * BLOCK - n
    wide = lambda array: jnp.pad(array.T, ((0, extra), (0, 0)))
    matrix = jnp.pad(matrix, ((0, extra), (0, extra))) + jnp.diag(
        jnp.concatenate([jnp.zeros(n), jnp.ones(extra)])
    )
    kept = jnp.ones((n + extra, out), bool) if keep is None else wide(keep)
    grids = None if grid is None else _by_column(grid, n, extra)
    target = wide(weight)

    def one_block(state: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        now, slope = state  # slope = H (W - Q), one row for each column of the weight
        take = lambda array: jax.lax.dynamic_slice_in_dim(array, start, BLOCK, 0)
        rows = take(matrix)
        own = jax.lax.dynamic_slice_in_dim(rows, start, BLOCK, 1)
        mine = take(kept)
        steps = jax.tree.map(take, grids)

        def column(i: Array, state: Any) -> Any:
            here, slope, moves = state
            value = here[i] + slope[i] / own[i, i]
            if steps is not None:
                at = jax.tree.map(lambda array: array[i], steps)
                value = at.round(value[:, None])[:, 0]
            value = jnp.where(mine[i], value, 0.0)
            move = value - here[i]
            slope = slope - own[i][:, None] * move[None]
            return here.at[i].set(value), slope, moves.at[i].set(move)

        here = take(now)
        begin = (here, take(slope), jnp.zeros_like(here))
        here, _, moves = jax.lax.fori_loop(0, BLOCK, column, begin)
        now = jax.lax.dynamic_update_slice_in_dim(now, here, start, 0)
        return (now, slope - jnp.matmul(rows.T, moves, precision="highest")), None

    def sweep(now: Array, _: Any) -> tuple[Array, None]:
        slope = jnp.matmul(matrix, target - now, precision="highest")
        starts = jnp.arange(blocks) * BLOCK
        return jax.lax.scan(one_block, (now, slope), starts)[0][0], None

    now, _ = jax.lax.scan(sweep, wide(rounded), None, length=sweeps)
    return now[:n].T


def _by_column(grid: Grid, n: int, extra: int) -> Grid:
    """Return a grid with one entry for each column in front: `scale[i]` is `[out, 1]`."""

    def spread(small: Array | None) -> Array | None:
        if small is None:
            return None
        wide = jnp.repeat(small.astype(jnp.float32), grid.group or n, axis=-1)[..., :n]
        return jnp.pad(wide.T, ((0, extra), (0, 0)), constant_values=1.0)[..., None]

    table = grid.table
    table = None if table is None else jnp.broadcast_to(table, (n + extra, *table.shape))
    return Grid(spread(grid.scale), spread(grid.minimum), table, bits=grid.bits, form=grid.form)
