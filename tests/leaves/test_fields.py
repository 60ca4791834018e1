"""Static fields as JSON beside a tree: what they say, that stacking does not matter, and that any
change is refused.
"""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.leaves.fields import check_fields, digest, static_fields


def codes(bits: int, *lead: int, **static) -> QTensor:
    values = np.random.default_rng(bits).integers(0, 2 ** (bits - 1), (*lead, 4, 16))
    return QTensor.from_codes(
        jnp.asarray(values, jnp.int32), jnp.ones((*lead, 4, 1)), bits=bits, **static
    )


def half(*lead: int) -> Sparse:
    dense = np.tile(np.float32([0, 1, 0, 2]), (*lead, 4, 4))
    return Sparse.from_dense(jnp.asarray(dense), pattern=(2, 4))


PARAMS = {
    "embed": codes(8, activations="int8"),
    "blocks": {
        "0-1": {"up": codes(4, 2), "down": half(2), "norm": jnp.ones((2, 4))},
        "2": {"up": codes(3), "down": jnp.ones((4, 4))},
    },
}


@pytest.fixture
def stored() -> dict:
    return json.loads(json.dumps(static_fields(PARAMS)))  # what stands on disk


def test_fields_are_those_of_each_layer(stored):
    assert stored == static_fields(PARAMS)  # JSON changes nothing
    assert stored["format"] == 1
    assert stored["leaves"].keys() == {
        "embed",
        *(f"blocks/{i}/up" for i in range(3)),
        "blocks/0/down",
        "blocks/1/down",
    }
    assert stored["leaves"]["embed"] == {
        "type": "QTensor",
        "bits": 8,
        "pad": 0,
        "activations": "int8",
        "minimum": None,
    }
    assert stored["leaves"]["blocks/1/down"] == {"type": "Sparse", "pattern": [2, 4], "pad": 0}
    assert static_fields({"w": jnp.ones(2)})["leaves"] == {}


def test_arrays_and_stacking_do_not_matter(stored):
    shapes = jax.eval_shape(lambda params: params, PARAMS)
    for params in (PARAMS, shapes, tree.unstack(PARAMS), dict(reversed(PARAMS.items()))):
        check_fields(params, stored)
        assert static_fields(params) == stored


def test_a_changed_field_is_refused(stored):
    """Whatever it is; also such as fit the arrays and would give other weights."""
    for path, fields in stored["leaves"].items():
        for name in fields:
            changed = copy.deepcopy(stored)
            changed["leaves"][path][name] = 2
            with pytest.raises(
                InputError,
                match=r"^fields: the static fields .* have changed since they were written "
                r"\(leaves_sha256\)$",
            ):
                check_fields(PARAMS, changed)
            changed["leaves_sha256"] = digest(changed["leaves"])  # written so, for another tree
            with pytest.raises(
                InputError,
                match=rf'^fields: {path!r} was stored as {{.*"{name}": 2.*; the tree has {{.*}} '
                rf"there$",
            ):
                check_fields(PARAMS, changed)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {**PARAMS, "embed": jnp.ones((4, 16))},
            '\'embed\' was stored as {"type": "QTensor", .*; the tree has a plain array there',
        ),
        ({**PARAMS, "head": codes(8)}, "'head' was stored as a plain array; the tree has {"),
        (
            {"blocks": PARAMS["blocks"], "embd": jnp.ones(2)},
            "the compressed leaf 'embed' was stored, but the tree lacks it; .*embd",
        ),
        (
            {},
            "the compressed leaf 'embed' was stored, but the tree lacks it; nearest: none",
        ),
    ],
)
def test_another_tree_is_refused(params, message, stored):
    with pytest.raises(InputError, match=f"^fields: {message}"):
        check_fields(params, stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 is not supported; allowed: 1"),
        ({"leaves": None}, "leaves_sha256"),
        ({"leaves_sha256": None}, "sha256"),
    ],
)
def test_what_is_no_such_file_is_refused(change, message, stored):
    with pytest.raises(InputError, match=message):
        check_fields(PARAMS, {**stored, **change})
    with pytest.raises(InputError, match="format None is not supported"):
        check_fields(PARAMS, {})
