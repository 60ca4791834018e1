"""Statistics of whole models against a forward pass in plain NumPy, and their way to the leaves of
a recipe.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, ops, tree
from jaxmodel.axes import Axes
from jaxmodel.compress import Rtn
from jaxmodel.errors import InputError
from jaxmodel.models import Model, Parts, bert, llama, mlp, t5
from jaxmodel.models.model import token_inputs
from jaxmodel.ops.norms import on_last

V = 16
D = 6
F = 8
E = 3
L = 5
DRAWN = np.random.default_rng(1).integers(0, V, (2, 7), np.int32)
BATCHES = [jnp.asarray(DRAWN), jnp.asarray(DRAWN[:, ::-1])]
STATISTICS = ("gram", "square", "histogram")


# --------------------------------------------- a model of experts and convolutions, and it in NumPy


def normal(*shape: int, seed: int) -> np.ndarray:
    """NumPy, of which splitting and stacking compile nothing."""
    return (np.random.default_rng(seed).normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)


def init(key: jax.Array) -> tree.Params:
    block = {
        "bias": normal(L, D, seed=2),
        "conv": normal(L, D, 3 * D, seed=3),
        "router": normal(L, E, D, seed=4),
        "experts": {"up": normal(L, E, F, D, seed=5), "down": normal(L, E, D, F, seed=6)},
    }
    return {
        "embed": normal(V, D, seed=0),
        "blocks": {f"0-{L - 1}": block},
        "head": normal(V, D, seed=1),
    }


def block(p, x, context, cache=None, layer=0, rng=None, train=False):
    x = x + ops.conv(x[:, :, None], p["conv"], kernel=(3, 1))[:, :, 0] + on_last(p["bias"], 3)
    gate = jax.nn.softmax(ops.einsum("BTD,ED->BTE", x, p["router"]))
    routed = jnp.einsum("bte,btd->ebtd", gate, x, precision="highest").reshape(E, -1, D)
    inner = 0.9 * jnp.tanh(
        ops.einsum("END,EFD->ENF", routed, p["experts"]["up"])
    )  # 1 would be the edge of a bin
    y = ops.einsum("ENF,EDF->END", inner, p["experts"]["down"])
    return x + jnp.sum(y, axis=0).reshape(x.shape), cache, {}


PARTS = Parts(
    embed=lambda params, inputs, *_: (ops.embed(params["embed"], inputs["tokens"]), {}),
    block=block,
    head=lambda params, x, *_: ops.einsum("BTD,VD->BTV", x, params["head"]),
)
AXES = Axes(
    (
        ("embed|head", "VD"),
        ("blocks/.*/bias", "D"),
        ("blocks/.*/conv", "D_"),
        ("blocks/.*/router", "ED"),
        ("blocks/.*/up", "EFD"),
        ("blocks/.*/down", "EDF"),
    )
)
MODEL = Model(None, ops.Policy(), init, PARTS, token_inputs, None, AXES)
PARAMS = init(jax.random.key(0))
ROUTERS = PARAMS["blocks"][f"0-{L - 1}"]["router"]
MATRICES = ("conv", "router", "experts/up", "experts/down")


def inputs_by_hand(tokens: jax.Array) -> dict[str, np.ndarray]:
    """What flows into each matrix `[..., rows, in]`, by layer path, in NumPy."""
    at = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in tree.flatten(PARAMS["blocks"][f"0-{L - 1}"]).items()
    }
    x = np.asarray(PARAMS["embed"], np.float64)[np.asarray(tokens)]
    found = {}
    for i in range(L):
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
        patches = np.stack([padded[:, k : k + x.shape[1]] for k in range(3)], -1).reshape(-1, 3 * D)
        x = x + (patches @ at["conv"][i].T).reshape(x.shape) + at["bias"][i]
        flat = x.reshape(-1, D)
        score = np.exp(flat @ at["router"][i].T)
        routed = (score / score.sum(-1, keepdims=True)).T[..., None] * flat
        inner = 0.9 * np.tanh(np.stack([routed[e] @ at["experts/up"][i, e].T for e in range(E)]))
        x = x + sum(inner[e] @ at["experts/down"][i, e].T for e in range(E)).reshape(x.shape)
        for name, into in zip(MATRICES, (patches, flat, routed, inner), strict=True):
            found[f"blocks/{i}/{name}"] = into
    return {**found, "head": x.reshape(-1, D)}


def by_hand() -> dict[str, dict[str, np.ndarray]]:
    """The documented statistics of every layer's matrices over the batches."""

    def of(rows: np.ndarray) -> dict[str, np.ndarray]:
        if rows.ndim > 2:
            each = [of(matrix) for matrix in rows]
            return {name: np.stack([one[name] for one in each]) for name in each[0]}
        edges = 2.0 ** (-24 + 0.5 * np.arange(65))
        counts = np.histogram(np.clip(np.abs(rows), edges[0], edges[-1] * (1 - 1e-9)), edges)[0]
        return {
            "count": np.float64(len(rows)),
            "square": (rows**2).sum(0),
            "gram": rows.T @ rows,
            "histogram": counts,
        }

    every = [inputs_by_hand(tokens) for tokens in BATCHES]
    return {
        path: of(np.concatenate([inputs[path] for inputs in every], axis=-2)) for path in every[0]
    }


WANT = by_hand()
DECODE = jax.jit(lambda leaf: leaf.decode())


def segmented(*starts: int) -> tree.Params:
    """The params with segments that start at these layers."""
    layers = {layer: layer for path in tree.flatten(PARAMS) for layer in tree.layer_paths(path)}
    part = {
        layer: sum(int(layer.split("/")[1]) >= s for s in starts) if "/" in layer else 0
        for layer in layers
    }
    return tree.split(PARAMS, part)


@functools.cache
def observed(*starts: int) -> dict:
    """What is measured of the params in these segments."""
    return compress.observe(MODEL, segmented(*starts), BATCHES, "blocks/.*")


def close(got, want, **message) -> None:
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, **message)


@pytest.mark.parametrize("starts", [(), (2,), (1, 2, 3, 4)], ids=["together", "two parts", "apart"])
def test_every_matrix_of_every_expert_and_layer_is_measured(starts):
    """Leaves `[L, E, out, in]`, `[E, out, in]`, `[L, out, in]` and `[out, in]`; no vectors, stacked
    (`[L, D]`) or not.
    """
    stats = compress.observe(MODEL, segmented(*starts), BATCHES, statistics=STATISTICS)
    measured = {layer for path in stats for layer in tree.layer_paths(path)}
    assert measured == {*WANT, "embed"}
    for path, found in stats.items():
        layers = tree.layer_paths(path)
        for i, layer in enumerate(layers):
            one = {name: a[i] if len(layers) > 1 else a for name, a in found.items()}
            assert one["gram"].shape[:-2] == ((E,) if "experts" in path else ())
            if layer != "embed":
                close(one, WANT[layer], err_msg=layer)
    assert (float(stats["embed"]["taken"]), float(stats["embed"]["count"])) == (2 * DRAWN.size, 0)


def test_compressed_experts_are_measured_as_they_run():
    """Codes that stand for the same weights see the same inputs."""
    grid = lambda path, leaf: (
        np.round(leaf * 63) / 63 if path.split("/")[-1] in ("up", "down") else leaf
    )
    plain = tree.map_leaves(grid, PARAMS)
    exact = lambda path, leaf: dataclasses.replace(
        Rtn(8)(leaf), scale=jnp.full((*leaf.shape[:-1], 1), 1 / 63)
    )
    codes = lambda leaf: jnp.asarray(np.round(leaf * 63), jnp.int8)
    coded = tree.map_leaves(
        lambda path, leaf: (
            dataclasses.replace(exact(path, leaf), packed=codes(leaf))
            if "experts" in path
            else leaf
        ),
        plain,
    )
    one, two = (
        compress.observe(MODEL, params, BATCHES, "blocks/.*", STATISTICS)
        for params in (plain, coded)
    )
    assert list(one) == list(two)
    for path in one:
        close(two[path], one[path], err_msg=path)


def test_a_pattern_that_is_none():
    with pytest.raises(InputError, match="paths: '\\(' is not a regular expression"):
        compress.observe(MODEL, PARAMS, BATCHES, paths="(")


# ------------------------------------------------------------- statistics by layer, in any segments


@dataclasses.dataclass(frozen=True)
class _Norm(Rtn):
    """Weights times the root of the `square` of their input: shows which statistics a leaf got.
    `bits` only tells chains apart.

    The underscore keeps it out of the list of methods.
    """

    needs = ("square",)

    def step(self, draft, stats, key):
        assert stats["square"].shape == draft.shape[-1:]
        return draft.to(draft.weight * jnp.sqrt(stats["square"])[None])


TOGETHER = [("blocks/.*/(conv|router|up|down)", (_Norm(8),)), (".*", ())]
IN_TWO = [
    ("blocks/[01]/.*/?(conv|router|up|down)", (_Norm(8),)),
    ("blocks/.*/(conv|router|up|down)", (_Norm(4),)),
    (".*", ()),
]
APART = [
    *((f"blocks/{i}/.*/?(conv|router|up|down)", (_Norm(i + 1),)) for i in range(L)),
    (".*", ()),
]
UNEQUAL = [
    ("blocks/3/router", (_Norm(3),)),
    ("blocks/.*/(conv|router|up|down)", (_Norm(8),)),
    (".*", ()),
]


@pytest.mark.parametrize(
    "recipe", [TOGETHER, IN_TWO, APART, UNEQUAL], ids=["together", "two parts", "apart", "unequal"]
)
@pytest.mark.parametrize("given", [(), (3,)], ids=["params together", "params in two"])
@pytest.mark.parametrize(
    "seen",
    [(), (1,), (2, 4), (1, 2, 3, 4)],
    ids=["seen together", "seen 0|1-4", "seen 0-1|2-3|4", "seen apart"],
)
def test_each_layer_gets_its_own_statistics(seen, given, recipe):
    """However the layers were stacked when they were measured, are stacked now, and are split by
    the recipe.
    """
    out, report = compress.apply(recipe, segmented(*given), observed(*seen))
    before, after = (tree.flatten(tree.unstack(params)) for params in (PARAMS, out))
    for layer, leaf in before.items():
        if layer in WANT and layer != "head":
            scaled = np.asarray(leaf) * np.sqrt(WANT[layer]["square"])[..., None, :]
            np.testing.assert_allclose(after[layer], scaled, rtol=1e-4, atol=1e-5, err_msg=layer)
        else:
            np.testing.assert_array_equal(after[layer], leaf)
    assert list(out["blocks"]) == [f"0-{L - 1}"]  # equal neighbours are joined again
    assert sum(row["layers"] for row in report.leaves) == len(before)


def test_statistics_taken_some_layers_at_a_time_are_put_together():
    parts = [
        compress.observe(MODEL, PARAMS, BATCHES, paths)
        for paths in ("blocks/[0-2]/.*", "blocks/[34]/.*")
    ]
    assert not set(parts[0]) & set(parts[1])
    whole = compress.observe(MODEL, PARAMS, BATCHES, "blocks/.*")
    one, two = (
        compress.apply(TOGETHER, PARAMS, stats)[0] for stats in ({**parts[0], **parts[1]}, whole)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


def test_layers_without_statistics_are_not_given_those_of_others():
    stats = compress.observe(MODEL, PARAMS, BATCHES, "blocks/[12]/router")
    with pytest.raises(InputError, match="needs 'square' of the input of"):
        compress.apply([("blocks/.*/router", (_Norm(),)), (".*", ())], PARAMS, stats)
    with pytest.raises(
        InputError, match="needs 'square' of the input of"
    ):  # also where the first layer has some
        compress.apply([("blocks/[1-3]/router", (_Norm(),)), (".*", ())], PARAMS, stats)
    out, _ = compress.apply([("blocks/[12]/router", (_Norm(),)), (".*", ())], PARAMS, stats)
    for i, leaf in enumerate(out["blocks"][f"0-{L - 1}"]["router"]):
        factor = np.sqrt(WANT[f"blocks/{i}/router"]["square"]) if i in (1, 2) else 1.0
        np.testing.assert_allclose(leaf, np.asarray(ROUTERS[i]) * factor, rtol=1e-4)


def test_layers_with_other_statistics_are_leaves_of_their_own():
    """So that nothing is stacked that is not there for all."""
    first = compress.observe(MODEL, PARAMS, BATCHES, "blocks/0/router", ("square", "gram"))
    rest = compress.observe(MODEL, PARAMS, BATCHES, "blocks/[1-4]/router", ("square",))
    out, report = compress.apply(
        [("blocks/.*/router", (_Norm(),)), (".*", ())], PARAMS, {**first, **rest}
    )
    assert [row["path"] for row in report.leaves if row["method"]] == [
        "blocks/0/router",
        "blocks/1-4/router",
    ]
    for i, leaf in enumerate(out["blocks"][f"0-{L - 1}"]["router"]):
        np.testing.assert_allclose(
            leaf, np.asarray(ROUTERS[i]) * np.sqrt(WANT[f"blocks/{i}/router"]["square"]), rtol=1e-4
        )


def test_statistics_of_a_leaf_that_is_not_there():
    stats = {"blocks/0-4/routr": {"square": jnp.ones((L, D))}}
    with pytest.raises(
        InputError,
        match="stats: 'blocks/0-4/routr' is not a leaf of these params; nearest: blocks/0/router",
    ):
        compress.apply(TOGETHER, PARAMS, stats)


# ------------------------------------------------------------------------------- leaves of any rank


@pytest.mark.parametrize(
    "chain", ["rtn(bits=4, group=8)", "magnitude(0.5) | rtn(bits=8)", "magnitude(pattern=(1, 2))"]
)
@pytest.mark.parametrize("shape", [(6, 16), (3, 6, 16), (2, 3, 6, 16), (2, 2, 3, 6, 16)], ids=str)
def test_the_report_of_a_leaf_of_any_rank(shape, chain):
    """Leading axes change nothing: each matrix as it would be alone, and the numbers of all of
    them.
    """
    weight = normal(*shape, seed=7)
    out, report = compress.apply([(".*", chain)], {"w": weight})
    (row,) = report.leaves
    now = np.asarray(DECODE(out["w"]), np.float64)
    for at in np.ndindex(shape[:-2]):
        alone = compress.apply([(".*", chain)], {"w": weight[at]})[0]["w"]
        np.testing.assert_array_equal(now[at], DECODE(alone))
    was = np.asarray(weight, np.float64)
    assert row["relative_error"] == pytest.approx(
        np.sqrt(((was - now) ** 2).sum() / (was**2).sum()), rel=1e-5
    )
    assert row["shape"] == list(shape) and out["w"].shape == shape
    assert (
        row["bits_per_weight"]
        == pytest.approx(8 * tree.nbytes(out["w"]) / was.size)
        == report.bits_per_weight
    )


def test_the_report_of_vectors_and_scalars():
    _, report = compress.apply(
        [(".*", ())], {"gain": jnp.ones(()), "blocks": {"0-1": {"norm": jnp.ones((2, 3))}}}
    )
    shapes = [
        (row["shape"], row["layers"], row["bits_per_weight"], row["relative_error"])
        for row in report.leaves
    ]
    assert shapes == [([], 1, 32.0, 0.0), ([3], 2, 32.0, 0.0)]
    assert compress.apply([(".*", ())], {"none": jnp.ones((0, 3))})[1].bits_per_weight == 0


# ------------------------------------------------------------------------------------------ padding

LENGTH = 5
WIDTH = 8


def ids(seed, rows, width):
    found = np.random.default_rng(seed).integers(1, 200, (rows, WIDTH))
    return jnp.asarray(found[:, :width], jnp.int32)


def long(inputs):
    """Inputs with zeros behind each row, whose ids are such that they would show."""
    return {
        name: jnp.pad(
            a,
            ((0, 0), (0, WIDTH - a.shape[1])),
            constant_values=3 * ("mask" not in name and name != "segments"),
        )
        for name, a in inputs.items()
    }


def real(width):
    return jnp.ones((2, width), jnp.bool_)


def padded_cases():
    tokens = ids(0, 2, LENGTH)
    return {
        "packed rows of experts": (
            llama.model(dataclasses.replace(llama.SIZES["tiny-moe"], depth=1)),
            {"tokens": tokens, "segments": jnp.array([[1, 1, 1, 2, 2], [1, 1, 2, 2, 2]])},
        ),
        "source and target": (
            t5.model(dataclasses.replace(t5.SIZES["tiny"], depth=1, encoder_depth=1)),
            {
                "source": ids(1, 2, LENGTH + 2),
                "source_mask": real(LENGTH + 2),
                "tokens": tokens,
                "mask": real(LENGTH),
            },
        ),
        "pooled": (
            bert.model(dataclasses.replace(bert.SIZES["tiny-embed"], depth=1)),
            {"tokens": tokens, "mask": real(LENGTH)},
        ),
    }


@pytest.mark.parametrize("name", padded_cases())
def test_padding_does_not_count(name):
    model, inputs = padded_cases()[name]
    params = jax.jit(model.init)(jax.random.key(0))
    paths = ".*/(q|down|up|router)|embed"
    names = ["gram", "histogram", "norms", "tokens"]
    want, got = (
        compress.observe(model, params, [one], paths, names, cap=1.5)
        for one in (inputs, long(inputs))
    )
    for path, of in want.items():
        for kind, value in of.items():
            np.testing.assert_allclose(
                got[path][kind], value, rtol=1e-3, atol=1e-3, err_msg=f"{path} {kind}"
            )


def test_rows_that_only_fill_up_do_not_count():
    model = mlp.model(mlp.Config(6, (8,), 3))
    params = model.init(jax.random.key(0))
    features = jnp.asarray(normal(4, 6, seed=0))
    counts = jnp.array([True, True, False, True])
    got = compress.observe(
        model, params, [{"features": features, "counts": counts}], statistics=["gram"]
    )
    few = np.asarray(features)[np.asarray(counts)].astype(np.float64)
    first = next(iter(got.values()))
    assert float(first["count"]) == 3
    np.testing.assert_allclose(first["gram"], few.T @ few, rtol=1e-4)
