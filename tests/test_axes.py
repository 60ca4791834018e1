"""Axes of leaves: how they are written, what follows from them, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import axes, tree
from jaxmodel.axes import Axes, Member
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2

P = jax.P


@pytest.mark.parametrize(
    ("text", "letters", "role"),
    [
        ("FD", [["F"], ["D"]], "matrix"),
        ("D", [["D"]], "vector"),
        ("", [], "vector"),
        ("(KGh)D", [["KGh"], ["D"]], "matrix"),
        ("E(KGh)", [["E"], ["KGh"]], "vector"),
        ("EFD", [["E"], ["F"], ["D"]], "experts"),
        ("EF", [["E"], ["F"]], "vector"),
        ("ED router", [["E"], ["D"]], "router"),
        ("VD table", [["V"], ["D"]], "table"),
        ("VD", [["V"], ["D"]], "head"),
        ("cF0", [["c"], ["F0"]], "head"),
        ("C12 measured", [["C12"]], "measured"),
    ],
)
def test_letters_are_read_as_they_are_written(text, letters, role):
    found = axes.read(text)
    assert [["".join(product) for product in axis] for axis in found.axes] == letters
    assert found.role == role
    assert str(found) == text.split(" ")[0]


def test_parts_of_a_concatenation_stand_one_behind_the_other():
    declared = Axes(
        (("wide", "[C0+C1]"), ("up", "F[C0+(Gh)]"), ("one", "C0"), ("two", "C1")), (("h", 2),)
    )
    params = {
        "wide": jnp.arange(5),
        "up": jnp.arange(24).reshape(3, 8),
        "one": jnp.arange(2),
        "two": jnp.arange(3),
    }
    known = axes.groups(declared, params)
    assert known["C1"].members == (Member("wide", 0, 2, 1, 1), Member("two", 0, 0, 1, 1))
    assert (known["G"].size, known["G"].members) == (3, (Member("up", 1, 2, 1, 2),))
    got = axes.select(declared, params, {"C0": jnp.array([1]), "G": jnp.array([2, 0])})
    np.testing.assert_array_equal(got["wide"], [1, 2, 3, 4])
    np.testing.assert_array_equal(got["up"][0], [1, 6, 7, 2, 3])


def test_units_that_share_an_axis_are_parted_by_the_sizes_that_shapes_tell():
    """Eight heads of three in four groups: by hand, with numpy's own reshape."""
    declared = Axes(
        (("blocks/.*/q", "(KGh)D"), ("blocks/.*/k", "(Kh)D"), ("blocks/.*/o", "D(KGh)")),
        (("h", 3),),
    )
    q = np.arange(48.0).reshape(24, 2)
    k = np.arange(24.0).reshape(12, 2)
    o = np.arange(48.0).reshape(2, 24)
    params = {"blocks": {"0": {"q": jnp.asarray(q), "k": jnp.asarray(k), "o": jnp.asarray(o)}}}
    known = axes.groups(declared, params)
    assert {name: group.size for name, group in known.items()} == {
        **{"blocks/0/K": 4, "blocks/0/G": 2, "blocks/0/h": 3},
        "D": 2,
    }
    got = axes.select(
        declared, params, {"blocks/0/K": jnp.array([3, 0]), "blocks/0/G": jnp.array([1])}
    )["blocks"]["0"]
    np.testing.assert_array_equal(got["q"], q.reshape(4, 2, 3, 2)[[3, 0]][:, [1]].reshape(6, 2))
    np.testing.assert_array_equal(got["k"], k.reshape(4, 3, 2)[[3, 0]].reshape(6, 2))
    np.testing.assert_array_equal(
        got["o"], o.reshape(2, 4, 2, 3)[:, [3, 0]][:, :, [1]].reshape(2, 6)
    )


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("VD", P("tensor", "fsdp")),
        ("D(KGh)", P("fsdp", "tensor")),
        ("EFD", P("expert", "tensor", "fsdp")),
        ("F2F1", P("tensor", "fsdp")),  # the second of two alike finds the first one's axis taken
        ("cF", P(None, "tensor")),
        ("F", P("tensor")),
        ("D", P()),  # a vector
        ("ED", P("expert", "fsdp")),
        ("(gC3)[C0+C1]", P("tensor", "fsdp")),
        ("__", P()),
    ],
)
def test_where_a_leaf_lies_follows_from_its_letters(text, spec):
    assert axes.specs(Axes(((".*", text),))) == ((".*", spec),)


def test_an_exception_lies_as_it_says():
    assert axes.specs(Axes((("router", "ED", P(None, "fsdp")),))) == (("router", P(None, "fsdp")),)


def test_a_leaf_of_which_nothing_is_said_has_its_role_by_its_shape():
    declared = Axes((("up", "FD"), (".*", "...")))
    kernel = jnp.ones((2, 3))
    params = {
        "up": kernel,
        "kernel": kernel,
        "bias": kernel,
        "embedding": kernel,
        "lm_head": kernel,
    }
    params |= {
        "LayerNorm_0": {"scale": kernel},
        "cls": jnp.ones((1, 1, 3)),
        "state": {"mean": kernel},
    }
    matrices = {"up": "matrix", "kernel": "matrix", "embedding": "table", "lm_head": "head"}
    vectors = dict.fromkeys(("bias", "LayerNorm_0/scale", "cls"), "vector")
    assert axes.roles(declared, params) == {**matrices, **vectors, "state/mean": "measured"}
    assert set(axes.groups(declared, params)) == {"F", "D"}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Axes((("q", "(KD"),)), r"axes: '\(KD' cannot be read; write them as 'FD'"),
        (lambda: Axes((("q", "FD tabel"),)), "axes: 'FD tabel' cannot be read"),
        (lambda: Axes((("q", "F  D"),)), "cannot be read"),
        (
            lambda: axes.roles(Axes((("up", "FD"),)), {"up": jnp.ones(3)}),
            r"the leaf 'up' has the shape \[3\] but the axes 'FD'",
        ),
        (
            lambda: axes.roles(Axes((("up", "F"),)), {"up": jnp.ones(3), "in": jnp.ones(3)}),
            "axes: no rule covers the leaf 'in'",
        ),
        (
            lambda: axes.assign(
                Axes((("blocks/.*/up", "FD"), ("blocks/.*/down", "FD"))),
                {"blocks": {"0-1": {"up": jnp.ones((2, 6, 3)), "down": jnp.ones((2, 3, 6))}}},
            ),
            "an axis of 'blocks/0/down' has the length 3, which does not fit blocks/0/F = 6 "
            r"\(blocks/0/up\)",
        ),
        (
            lambda: axes.groups(
                Axes((("a", "D"), ("b", "D"))), {"a": jnp.ones(3), "b": jnp.ones(4)}
            ),
            r"an axis of 'b' has the length 4, which does not fit D = 3 \(a\)",
        ),
        (
            lambda: axes.groups(
                Axes((("a", "(Kh)D"), ("b", "D"))), {"a": jnp.ones((6, 3)), "b": jnp.ones(3)}
            ),
            "no leaf determines how 6 of 'a' is split into K, h; give their sizes",
        ),
        (
            lambda: axes.groups(Axes((("a", "(Kh)"),), (("h", 4),)), {"a": jnp.ones(6)}),
            r"an axis of 'a' has the length 6, which does not fit K = 1",
        ),
        (
            lambda: axes.select(Axes((("a", "D"),)), {"a": jnp.ones(6)}, {"F": jnp.arange(2)}),
            "units: 'F' given; allowed: D",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(run, message):
    with pytest.raises(InputError, match=message) as error:
        run()
    assert "\n" not in str(error.value)


def test_layers_may_be_of_different_widths():
    declared = Axes((("blocks/.*/up", "FD"), ("blocks/.*/down", "DF")))
    layer = lambda n: {"up": jnp.ones((n, 2)), "down": jnp.ones((2, n))}
    known = axes.groups(declared, {"blocks": {"0": layer(4), "1": layer(6)}})
    assert {name: group.size for name, group in known.items()} == {
        "D": 2,
        "blocks/0/F": 4,
        "blocks/1/F": 6,
    }


def test_a_model_inside_of_another_keeps_its_own_sets():
    inner = Axes(
        (("up", "FD"), ("head/c", "F0D"), (tree.optional("norm"), "D")),
        (("h", 4),),
        ordered=("V", "F0"),
    )
    outer = inner.under("image", 3)
    assert outer.rules == (
        ("image/(?:up)", "FD3"),
        ("image/(?:head/c)", "F4D3"),
        ("image/(?:norm)", "D3"),
    )
    assert isinstance(outer.rules[2][0], tree.optional)
    assert (outer.sizes, outer.highest) == ((("h3", 4),), 4)
    assert outer.ordered == ("V3", "F4")


def test_a_model_may_say_only_where_its_leaves_lie():
    known = gpt2.model(gpt2.SIZES["tiny"])
    made = subprocess.run(
        [sys.executable, "-c", PLACED], capture_output=True, text=True, check=False
    )  # unchecked by beartype
    assert made.stdout == f"{axes.specs(Axes((('.*', '...', P('tensor')),)))}\n", made.stderr
    assert known.rules == axes.specs(known.axes)


PLACED = """
import dataclasses, jax
from jaxmodel.models import gpt2
print(dataclasses.replace(gpt2.model(gpt2.SIZES["tiny"]), axes=[(".*", jax.P("tensor"))]).rules)
"""
