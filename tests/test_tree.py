"""Paths, segments, rules, partition, sizes and fingerprints of trees, against plain lists of
layers.
"""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor

# --------------------------------------------------------------------- layers as a list: the oracle


@functools.cache
def layer(kind: str, seed: int) -> dict:
    """One layer: kinds differ in shape, dtype, structure or static fields, so that no two of them
    can share a stack.
    """
    random = np.random.default_rng(seed)
    up = random.normal(size=(3 if kind == "wide" else 2, 4)).astype(
        "float16" if kind == "half" else "float32"
    )
    if kind == "int4":
        codes = random.integers(-8, 8, (2, 4))
        scale = np.ones((2, 1), np.float32)
        up = jax.device_get(
            QTensor.from_codes(jnp.asarray(codes, jnp.int32), jnp.asarray(scale), bits=4)
        )
    leaves = {"mlp": {"up": up}, "norm": random.normal(size=4).astype("float32")}
    return leaves | ({"bias": np.zeros(2, np.float32)} if kind == "bias" else {})


def segment(layers: list[dict]) -> dict:
    return layers[0] if len(layers) == 1 else jax.tree.map(lambda *a: np.stack(a), *layers)


def assemble(layers: list[dict], cuts: list[int]) -> dict:
    """The tree whose segments start at 0 and at every cut."""
    edges = [0, *cuts, len(layers)]
    blocks = {
        tree.segment_key(range(a, b)): segment(layers[a:b]) for a, b in itertools.pairwise(edges)
    }
    return {"embed": np.ones((5, 4), np.float32), "blocks": blocks}


def changes(values: list) -> list[int]:
    return [i for i in range(1, len(values)) if values[i] != values[i - 1]]


def same(a: dict, b: dict) -> bool:
    """Equal in paths, static fields, dtypes, shapes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


KINDS = st.lists(st.sampled_from(["plain", "wide", "half", "int4", "bias"]), min_size=1, max_size=5)
MORE = st.sets(st.integers(1, 4))


def segmented(kinds: list[str], more: set[int]) -> tuple[list[dict], list[int]]:
    """Layers of these kinds, and where segments start: wherever the kind changes and at some other
    places.
    """
    return [layer(kind, i) for i, kind in enumerate(kinds)], sorted(
        {*changes(kinds), *(i for i in more if i < len(kinds))}
    )


@settings(max_examples=40, deadline=None)
@given(KINDS, MORE)
def test_stack_and_unstack_are_inverse_and_keep_the_fingerprint(kinds, more):
    layers, cuts = segmented(kinds, more)
    given_tree = assemble(layers, cuts)
    whole = assemble(layers, changes(kinds))
    single = assemble(layers, list(range(1, len(layers))))
    assert same(tree.unstack(given_tree), single)
    assert same(tree.stack(given_tree), whole)
    assert same(tree.stack(tree.unstack(given_tree)), whole)
    assert tree.fingerprint(given_tree) == tree.fingerprint(whole) == tree.fingerprint(single)


@settings(max_examples=40, deadline=None)
@given(KINDS, MORE, st.data())
def test_split_cuts_exactly_where_values_change(kinds, more, data):
    layers, cuts = segmented(kinds, more)
    value = data.draw(st.lists(st.integers(0, 1), min_size=len(layers), max_size=len(layers)))
    given_tree = assemble(layers, cuts)
    values = {"embed": 0}
    for i, node in enumerate(layers):
        values |= {
            f"blocks/{i}/{name}": value[i] if name == "norm" else 0 for name in tree.flatten(node)
        }
    assert same(tree.split(given_tree, values), assemble(layers, sorted({*cuts, *changes(value)})))


# -------------------------------------------------------------------------------------------- paths


def test_flatten_orders_segments_by_depth_and_keeps_other_keys():
    params = {
        "z": 1,
        "blocks": {"10": {"q": 2}, "2-9": {"q": 3}, "0-1": {"q": 4}},
        "a": {"y": 5, "b": 6},
    }
    assert list(tree.flatten(params)) == [
        "z",
        "blocks/0-1/q",
        "blocks/2-9/q",
        "blocks/10/q",
        "a/y",
        "a/b",
    ]


PATHS = st.recursive(
    st.integers(), lambda t: st.dictionaries(st.sampled_from("abcd"), t, min_size=1, max_size=3)
)


@given(st.dictionaries(st.sampled_from("abcd"), PATHS, min_size=1))
def test_unflatten_is_the_inverse_of_flatten(params):
    flat = tree.flatten(params)
    assert tree.unflatten(flat) == params
    for path, leaf in flat.items():
        node = params
        for key in path.split("/"):
            node = node[key]
        assert node == leaf


def test_map_leaves_sees_paths():
    params = {"a": {"b": 1}, "blocks": {"0-1": {"c": 2}}}
    assert tree.map_leaves(lambda path, leaf: (path, leaf), params) == {
        "a": {"b": ("a/b", 1)},
        "blocks": {"0-1": {"c": ("blocks/0-1/c", 2)}},
    }


# ----------------------------------------------------------------------------------------- segments


@given(st.integers(0, 200), st.integers(1, 200))
def test_segment_key_and_span_are_inverse(start, length):
    layers = range(start, start + length)
    assert tree.span(tree.segment_key(layers)) == layers


@pytest.mark.parametrize("key", ["", "q", "0-", "-1", "0-1-2", "a0", "0a", " 0", "1.5", "norm0"])
def test_other_keys_are_no_segments(key):
    assert tree.span(key) is None
    assert tree.layer_paths(f"blocks/{key}/0-2") == [f"blocks/{key}/0-2"]
    assert list(tree.flatten({"blocks": {key: 1}})) == [f"blocks/{key}"]
    with pytest.raises(
        InputError,
        match=rf"^a/blocks: the key {re.escape(repr(key))} is not a segment .* allowed: "
        rf"such as '7', '3-5'$",
    ):
        tree.flatten({"a": {"blocks": {key: 1, "0": 1}}})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["1-2"], r"\['1-2'\] must cover the layers from 0 on without gap or overlap"),
        (["0-1", "3"], r"\['0-1', '3'\] must cover the layers from 0 on without gap or overlap"),
        (["norm"], r"\['norm'\] must cover the layers from 0 on without gap or overlap"),
        ([], r"\[\] must cover the layers from 0 on without gap or overlap"),
        (["2-3", "0-2"], "the segments '0-2' and '2-3' overlap"),
        (["0-4", "2"], "the segments '0-4' and '2' overlap"),
        (["0", "1-0"], "the key '1-0' is not a segment"),
        (["0", "1-1"], "the key '1-1' is not a segment"),
        (["0", "01"], "the key '01' is not a segment"),
    ],
)
def test_segments_must_cover_the_layers_once(keys, message):
    node = dict.fromkeys(keys, jnp.ones(1))
    with pytest.raises(InputError, match=message):
        tree.segments(node)
    if not keys:
        return
    if "without gap" in message:  # a part of a tree may have gaps
        assert list(tree.flatten({"blocks": node})) == [f"blocks/{key}" for key in keys]
        return
    for walk in (tree.flatten, tree.stack, tree.unstack, lambda params: tree.split(params, {})):
        with pytest.raises(InputError, match=message):
            walk({"blocks": node})


def test_segments_are_in_order_of_depth():
    node = {"10-11": 1, "0-8": 1, "9": 1}
    assert tree.segments(node) == ["0-8", "9", "10-11"]
    assert tree.depth(node) == 12


def test_layer_paths_and_shapes():
    assert tree.layer_paths("embed") == ["embed"]
    assert tree.layer_paths("blocks/7/attn/q") == ["blocks/7/attn/q"]
    assert tree.layer_paths("blocks/9-11/attn/q") == [f"blocks/{i}/attn/q" for i in (9, 10, 11)]
    stacked = ["blocks/0-7/q", "blocks/0-7", "a/blocks/0-7/b/q", "blocks/blocks/0-7"]
    single = [
        "embed",
        "blocks/7/q",
        "blocks/7",
        "blocks",
        "0-7/q",
        "experts/0-7/q",
        "myblocks/0-7/q",
        "blocks/a/0-7",
        "blocks/0/e/0-7",
    ]
    assert [path for path in stacked + single if tree.is_stacked(path)] == stacked
    assert [path for path in stacked + single if len(tree.layer_paths(path)) == 8] == stacked
    stack = jnp.zeros((3, 4, 5))
    assert tree.layer_shape("blocks/0-2/q", stack) == (4, 5)
    assert tree.layer_shape("blocks/0/q", stack) == (3, 4, 5)
    assert tree.layer_shape("experts/0-2/q", stack) == (3, 4, 5)


def test_stack_does_not_join_what_is_not_next_to_each_other():
    part = {
        "blocks": {"0": layer("plain", 0), "2": layer("plain", 2)}
    }  # as `partition` may leave it
    assert same(tree.stack(part), part)


# ----------------------------------------------- the law of segments, wherever in a tree they stand


def experts(i: int) -> dict:
    """A dict that is no stack, though its keys are numbers; not in their order, so that sorting
    would show.
    """
    return {str(e): {"up": np.full((2, 3), 100 * i + e, np.float32)} for e in (10, 2, 0)}


def grown(stacks: dict[str, list[dict]], cuts: dict[str, list[int]]) -> dict:
    """A tree with a stack of layers at each of these paths, and with dicts of numbers beside and
    inside of them.
    """
    leaves = {
        "embed": np.ones((5, 4), np.float32),
        **{f"router/{k}": leaf for k, leaf in tree.flatten(experts(0)).items()},
    }
    for where, layers in stacks.items():
        for a, b in itertools.pairwise([0, *cuts[where], len(layers)]):
            layer_leaves = tree.flatten(
                segment([{**one, "experts": experts(i)} for i, one in enumerate(layers[a:b], a)])
            )
            leaves |= {
                f"{where}/{tree.segment_key(range(a, b))}/{name}": leaf
                for name, leaf in layer_leaves.items()
            }
    return tree.unflatten(leaves)


STACKS = ("blocks", "encoder/blocks", "stages/0/blocks", "stages/1/blocks")


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(STACKS), st.tuples(KINDS, MORE), min_size=1), st.data())
def test_all_functions_agree_on_what_a_segment_is(chosen, data):
    if "encoder/blocks" in chosen and "blocks" in chosen:
        chosen = {**chosen, "decoder/blocks": chosen["encoder/blocks"]}
    stacks = {where: segmented(*of)[0] for where, of in chosen.items()}
    cuts = {where: segmented(*of)[1] for where, of in chosen.items()}
    params = grown(stacks, cuts)
    whole = grown(stacks, {where: changes(kinds) for where, (kinds, _) in chosen.items()})
    single = grown(stacks, {where: list(range(1, len(layers))) for where, layers in stacks.items()})

    paths = [layer for path in tree.flatten(params) for layer in tree.layer_paths(path)]
    assert set(paths) == set(tree.flatten(single)) and len(paths) == len(set(paths))
    assert not any(tree.is_stacked(path) for path in tree.flatten(single))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(single).items()}
    for path, leaf in tree.flatten(params).items():
        layers = tree.layer_paths(path)
        assert tree.is_stacked(path) == (len(layers) > 1)
        assert {tree.layer_shape(path, leaf)} == {shapes[layer] for layer in layers}
        assert leaf.shape == ((len(layers),) if len(layers) > 1 else ()) + shapes[layers[0]]

    assert same(tree.unstack(params), single)
    assert same(tree.stack(params), whole) and same(tree.stack(single), whole)
    assert tree.fingerprint(params) == tree.fingerprint(single)

    values = {path: data.draw(st.booleans()) if path.endswith("norm") else False for path in paths}
    want = {
        where: sorted(
            {*cuts[where], *changes([values[f"{where}/{i}/norm"] for i in range(len(layers))])}
        )
        for where, layers in stacks.items()
    }
    assert same(tree.split(params, values), grown(stacks, want))
    rules = [(tree.optional(re.escape(path)), True) for path, value in values.items() if value] + [
        (".*", False)
    ]
    parts = tree.partition(params, rules)
    assert {layer for path in tree.flatten(parts[0]) for layer in tree.layer_paths(path)} == {
        p for p in paths if values[p]
    }
    assert same(tree.stack(tree.combine(*parts)), whole)


def test_rules_reach_one_stack_of_two():
    params = grown(
        {
            f"{side}/blocks": [layer("plain", i) for i in range(3)]
            for side in ("encoder", "decoder")
        },
        {"encoder/blocks": [], "decoder/blocks": []},
    )
    split, values = tree.match(
        [("encoder/blocks/1/norm", 4), (r".*/experts/10/up", 2), (".*", 8)], params
    )
    assert (list(split["encoder"]["blocks"]), list(split["decoder"]["blocks"])) == (
        ["0", "1", "2"],
        ["0-2"],
    )
    assert [path for path, value in values.items() if value == 4] == ["encoder/blocks/1/norm"]
    assert len([path for path, value in values.items() if value == 2]) == 3 + 1


@pytest.mark.parametrize("path", ["blocks/0-1/blocks/0/q", "encoder/blocks/3/mlp/blocks/0-1/q"])
def test_blocks_inside_of_blocks_are_refused(path):
    params = tree.unflatten({path: jnp.ones((2, 2))})
    message = (
        rf"{path.removesuffix('/q')}(/q)?: blocks inside of blocks; allowed: one segment of "
        rf"layers in a path"
    )
    for refuses in (tree.flatten, tree.stack, tree.unstack, tree.fingerprint, tree.count):
        with pytest.raises(InputError, match=message):
            refuses(params)
    for refuses in (
        tree.layer_paths,
        tree.is_stacked,
        lambda path: tree.layer_shape(path, jnp.ones(2)),
    ):
        with pytest.raises(InputError, match=message):
            refuses(path)
    with pytest.raises(InputError, match=message):
        tree.split(params, {path: 0})


def test_a_dict_of_that_name_without_segments_is_one_like_any_other():
    pair = np.ones((2, 3), np.float32)
    params = {
        "blocks": {"0-1": {"blocks": {"b": pair, "a": pair}}, "2": {"q": np.ones(3, np.float32)}}
    }
    assert list(tree.flatten(params)) == [
        "blocks/0-1/blocks/b",
        "blocks/0-1/blocks/a",
        "blocks/2/q",
    ]
    assert tree.layer_paths("blocks/0-1/blocks/b") == ["blocks/0/blocks/b", "blocks/1/blocks/b"]
    assert same(tree.stack(tree.unstack(params)), params)


# -------------------------------------------------------------------------------------------- rules

TREE = {
    "embed": np.zeros((5, 4), np.float32),
    "blocks": {
        "0-3": {
            "attn": {"q": np.zeros((4, 2, 2), np.float32)},
            "norm": np.zeros((4, 2), np.float32),
        }
    },
    "head": np.zeros((5, 4), np.float32),
}
QS = [f"blocks/{i}/attn/q" for i in range(4)]
NORMS = [f"blocks/{i}/norm" for i in range(4)]


def test_the_first_rule_that_matches_wins():
    values = tree.assign([("blocks/0/.*", 1), (".*/q", 2), ("embed|head", 3), (".*", 4)], TREE)
    assert values == {
        **{path: 1 for path in (QS[0], NORMS[0])},
        **{path: 2 for path in QS[1:]},
        **{path: 4 for path in NORMS[1:]},
        "embed": 3,
        "head": 3,
    }


PATTERNS = ["embed", "head", *QS, *NORMS, ".*/q", ".*/norm", "blocks/[12]/.*", "blocks/.*"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PATTERNS), max_size=6))
def test_assign_against_a_loop(patterns):
    rules = [(tree.optional(p), i) for i, p in enumerate(patterns)] + [(".*", -1)]
    values = tree.assign(rules, TREE)
    for path in ("embed", "head", *QS, *NORMS):
        assert values[path] == next(
            value for pattern, value in rules if re.fullmatch(pattern, path)
        )


def test_match_splits_segments_and_names_the_new_leaves():
    params, values = tree.match([("blocks/[12]/attn/q", 4), (".*", 8)], TREE)
    assert values == {
        "embed": 8,
        "head": 8,
        **{f"blocks/{key}/attn/q": 4 if key == "1-2" else 8 for key in ("0", "1-2", "3")},
        **{f"blocks/{key}/norm": 8 for key in ("0", "1-2", "3")},
    }
    assert params["blocks"]["1-2"]["attn"]["q"].shape == (2, 2, 2)
    assert params["blocks"]["3"]["attn"]["q"].shape == (2, 2)
    assert same(tree.stack(params), TREE)


def test_a_pattern_must_match_the_whole_path():
    with pytest.raises(InputError, match="'embe'"):
        tree.assign([("embe", 1), (".*", 2)], TREE)


def test_a_leaf_that_no_rule_covers():
    with pytest.raises(InputError, match=r"no rule covers the leaf 'blocks/0/norm'.*'embed'"):
        tree.assign([("embed", 1), (".*/q", 2), ("head", 3)], TREE)
    with pytest.raises(InputError, match="rules: none"):
        tree.assign([], TREE)


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(
        InputError, match=r"'blocks/3/attn/query' matches no leaf; nearest: blocks/3/attn/q,"
    ):
        tree.assign([("blocks/3/attn/query", 1), (".*", 2)], TREE)


def test_a_rule_behind_others_that_match_all_of_its_leaves():
    with pytest.raises(InputError, match=r"'blocks/2/norm' decides nothing: earlier rules"):
        tree.assign([(".*/norm", 1), ("blocks/2/norm", 2), (".*", 3)], TREE)
    with pytest.raises(InputError, match=r"'embed' decides nothing"):
        tree.assign([(".*", 1), ("embed", 2)], TREE)


def test_optional_rules_and_the_closing_catch_all_may_decide_nothing():
    everything = [("embed|head", 1), ("blocks/.*", 2)]
    assert 3 not in tree.assign([*everything, (tree.optional("nothing"), 3)], TREE).values()
    assert 3 not in tree.assign([*everything, (tree.optional("blocks/0/.*"), 3)], TREE).values()
    assert 3 not in tree.assign([*everything, (".*", 3)], TREE).values()
    with pytest.raises(InputError, match=r"'\.\*' matches|'\.\*' decides"):
        tree.assign([*everything, (".*", 3), (".*", 4)], TREE)


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(InputError, match=r"'blocks/\(' is not a regular expression"):
        tree.assign([("blocks/(", 1)], TREE)


# ---------------------------------------------------------------------------------------- partition


@settings(max_examples=30, deadline=None)
@given(KINDS, MORE, st.data())
def test_partition_by_rules_and_combine_are_inverse(kinds, more, data):
    layers, cuts = segmented(kinds, more)
    trains = data.draw(st.lists(st.booleans(), min_size=len(layers), max_size=len(layers)))
    rules = [(tree.optional(f"blocks/{i}/norm"), True) for i, t in enumerate(trains) if t] + [
        (".*", False)
    ]
    first, second = tree.partition(assemble(layers, cuts), rules)
    assert {p for path in tree.flatten(first) for p in tree.layer_paths(path)} == {
        f"blocks/{i}/norm" for i, t in enumerate(trains) if t
    }
    assert not set(tree.flatten(first)) & set(tree.flatten(second))
    assert same(tree.stack(tree.combine(second, first)), assemble(layers, changes(kinds)))


def test_partition_without_rules_trains_plain_floating_arrays():
    params = {
        "w": jnp.ones(2),
        "half": jnp.ones(2, jnp.bfloat16),
        "count": jnp.ones(2, jnp.int32),
        "blocks": {"0": layer("int4", 0), "1": layer("plain", 1)},
    }
    first, second = tree.partition(params)
    assert set(tree.flatten(first)) == {
        "w",
        "half",
        "blocks/0/norm",
        "blocks/1/norm",
        "blocks/1/mlp/up",
    }
    assert set(tree.flatten(second)) == {"count", "blocks/0/mlp/up"}
    assert same(tree.combine(first, second), params)
    grads = jax.grad(
        lambda t: sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(t))
    )(first)
    assert set(tree.flatten(grads)) == set(tree.flatten(first))


def test_combine_refuses_a_leaf_twice():
    with pytest.raises(InputError, match="'a/b' is in two"):
        tree.combine({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}})


# ------------------------------------------------------------------------------ sizes, fingerprints


def test_sizes():
    params = assemble([layer("int4", 0), layer("int4", 1), layer("half", 2)], [2])
    assert tree.count(params) == 5 * 4 + 3 * (2 * 4 + 4)
    int4 = 2 * 4 // 2 + 2 * 4  # codes, a float32 scale for each row
    assert tree.nbytes(params) == 5 * 4 * 4 + 2 * int4 + 2 * 4 * 2 + 3 * 4 * 4
    assert tree.nbytes(params["blocks"]["0-1"]["mlp"]["up"]) == 2 * int4


def test_cast_leaves_integers_and_compressed_leaves():
    params = {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32), "blocks": {"0": layer("int4", 0)}}
    cast = tree.cast(params, jnp.bfloat16)
    assert cast["w"].dtype == cast["blocks"]["0"]["norm"].dtype == jnp.bfloat16
    assert cast["n"].dtype == jnp.int32
    assert cast["blocks"]["0"]["mlp"]["up"].scale.dtype == jnp.float32


def test_fingerprint_tells_trees_apart():
    base = {"a": np.zeros(4, np.float32), "b": layer("int4", 0)["mlp"]["up"]}
    variants = [
        base,
        {**base, "a": np.float32([0, 0, 0, -0.0])},
        {**base, "a": np.zeros(4, np.int32)},
        {**base, "a": np.zeros((2, 2), np.float32)},
        {"c": base["a"], "b": base["b"]},
        {**base, "b": QTensor(base["b"].packed, base["b"].scale, bits=4, activations="int8")},
        {**base, "b": QTensor(base["b"].packed, base["b"].scale, bits=2)},
    ]
    prints = [tree.fingerprint(params) for params in variants]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{64}", p) for p in prints)
    assert tree.fingerprint(dict(reversed(base.items()))) == prints[0]
    assert tree.fingerprint(jax.tree.map(jnp.asarray, base)) == prints[0]
