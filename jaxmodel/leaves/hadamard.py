"""Hadamard matrices of the sizes that models have, and products with them.

A Hadamard matrix has the entries +1 and -1 and orthogonal rows. They exist for the powers of two,
and by Paley's constructions (1933) for `q + 1` and `2 (q + 1)` with a prime q of the right kind:
12, 20, 28, 36, 44, ... A product of two of them (Kronecker's) is one again, so `576 = 16 * 36` and
`1536 = 128 * 12` have one of their own size.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel.errors import InputError


@functools.cache
def hadamard(n: int) -> np.ndarray:
    """Return an orthogonal Hadamard matrix `[n, n]` in float32, entries `+-1 / sqrt(n)`.

    Raises:
      InputError: none is known here for this size.

    >>> print(hadamard(2).round(3))
    [[ 0.707  0.707]
     [ 0.707 -0.707]]
    """
    signs = _signs(n)
    if signs is None:
        raise InputError(f"hadamard: no matrix of size {n} is known; nearest: {largest_block(n)}")
    return (signs / np.sqrt(n)).astype(np.float32)


def largest_block(n: int) -> int:
    """Return the largest size of a Hadamard matrix that divides n.

    >>> largest_block(576), largest_block(1536), largest_block(100), largest_block(7)
    (576, 1536, 20, 1)
    """
    return max(m for m in range(1, n + 1) if n % m == 0 and _signs(m) is not None)


def block_of(n: int, block: int | None = None) -> int:
    """Return the size of the blocks in which n units are rotated; 0 if they are not.

    Args:
      n: units.
      block: the size asked for; None for the largest.

    >>> block_of(576), block_of(576, 64), block_of(576, 128), block_of(7)
    (576, 64, 0, 0)
    """
    size = largest_block(n) if block is None else block
    return size if size > 1 and n % size == 0 else 0


def turn(x: Float[Array, "... n"], size: int, *, back: bool = False) -> Float[Array, "... n"]:
    """Multiply each block of `size` along the last axis with a Hadamard matrix: `x @ H`.

    In two products, with the smaller matrices whose Kronecker product H is.

    Args:
      x: the array; `size` divides its last axis.
      size: of a block.
      back: multiply with the transpose, which undoes it.
    """
    times = functools.partial(jnp.einsum, precision="highest")
    of = lambda n: jnp.asarray(hadamard(n).T if back else hadamard(n), x.dtype)
    a, b = _halves(size)
    blocks = times("nij,jk->nik", x.reshape(-1, a, b), of(b))
    return times("nij,ik->nkj", blocks, of(a)).reshape(x.shape)


def _halves(n: int) -> tuple[int, int]:
    """Return the sizes of two Hadamard matrices whose Kronecker product is that of size n.

    The first is a power of two, as in Sylvester's construction, and their sum is as small as it
    can be.
    """
    splits = [(2**i, n // 2**i) for i in range(n.bit_length()) if n % 2**i == 0]
    return min((pair for pair in splits if _signs(pair[1]) is not None), key=sum)


@functools.cache
def _signs(n: int) -> np.ndarray | None:
    if n in (1, 2):
        return np.array([[1, 1], [1, -1]])[:n, :n]
    if n % 4:
        return None
    half = _signs(n // 2)
    if half is not None:
        return np.kron(np.array([[1, 1], [1, -1]]), half)
    if _is_prime(n - 1):  # n - 1 = 3 modulo 4
        return np.eye(n, dtype=int) + _skew(n - 1)
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        core = _bordered(n // 2 - 1)
        return np.kron(core, np.array([[1, 1], [1, -1]])) + np.kron(
            np.eye(n // 2, dtype=int), np.array([[1, -1], [-1, -1]])
        )
    for m in (12, 20, 28, 36):
        other = _signs(n // m) if n % m == 0 and n > m else None
        if other is not None:
            return np.kron(other, _signs(m))
    return None


def _is_prime(q: int) -> bool:
    return q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))


def _residues(q: int) -> np.ndarray:
    """Return Jacobsthal's matrix: +1 where the difference is a square modulo q, else -1."""
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
    return chi[(np.arange(q)[:, None] - np.arange(q)[None]) % q]


def _bordered(q: int) -> np.ndarray:
    out = np.zeros((q + 1, q + 1), int)
    out[0, 1:] = out[1:, 0] = 1
    out[1:, 1:] = _residues(q)
    return out


def _skew(q: int) -> np.ndarray:
    out = _bordered(q)
    out[1:, 0] = -1
    return out
