"""Numbers and trees that nothing right can be made of are refused in one line; what is accepted
comes back as it was.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxmodel import compress, ops, optim, tree
from jaxmodel.errors import InputError

KEYS = (
    st.text(min_size=1, max_size=3)
    | st.sampled_from(["blocks", "0", "1-2", "a", ""])
    | st.integers(0, 3)
)
LEAVES = st.none() | st.just([]) | st.just((1,)) | st.builds(lambda: np.ones(2))


@given(st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=8))
def test_flatten_and_back(params: Any) -> None:
    try:
        leaves = tree.flatten(params if isinstance(params, dict) else {"a": params})
    except InputError as error:
        assert "\n" not in str(error)
    else:
        again = tree.unflatten(leaves)
        np.testing.assert_equal(again, params if isinstance(params, dict) else {"a": params})
        assert list(tree.flatten(again)) == list(leaves)


def test_trees_that_are_none() -> None:
    circle: dict[str, Any] = {"a": {}}
    circle["a"]["b"] = circle
    ones = jnp.ones(2)
    for params, says in (
        ({"a": [ones]}, "'a' is a list"),
        ({"a": {"b": (ones, ones)}}, "'a/b' is a tuple"),
        ({"a": None}, "'a' is a NoneType"),
        ({"a": {0: ones}}, "a has the key 0"),
        ({"a/b": ones}, "the whole has the key 'a/b'"),
        ({"a": {}}, "'a' is an empty dict"),
        (circle, "or contains itself"),
    ):
        with pytest.raises(InputError, match=says):
            tree.flatten(params)
    for leaves in ({"a": ones, "a/b": ones}, {"a/b": ones, "a": ones}):
        with pytest.raises(InputError, match="allowed: a dict or a leaf"):
            tree.unflatten(leaves)


@pytest.mark.parametrize(
    "chain",
    ["rtn(bits=8)", "rtn(bits=4, group=8)", "rtn(bits=4, symmetric=False)", "magnitude(0.5)"],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(chain: str, value: float) -> None:
    weights = np.ones((4, 16), np.float32)
    weights[1, 3] = value
    for make in (
        lambda: compress.apply(
            [("up", chain), (".*", ())], {"up": jnp.asarray(weights), "rest": jnp.asarray(weights)}
        ),
        lambda: compress.parse(chain)[0](jnp.asarray(weights)),
    ):
        with pytest.raises(InputError, match="NaN or infinite"):
            make()
    whole, report = compress.apply([(".*", ())], {"up": jnp.asarray(weights)})
    assert (
        np.array_equal(whole["up"], weights, equal_nan=True)
        and report.leaves[0]["relative_error"] == 0
    )


def test_weights_that_codes_cannot_stand_for() -> None:
    for leaf, says in (
        (jnp.ones((4, 8), jnp.complex64), "complex64"),
        (jnp.ones((4, 0)), "no weights"),
        (jnp.ones((4, 8), jnp.int32), "int32"),
    ):
        for make in (
            lambda leaf=leaf: compress.apply([("up", "rtn(bits=8)")], {"up": leaf}),
            lambda leaf=leaf: optim.quantize_weights({"up": leaf}, [("up", 8)]),
        ):
            with pytest.raises(InputError, match=says):
                make()


def test_a_cache_of_another_batch_size() -> None:
    cache = ops.KVCache.zeros(1, 2, 1, 8, 4, ops.Policy())
    for rows in (1, 3):
        new = jnp.ones((rows, 1, 1, 4))
        with pytest.raises(InputError, match=f"made for 2 rows; {rows} given"):
            cache.update(0, new, new)
