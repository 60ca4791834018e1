"""The cache: what many rows write in a loop is what few write one by one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxmodel.ops import KVCache, Policy
from jaxmodel.ops.cache import UNROLLED

L = 2
B = UNROLLED + 3
K = 2
S = 6
h = 4
T = 2


def test_many_rows_are_written_as_few_are():
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(B, T, K, h)), jnp.float32) for _ in range(2))
    lengths = jnp.asarray(rng.integers(0, S - T + 1, B), jnp.int32)
    empty = KVCache.zeros(L, B, K, S, h, Policy())
    cache = KVCache(empty.k, empty.v - 1, lengths)
    keys, values, _, after = cache.update(1, k, v)
    want_k = np.zeros((L, B, K, S, h), np.float32)
    want_v = np.full((L, B, K, S, h), -1, np.float32)
    for b, n in enumerate(lengths.tolist()):
        want_k[1, b, :, n : n + T], want_v[1, b, :, n : n + T] = (
            np.swapaxes(a[b], 0, 1) for a in (k, v)
        )
        few = KVCache(cache.k[:, b : b + 1], cache.v[:, b : b + 1], lengths[b : b + 1]).update(
            1, k[b : b + 1], v[b : b + 1]
        )[3]
        np.testing.assert_array_equal(few.k[:, 0], after.k[:, b])
    np.testing.assert_array_equal(after.k, want_k)
    np.testing.assert_array_equal(after.v, want_v)
    np.testing.assert_array_equal(keys, want_k[1])
    np.testing.assert_array_equal(values, want_v[1])
    assert len(set(lengths.tolist())) > 2
