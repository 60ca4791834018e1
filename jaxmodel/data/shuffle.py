"""A keyed order of N rows in which any position is found without the others."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

SORTED_UP_TO = 2**16
"""Orders of up to so many rows are drawn by sorting, longer ones position by position."""
_ROUNDS = 8


def permute(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the rows at `places` of the order of (seed, epoch), a permutation of 0 ... count - 1.

    Small orders are made by sorting random words, and cached. Nothing is stored for a large one:
    with a = ceil(sqrt(N)) and b = ceil(N / a), a position x is the pair (x mod a, x div a). Each
    round adds a keyed hash of one half to the other, mod a or b (a Feistel network). Results beyond
    N, fewer than a, pass through again until they fall below N (cycle walking). So every position
    costs the same, and no memory but its own. It is not a cipher.

    Args:
      places: positions, int64 [n], each from 0 to count - 1.
      count: rows N, at most 2^62.
      seed: 0 to 2^64 - 1.
      epoch: 0 to 2^64 - 1.

    Returns:
      int64 [n].

    Black & Rogaway, Ciphers with arbitrary finite domains, 2002.

    >>> rows = permute(np.arange(100_000), 100_000, seed=0, epoch=3)
    >>> sorted(rows.tolist()) == list(range(100_000))
    True
    """
    if count <= SORTED_UP_TO:
        return _sorted(seed, epoch, count)[places]
    return _walk(places, count, _words(seed, epoch, _ROUNDS))


@lru_cache(maxsize=4)  # two epochs meet in a batch, and prefetching threads may be on either side
def _sorted(seed: int, epoch: int, count: int) -> np.ndarray:
    words = _words(seed, epoch, count)
    order = np.argsort(words)
    # equal words: only then does the order depend on the sorting algorithm
    if np.any(words[order[1:]] == words[order[:-1]]):
        order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # the cache hands out the same array again
    return order


def _words(seed: int, epoch: int, count: int) -> np.ndarray:
    # Not `Generator.permutation`: only the raw words are the same in all versions of NumPy.
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)


def _walk(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    out = np.asarray(places).astype(np.uint64)
    beyond = np.arange(len(out))
    while len(beyond):
        out[beyond] = _feistel(out[beyond], np.uint64(a), np.uint64(b), keys)
        beyond = beyond[out[beyond] >= count]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    high, low = np.divmod(x, a)
    for i, key in enumerate(keys):
        if i % 2:
            high = (high + _hash(low, key)) % b
        else:
            low = (low + _hash(high, key)) % a
    return high * a + low


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return 32 bits that can be added without overflow.

    They are the upper half of the 64 bits that MurmurHash3 ends with (Appleby, 2011).
    """
    x = x ^ key
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(33))) >> np.uint64(32)
