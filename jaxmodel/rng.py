"""Named random streams: each purpose draws from a key of its own.

    key = fold(step_key, "augment")

A name becomes a number, so nobody has to agree on numbers, and two purposes that share a key never
draw the same. Layers and rows fold in their small indices, which no name's number is.
"""

from __future__ import annotations

import zlib

import jax


def number(name: str) -> int:
    """Return the number of a name, in [0, 2^32): its CRC-32.

    >>> number("augment")
    3944118809
    """
    return zlib.crc32(name.encode())


def fold(key: jax.Array, name: str) -> jax.Array:
    """Return the key of a named stream.

    >>> fold(jax.random.key(0), "augment") == fold(jax.random.key(0), "round")
    Array(False, dtype=bool)
    """
    return jax.random.fold_in(key, number(name))
