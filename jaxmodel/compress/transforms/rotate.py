"""Rotation of activations: what few units carry is spread over all, and easier to round."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import rng, tree
from jaxmodel.axes import Group, groups
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.quantize.turn import check_block
from jaxmodel.compress.transforms.moves import (
    Leaves,
    Map,
    fold_norms,
    plain,
    product_of,
    rotate_axis,
    survey,
    turn_member,
)
from jaxmodel.compress.transforms.transform import Transform
from jaxmodel.errors import InputError
from jaxmodel.leaves import Turned
from jaxmodel.leaves.hadamard import block_of, hadamard, largest_block, turn
from jaxmodel.models import Model
from jaxmodel.models.reads import reads
from jaxmodel.models.untie import untied
from jaxmodel.schema import Count
from jaxmodel.text_form import name_of


@dataclasses.dataclass(frozen=True)
class Rotate(Transform):
    """Rotate what the matrices read, so that no few units are much larger than the others.

    The residual stream is rotated by one orthogonal matrix, which is merged into all leaves that
    write or read it; the weights of norms go into the matrices behind them first, and a tied head
    gets a leaf of its own for that. The values of each head are rotated likewise, in its width.
    Both cost nothing when the model runs. What is between an activation and a matrix (the input
    of `down`) is rotated when it runs: such a leaf becomes a `Turned` one. The model computes the
    same as before (QuaRot: Ashkboos et al., 2024; SpinQuant: Liu et al., 2024).

    Where norms subtract the mean (LayerNorm), the matrix leaves the mean as it is, so that this is
    exact too.

    Attributes:
      stream: rotate the residual stream.
      heads: rotate the values of the heads.
      online: rotate the inputs of all other matrices when the model runs.
      matrix: "hadamard" with random signs, in the largest blocks for which a Hadamard matrix is
        known; or "random" orthogonal. `online` is always Hadamard's, and a stream whose mean stays
        always random.
      block: of `online`, in units; None for the largest that a Hadamard matrix is known for. One
        that a mesh splits costs an exchange of activations.
    """

    stream: bool = True
    heads: bool = True
    online: bool = True
    matrix: Literal["hadamard", "random"] = "hadamard"
    block: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.stream or self.heads or self.online):
            self.refuse("stream", "True for one of stream, heads and online")
        check_block(self, self.block)

    def change(
        self, model: Model, params: tree.Params, stats: Stats, key: jax.Array
    ) -> tuple[Model, tree.Params]:
        """Return the rotated model, whose head is untied, and its parameters."""
        if self.stream:
            model, params = untied(model, params)
        known = survey(model.axes, params)
        leaves = tree.flatten(tree.unstack(params))
        rotated: set[str] = set()  # leaves whose inputs are rotated without cost
        if self.stream:
            found, weights = streams(self, model, params, known)
            for name, group in found.items():
                matrix = self._matrix(group.size, rng.fold(key, name), known.axes.norm_mean)
                rotated |= turn_stream(known, leaves, group, weights, matrix)
        if self.heads:
            rotated |= self._turn_heads(known, leaves, rng.fold(key, "heads"))
        if self.online:
            for path, letters in known.letters.items():
                inside = product_of(letters.axes[-1]) if letters.axes else ()
                if letters.role not in ("matrix", "experts") or path in rotated or "_" in inside:
                    continue
                leaf = plain(path, leaves[path])
                if size := block_of(leaf.shape[-1], self.block):
                    base = turn(leaf.astype(jnp.float32), size).astype(leaf.dtype)
                    leaves[path] = Turned(base, hadamard=size)
                    rotated.add(path)
        if not rotated:
            raise InputError(
                "rotate: nothing is left to rotate; allowed: a model whose axes name its matrices' "
                "inputs"
            )
        return model, tree.stack(tree.unflatten(leaves))

    def _turn_heads(self, known: Map, leaves: Leaves, key: jax.Array) -> set[str]:
        turned = set()
        for feed in known.feeds:
            *_, unit = feed.letters
            if feed.norm or not unit.islower():
                continue
            matrix = self._matrix(feed.shape[-1], key, False)
            for path in feed.sources:
                axis = -1 if known.letters[path].role == "vector" else -2
                leaves[path] = rotate_axis(plain(path, leaves[path]), matrix, axis)
            for path in feed.readers:
                leaves[path] = rotate_axis(plain(path, leaves[path]), matrix, -1)
                turned.add(path)
        return turned

    def _matrix(self, n: int, key: jax.Array, keep_mean: bool) -> Float[Array, "n n"]:
        if keep_mean:
            return mean_kept(orthogonal(n - 1, key))
        if self.matrix == "random":
            return orthogonal(n, key)
        size = largest_block(n)
        signs = jax.random.rademacher(key, (n,), jnp.float32)
        return signs[:, None] * jnp.kron(jnp.eye(n // size), jnp.asarray(hadamard(size)))


def orthogonal(n: int, key: jax.Array) -> Float[Array, "n n"]:
    """Return a random orthogonal matrix, uniform by Haar's measure."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (n, n)))
    return q * jnp.sign(jnp.diagonal(r))[None]


def mean_kept(matrix: Float[Array, "m m"]) -> Float[Array, "n n"]:
    """Return an orthogonal matrix, larger by one, that maps the vector of ones to itself.

    >>> ones = jnp.ones(3)
    >>> q = mean_kept(orthogonal(2, jax.random.key(0)))
    >>> bool(jnp.allclose(ones @ q, ones, atol=1e-6))
    True
    """
    n = len(matrix) + 1
    first = jnp.zeros(n).at[0].set(1.0)
    v = first - jnp.full(n, n**-0.5)
    mirror = jnp.eye(n) - 2 * jnp.outer(v, v) / jnp.sum(v * v)  # first unit <-> the ones
    inner = jnp.zeros((n, n)).at[0, 0].set(1.0).at[1:, 1:].set(matrix)
    times = lambda a, b: jnp.matmul(a, b, precision="highest")
    return times(times(mirror, inner), mirror)


def streams(
    one: Transform, model: Model, params: tree.Params, known: Map
) -> tuple[dict[str, Group], set[str]]:
    """Return the residual streams (the sets of units called `D`) that may be rotated.

    Returns:
      The streams by name, and the layer paths of all vectors that scale units (norms' weights).

    Raises:
      InputError: there is none, or one that may not be, with the reason.
    """
    no = f"{name_of(type(one))}: the residual stream of this model does not allow it"
    other = "; give stream=False" if isinstance(one, Rotate) else ""
    found = {
        name: group for name, group in groups(model.axes, params).items() if group.letter[0] == "D"
    }
    if not found:
        raise InputError(f"{no}: its axes name no residual stream D{other}")
    weights = {
        path
        for path, read in reads(model, params).items()
        if known.letters[path].role == "vector" and "mul" in read.by
    }
    norms = {path for feed in known.feeds if feed.norm for path in feed.sources}
    for name, group in found.items():
        if group.ordered:
            raise InputError(
                f"{no}: the order of {name} is fixed by more than weights (fixed positions, or "
                f"activations that are the result){other}"
            )
        axes: dict[str, int] = {}
        for member in group.members:
            path = member.path
            if axes.setdefault(path, member.axis) != member.axis:
                raise InputError(
                    f"{no}: {path!r} has {name} on both sides, so it is more than a part of the "
                    f"stream{other}"
                )
            if known.letters[path].role == "measured" or path in weights - norms:
                raise InputError(
                    f"{no}: {path!r} scales each unit of {name}, and no leaf that Axes.feeds names "
                    f"reads only what it scales{other}"
                )
    return found, weights


def turn_stream(
    known: Map, leaves: Leaves, group: Group, weights: set[str], matrix: Float[Array, "n n"]
) -> set[str]:
    """Rotate a stream in all leaves that have it.

    Args:
      known: see `survey`.
      leaves: by layer path, changed in place.
      group: a stream that `streams` found.
      weights: the vectors that scale units, likewise.
      matrix: orthogonal; where norms subtract the mean, the ones are a vector that it keeps.

    Returns:
      The layer paths of the leaves that read the stream.

    Raises:
      InputError: the weight of a norm cannot be moved.
    """
    ones = fold_norms(known, leaves, {member.path for member in group.members}, weights)
    reading = set()
    for member in group.members:
        path = member.path
        if path in ones:
            continue
        leaf = plain(path, leaves[path])
        leaves[path] = turn_member(leaf, member, group.size, matrix)
        if leaf.ndim > 1 and member.axis == leaf.ndim - 1:
            reading.add(path)
    return reading
