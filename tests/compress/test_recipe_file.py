"""Recipes in files: the same leaves as by the recipe in Python, again from the bundle's card, and
one line for what is wrong.
"""

from __future__ import annotations

import json
import re

import jax
import pytest

from jaxmodel import compress, hub, tree
from jaxmodel.compress import Recipe
from jaxmodel.compress.recipe_file import from_record, to_record
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2

MODEL = gpt2.model(gpt2.SIZES["tiny"])
YAML = """
base: int4-rtn  # what the rules leave
rules:
  blocks/0/.*/(up|down): magnitude(0.5) | rtn(bits=8)
  ?nowhere: rtn(bits=2)
  blocks/.*/up: "rtn(bits=6)"
  embed: ""
compute: float16
name: mixed
"""
RULES = [
    ("blocks/0/.*/(up|down)", "magnitude(0.5) | rtn(bits=8)"),
    (tree.optional("nowhere"), "rtn(bits=2)"),
]
RULES += [("blocks/.*/up", "rtn(bits=6)"), ("embed", "")]
IN_PYTHON = Recipe((*RULES, *compress.RECIPES["int4-rtn"].rules), "float16", "mixed")


@pytest.fixture(scope="module")
def bundle():
    return hub.Bundle(MODEL, jax.jit(MODEL.init)(jax.random.key(0)), None, {"name": "tiny"})


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.YAML", "a.json"])
def test_a_file_says_what_python_says(name, bundle, tmp_path):
    rules = {f"?{p}" if p == "nowhere" else p: c for p, c in RULES}
    as_json = {"base": "int4-rtn", "rules": rules}
    text = (
        json.dumps(as_json | {"compute": "float16", "name": "mixed"})
        if name.endswith("json")
        else YAML
    )
    recipe = compress.read_recipe(write(tmp_path, name, text))
    assert recipe == IN_PYTHON
    mine, wanted = (
        compress.apply(one, bundle.params, axes=bundle.model.axes)[0] for one in (recipe, IN_PYTHON)
    )
    assert tree.fingerprint(mine) == tree.fingerprint(wanted)


@pytest.mark.parametrize(
    "recipe",
    [
        IN_PYTHON,
        *compress.RECIPES.values(),
        compress.get_recipe("magnitude(0.5) | rtn(bits=4, group=8)"),
        Recipe([("embed", "rtn(bits=4)"), (".*", "")]),
        Recipe(compress.RECIPES["int8"].rules),  # computes as before, which the name would not say
        Recipe((("head", "rtn(bits=3)"), *compress.get_recipe("rtn(bits=5)").rules), name="mine"),
    ],
    ids=lambda recipe: recipe.name or "no name",
)
def test_what_the_card_says_is_the_recipe_again(recipe):
    said = json.loads(json.dumps(to_record(recipe)))
    again = from_record(said)
    assert again == recipe and to_record(again) == said
    kinds = [[type(part) for part in rule] for rule in recipe.rules]
    assert [
        [type(part) for part in rule] for rule in again.rules
    ] == kinds  # what is optional stays so


def test_a_bundle_is_a_recipe(bundle, tmp_path):
    smaller, _ = compress.compress_bundle(bundle, IN_PYTHON)
    smaller.save_pretrained(tmp_path / "small")
    again, _ = compress.compress_bundle(bundle, compress.read_recipe(tmp_path / "small"))
    assert (
        tree.fingerprint(again.params) == tree.fingerprint(smaller.params)
        and again.card == smaller.card
    )
    named, _ = compress.compress_bundle(bundle, compress.get_recipe("int4-rtn"))
    named.save_pretrained(tmp_path / "named")
    assert (
        named.card["recipe"] == "int4-rtn"
        and compress.read_recipe(tmp_path / "named") == compress.RECIPES["int4-rtn"]
    )
    bundle.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        InputError, match="was not made by a recipe; allowed: a bundle that `compress` made"
    ):
        compress.read_recipe(tmp_path / "plain")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: int5", "recipe: 'int5' is not known; allowed: int4, .*nearest: int8, int4"),
        ("rules: {a: rtm(4)}", "the rule 'a': method: 'rtm' is not known; allowed: .*nearest: rtn"),
        ("rules: {a: rtn(bitz=4)}", r"'rtn\(bitz=4\)': rtn takes the settings bits, group, "),
        ("rules: {a: rtn(4}", r"'rtn\(4' cannot be read; write it as"),
        ("rules: {a: 4}", "rules.a is 4; allowed: a text"),
        ("rules: {4: rtn(4)}", "line 1: the key 4 is not a string; quote it"),
        ("rules: [a]", r'rules is \["a"\]; allowed: an object'),
        ("rules: {'(a': rtn(4)}", r"the rule '\(a' is not a regular expression"),
        ("rules:\n  a: rtn(4)\n  a: rtn(5)", "line 3: the key 'a' is repeated"),
        (
            "rule: {a: rtn(4)}",
            "'rule' is not known; allowed: base, compute, name, rules, transforms .nearest: rules",
        ),
        ("base: int4\ncompute: int7", "'int7' given|int7"),
        ("", "its content is null; allowed: an object"),
        ("{}", "neither base nor rules given"),
        ("name: x", "neither base nor rules given"),
        ("int4", 'its content is "int4"; allowed: an object'),
        ("rules: {a: rtn(4)", "not YAML: .* in line"),
        ("base: int4\n\tname: x", "not YAML: .* in line 2"),
        ("base: &x int4", "line 1 has an anchor or an alias; allowed: plain YAML"),
        ("base: *x", "line 1 has an anchor or an alias"),
        (
            "base: !!python/object/apply:os.system [true]",
            "not YAML: could not determine a constructor",
        ),
        ("a: " + "[" * 30 + "]" * 30, "nested too deeply"),
        ("a: " + "9" * 5000, "not YAML|not known"),
        ("--- {base: int4}\n--- {base: int8}", "not YAML: but found another document"),
        ("base: int\x00", "not YAML: "),
        ("x" * 70_000, "larger than 65,536 bytes"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_file(text, says, tmp_path):
    with pytest.raises(InputError) as told:
        compress.read_recipe(write(tmp_path, "mine.yaml", text))
    assert re.search(says, str(told.value)) and "mine.yaml: " in str(told.value), told.value
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_what_is_no_file(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"base: \xe9")
    for name, says in {
        "no.yaml": "there is no file",
        "no.json": "'no.json' is missing",
        "latin.yaml": "not YAML",
    }.items():
        with pytest.raises(InputError, match=says):
            compress.read_recipe(tmp_path / name)
