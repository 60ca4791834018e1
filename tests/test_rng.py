"""Named random streams: names that are literals in the package never share a number by accident."""

from __future__ import annotations

import ast
import collections
import pathlib
import zlib

import jax
import jax.numpy as jnp

import jaxmodel
from jaxmodel.rng import fold, number


def literals() -> dict[str, list[str]]:
    """Name -> the functions that give it to `fold`, or to a function that does so."""
    found = collections.defaultdict(set)
    root = pathlib.Path(jaxmodel.__path__[0])
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                last = node.args[-1] if node.args else None
                named = node.func.id in ("fold", "_key") and isinstance(last, ast.Constant)
                if named and isinstance(last.value, str):
                    found[last.value].add(str(path.relative_to(root)))
    return {name: sorted(places) for name, places in found.items()}


def test_each_name_stands_in_one_file():
    found = literals()
    assert {"augment", "round", "embed", "head", "micro-batch"} <= set(found)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_no_name_has_the_number_of_another_or_of_a_layer():
    numbers = {name: number(name) for name in literals()}
    assert len(set(numbers.values())) == len(numbers)
    assert min(numbers.values()) > 2**20  # layers, rows and micro-batches fold in their index


def test_a_stream_is_the_key_with_the_crc_of_its_name_folded_in():
    key = jax.random.key(3)
    want = jax.random.fold_in(key, zlib.crc32(b"augment"))
    assert jnp.array_equal(jax.random.key_data(fold(key, "augment")), jax.random.key_data(want))
