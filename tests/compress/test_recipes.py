"""`Recipe`: one value that says everything, and what is refused in its place."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jaxmodel import compress, tree
from jaxmodel.compress import Magnitude, Recipe, Rtn
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle
from jaxmodel.leaves import QTensor
from jaxmodel.models import gpt2, t5

MODEL = gpt2.model(gpt2.SIZES["tiny"])
BY_WEIGHTS = [name for name, recipe in compress.RECIPES.items() if not recipe.needs]
WEIGHT = {"w": jnp.arange(16, dtype=jnp.float32).reshape(2, 8)}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle(MODEL, jax.jit(MODEL.init)(jax.random.key(0)), None, {"name": "tiny"})


# ------------------------------------------------------------------------------- what a recipe says


def test_named_takes_names_and_chains():
    assert compress.get_recipe("int4") is compress.RECIPES["int4"]
    assert all(recipe.name == name for name, recipe in compress.RECIPES.items())
    text = compress.get_recipe("rtn(bits=3)")
    assert (
        text.rules[-1][1].matrices == (Rtn(3),)
        and text.compute is None
        and text.name == "rtn(bits=3)"
    )
    with pytest.raises(
        InputError, match=r"recipe: 'int5' is not known; allowed: .*nearest: int8, int4.*"
    ):
        compress.get_recipe("int5")


def test_where_all_contractions_are_int8_the_rest_is_bfloat16():
    for recipe in compress.RECIPES.values():
        assert (recipe.compute == "bfloat16") == ("activations='int8'" in recipe.texts()[0][1])
    assert [name for name, recipe in compress.RECIPES.items() if recipe.compute] == [
        "int8",
        "sparse50-int8",
    ]


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_a_bundle_is_what_its_recipe_says(name, bundle):
    recipe = compress.get_recipe(name)
    smaller, report = compress.compress_bundle(bundle, recipe)
    params, alone = compress.apply(recipe, bundle.params, axes=bundle.model.axes)
    assert tree.fingerprint(smaller.params) == tree.fingerprint(params) and report == alone
    assert smaller.model.policy.compute_dtype == (recipe.compute or "float32")
    assert smaller.model is recipe.adapt(bundle.model)
    assert smaller.card == {
        "name": "tiny",
        "recipe": name,
        "bits_per_weight": report.bits_per_weight,
    }


def test_the_dtype_does_not_hang_on_a_name(bundle):
    """The same rules under another name, or none, compute as they say and not as a name does."""
    rules = compress.RECIPES["int8"].rules
    mine, _ = compress.compress_bundle(bundle, Recipe(rules, compute="float16", name="int8"))
    assert (mine.model.policy.compute_dtype, mine.card["recipe"]) == (
        "float16",
        {"base": "int8", "compute": "float16"},
    )
    bare, _ = compress.compress_bundle(bundle, rules)
    assert bare.model is bundle.model
    called, _ = compress.compress_bundle(bundle, rules, "mine")
    assert (called.model.policy.compute_dtype, called.card["recipe"]["name"]) == ("float32", "mine")


def test_adapt_changes_nothing_else_of_the_policy(bundle):
    policy = dataclasses.replace(MODEL.policy, remat="full", activation_dtype="bfloat16")
    adapted = compress.RECIPES["int8"].adapt(MODEL.with_policy(policy))
    assert adapted.policy == dataclasses.replace(policy, compute_dtype="bfloat16")


def test_without_a_name_the_card_says_the_rules(bundle):
    smaller, _ = compress.compress_bundle(
        bundle, [("embed", "rtn(4)"), (".*/up", (Magnitude(0.5), Rtn(8))), (".*", ())]
    )
    want = {"embed": "rtn(bits=4)", ".*/up": "magnitude(fraction=0.5) | rtn(bits=8)", ".*": ""}
    assert json.loads(json.dumps(smaller.card["recipe"])) == {"rules": want}


def test_rules_alone_and_texts_are_recipes():
    """A `Recipe`, its rules, and chains as tuples, lists or text all do the same."""
    chain = (Magnitude(0.5), Rtn(8))
    recipe = Recipe((("w", chain),))
    same = [
        recipe.rules,
        [("w", chain)],
        [("w", list(chain))],
        [("w", "magnitude(0.5) | rtn(bits=8)")],
    ]
    want = tree.fingerprint(compress.apply(recipe, WEIGHT)[0])
    for rules in same:
        assert Recipe(rules) == recipe and hash(Recipe(rules)) == hash(recipe)
        assert tree.fingerprint(compress.apply(rules, WEIGHT)[0]) == want
    for nothing in ("", (), []):
        assert compress.apply([("w", nothing)], WEIGHT)[0]["w"] is WEIGHT["w"]


def test_an_optional_pattern_stays_optional():
    rules = [(tree.optional("head"), "rtn()"), ("w", ())]
    assert compress.apply(Recipe(rules), WEIGHT)[0]["w"] is WEIGHT["w"]


# ---------------------------------------------------------------------------------- what is refused

# not in the test's process: there beartype refuses what is of another type than the annotation says
MISTAKES = """
    import jax.numpy as jnp
    from jaxmodel.compress import Recipe, Rtn, apply
    from jaxmodel.errors import InputError

    for recipe in (
        "int8",
        {"w": (Rtn(8),)},
        None,
        Rtn(8),
        ["w"],
        [("w", (), 3)],
        [(3, ())],
        [["w", "rtn(4)"]],
    ):
        for use in (Recipe, lambda recipe: apply(recipe, {"w": jnp.ones((2, 8))})):
            try:
                use(recipe)
                print("taken")
            except InputError as error:
                print(error)
"""


def test_what_is_no_list_of_rules_is_refused_in_one_line(devices8):
    allowed = (
        "allowed: a Recipe, or a list of pairs (pattern, chain); compress.get_recipe finds one "
        "by its name"
    )
    method = "Rtn(bits=8, group=None, symmetric=True, activations=None, "
    method += "scale_dtype=None, range='absmax')"
    given = ["'int8'", f"{{'w': ({method},)}}", "None", method]
    pairs = ["'w'", "('w', (), 3)", "(3, ())"]
    want = [f"recipe: {what} is given; {allowed}" for what in given]
    want += [f"recipe: {what} is not a pair (pattern, chain); {allowed}" for what in pairs]
    want += ["taken"]  # a list, as JSON has it, is a pair too
    assert devices8(MISTAKES).splitlines() == [line for line in want for _ in range(2)]


ALLOWED = r"allowed: a tuple of methods, or text such as 'magnitude\(0.5\) \| rtn\(bits=8\)'"


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ([("w", Rtn(8))], rf"recipe: the rule 'w' gives the method rtn\(bits=8\) alone; {ALLOWED}"),
        (
            [("w", Rtn)],
            rf"recipe: the rule 'w' gives <class .*Rtn'>, which is not a chain; {ALLOWED}",
        ),
        ([("w", None)], rf"recipe: the rule 'w' gives None, which is not a chain; {ALLOWED}"),
        ([("w", 8)], rf"recipe: the rule 'w' gives 8, which is not a chain; {ALLOWED}"),
        (
            [("w", (Rtn(8), "rtn()"))],
            rf"recipe: the rule 'w' gives a chain with 'rtn\(\)', which is not a method; {ALLOWED}",
        ),
        (
            [("w", (Magnitude,))],
            rf"recipe: the rule 'w' gives a chain with <class .*Magnitude'>, which is not a "
            rf"method; {ALLOWED}",
        ),
        ([("w", ((Rtn(8),),))], r"gives a chain with \(Rtn\(.*\),\), which is not a method"),
        (
            [("w", "rtm(4)")],
            r"recipe: the rule 'w': method: 'rtm' is not known; allowed: .*nearest: rtn",
        ),
        ([("w", "rtn(4")], r"recipe: the rule 'w': method: 'rtn\(4' cannot be read"),
        (
            [("w", "rtn(bits=9)")],
            r"recipe: the rule 'w': rtn: bits is 9; allowed: a whole number of 1 to 8",
        ),
        ([("x", Rtn(8)), ("w", ())], r"the rule 'x' gives the method"),
    ],
)
def test_what_is_no_chain_is_refused_in_one_line(recipe, says, bundle):
    for use in (
        Recipe,
        lambda recipe: compress.apply(recipe, WEIGHT),
        lambda recipe: compress.compress_bundle(bundle, recipe),
    ):
        with pytest.raises(InputError, match=says) as error:
            use(recipe)
        assert "\n" not in str(error.value)


def test_a_dtype_that_there_is_not():
    with pytest.raises(
        InputError, match="compute_dtype: 'int8' is not known; allowed: bfloat16, float16, float32"
    ):
        Recipe((), compute="int8")


def test_encoders_and_cross_attention_get_smaller_too():
    """A T5: the encoder's branch, the keys and values of the memory, the table; norms stay as they
    are.
    """
    model = t5.model(t5.SIZES["tiny"])
    params = jax.jit(model.init)(jax.random.key(0))
    smaller, _ = compress.apply(compress.get_recipe("int8-weight"), params, axes=model.axes)
    for path, leaf in tree.flatten(smaller).items():
        assert isinstance(leaf, QTensor) == (leaf.ndim - tree.is_stacked(path) == 2), path
