"""What is special about the encoders:

BERT's heads and padding, patches of images, and CLIP's two towers.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle, train_bpe
from jaxmodel.layers import ACTIVATIONS
from jaxmodel.models import Model, bert, clip, sizes, vit
from jaxmodel.models.sentences import embed_texts

B = 3
T = 8
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 256, (B, T)), jnp.int32)
LENGTHS = np.array([3, T, 5])
MASK = jnp.asarray(np.arange(T) < LENGTHS[:, None])

PARAMETERS = {
    "bert/bert-base": 109_514_298,  # with the head of masked tokens, as transformers counts them
    "bert/bert-large": 335_174_458,
    "bert/minilm-l6": 22_713_216
    - (384 * 384 + 384),  # the card's, without the pooler that means do not read
    "vit/vit-base-16": 86_567_656,
    "vit/vit-large-16": 304_326_632,
    "clip/clip-base-32": 151_277_313,
    "clip/clip-base-16": 149_620_737,
    "clip/clip-large-14": 427_616_513,
    "clip/siglip-base-16": 203_155_970,  # and these as transformers counts them
    "clip/siglip-large-16": 652_150_786,
    "clip/siglip-so400m-14": 877_960_498,
    "clip/siglip2-base-16": 375_187_970,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    module, config = sizes()[name]
    shapes = jax.eval_shape(module.model(config).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


def large(model: Model) -> tree.Params:
    """Parameters that are large everywhere, so that no part goes untested."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    around = lambda path: 1.0 if path.endswith("norm/weight") else 0.0
    return tree.map_leaves(
        lambda path, a: jnp.asarray(around(path) + 0.3 * rng.normal(size=a.shape), a.dtype), shapes
    )


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_activations_by_their_formulas() -> None:
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    want = {
        "gelu": [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()],
        "gelu_tanh": x * (1 + tanh) / 2,
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "relu": np.maximum(x, 0),
        "silu": x / (1 + np.exp(-x)),
    }
    assert set(want) == set(ACTIVATIONS)
    for name, values in want.items():
        close(ACTIVATIONS[name](jnp.asarray(x)), values, 1e-6)


# --------------------------------------------------------------------------------------------- BERT


@pytest.fixture(scope="module", params=["tiny", "tiny-classify", "tiny-embed"])
def text(request: pytest.FixtureRequest) -> SimpleNamespace:
    model = bert.model(bert.SIZES[request.param])
    return SimpleNamespace(
        model=model, params=large(model), apply=jax.jit(model.apply), head=model.config.head
    )


def test_every_token_sees_every_other(text: SimpleNamespace) -> None:
    before, after = (
        text.apply(text.params, TOKENS.at[:, -1].set(token)).hidden[:, 0] for token in (7, 8)
    )
    assert np.abs(before - after).min(axis=1).max() > 1e-4


def test_padding_has_no_influence(text: SimpleNamespace) -> None:
    """Whatever it is, wherever it stands, and as if it were not there."""
    outs = [
        text.apply(text.params, {"tokens": jnp.where(MASK, TOKENS, fill), "mask": MASK})
        for fill in (0, 7)
    ]
    kept = [
        np.asarray(out.logits)[np.asarray(MASK)] if text.head == "mlm" else out.logits
        for out in outs
    ]
    np.testing.assert_array_equal(*kept)
    for row, length in enumerate(LENGTHS):
        alone = text.apply(text.params, TOKENS[row : row + 1, :length]).logits[0]
        close(outs[0].logits[row, :length] if text.head == "mlm" else outs[0].logits[row], alone)
    left = {"tokens": jnp.roll(TOKENS, 2, axis=1), "mask": jnp.roll(MASK, 2, axis=1)}
    places = jnp.broadcast_to(jnp.roll(jnp.arange(T, dtype=jnp.int32), 2), (B, T))
    moved = text.apply(text.params, {**left, "positions": places})
    if text.head == "mlm":
        close(np.roll(moved.logits, -2, axis=1)[np.asarray(MASK)], kept[0])
    elif text.head == "embed":
        close(moved.logits, kept[0])


def test_token_types_and_positions_count(text: SimpleNamespace) -> None:
    plain = text.apply(text.params, TOKENS).logits
    types = jnp.zeros((B, T), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    full = {"tokens": TOKENS, "types": types, "positions": positions}
    close(text.apply(text.params, full).logits, plain)
    for changed in ({"types": types.at[:, 4:].set(1)}, {"positions": positions + 3}):
        assert np.abs(text.apply(text.params, {**full, **changed}).logits - plain).max() > 1e-2
    outside = text.apply(text.params, {**full, "types": types.at[0, 1].set(2)}).logits
    assert np.all(np.isnan(outside[0])) and np.all(np.isfinite(outside[1:]))


def test_blockwise_attention_is_the_same(text: SimpleNamespace) -> None:
    other = text.model.with_policy(ops.Policy(attention="blockwise"))
    inputs = {"tokens": TOKENS, "mask": MASK}
    want = text.apply(text.params, inputs).logits
    got = jax.jit(other.apply)(text.params, inputs).logits
    where = np.asarray(MASK) if text.head == "mlm" else slice(None)
    close(np.asarray(got)[where], np.asarray(want)[where], 1e-4)


def test_heads_by_hand(text: SimpleNamespace) -> None:
    out = text.apply(text.params, {"tokens": TOKENS, "mask": MASK})
    hidden = np.asarray(out.hidden, np.float64)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), text.params)
    if text.head == "embed":
        np.testing.assert_array_equal(hidden[~np.asarray(MASK)], 0)
        want = np.stack([hidden[row, :length].mean(axis=0) for row, length in enumerate(LENGTHS)])
    elif text.head == "classify":
        pooled = np.tanh(hidden[:, 0] @ p["head"]["pool"].T + p["head"]["pool_bias"])
        want = pooled @ p["head"]["classes"].T + p["head"]["classes_bias"]
    else:
        y = hidden @ p["head"]["dense"].T + p["head"]["dense_bias"]
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        y = (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True) * p["head"]["norm"][
            "weight"
        ] + p["head"]["norm"]["bias"]
        want = y @ p["embed"].T + p["head"]["bias"]
    close(out.logits, want, 1e-4)


def test_a_row_of_nothing_but_padding_is_finite(text: SimpleNamespace) -> None:
    out = text.apply(text.params, {"tokens": TOKENS, "mask": MASK.at[0].set(False)})
    assert np.all(np.isfinite(out.logits))
    if text.head == "embed":
        np.testing.assert_array_equal(out.logits[0], 0)


def test_packed_segments(text: SimpleNamespace) -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0]], jnp.int32)
    inputs = {"tokens": TOKENS[:1], "segments": segments, "positions": positions}
    if text.head != "mlm":
        with pytest.raises(InputError, match="segments: given to the head"):
            text.model.apply(text.params, inputs)
        return
    packed = text.apply(text.params, inputs).logits[0]
    for start, stop in ((0, 3), (3, 7)):
        close(packed[start:stop], text.apply(text.params, TOKENS[:1, start:stop]).logits[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads: 5 given; allowed: a divisor of the width 32"),
        ({"head": "nsp"}, "head: 'nsp' is not known; allowed: classify, embed, mlm"),
        ({"activation": "swish"}, "activation: 'swish' is not known"),
        ({"labels": ("a",)}, "labels: 1 given; the head 'mlm' needs none"),
        ({"head": "classify"}, "labels: 0 given; the head 'classify' needs at least one"),
        ({"types": -1}, "types: -1 given; allowed: a whole number of at least 0"),
    ],
)
def test_bad_configs_of_bert(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(bert.SIZES["tiny"], **change)


@pytest.fixture(scope="module")
def sentences() -> Bundle:
    processor = train_bpe(["a few words, and a few more words"], vocab_size=270)
    model = bert.model(
        dataclasses.replace(bert.SIZES["tiny-embed"], vocab=processor.vocab_size, context=48)
    )
    return Bundle(model, large(model), processor, {"name": "words"})


def test_embeddings_of_texts(sentences: Bundle) -> None:
    """Of unit length, in the order of the texts, the same in any company, and as computed
    by hand.
    """
    texts = [
        "a few",
        "words",
        "and a few more words, and more, and more " * 2,
        "a",
        "few more words",
    ]
    found = embed_texts(sentences, texts)
    assert found.shape == (5, 32) and found.dtype == np.float32
    close(np.linalg.norm(found, axis=1), np.ones(5))
    close(embed_texts(sentences, texts, batch_size=2), found)
    close(embed_texts(sentences, texts[::-1], batch_size=3), found[::-1])
    assert sentences.processor is not None
    hidden = jax.jit(sentences.model.hidden)
    for text, row in zip(texts, found, strict=True):
        ids = jnp.asarray([sentences.processor.encode(text)], jnp.int32)
        mean = np.asarray(hidden(sentences.params, ids).hidden[0]).mean(axis=0)
        close(row, mean / np.linalg.norm(mean), 1e-4)
    assert embed_texts(sentences, []).shape == (0, 32)


def test_long_texts_are_cut(sentences: Bundle) -> None:
    assert sentences.processor is not None
    ids = sentences.processor.encode("a few more words " * 20)
    assert len(ids) > 48
    kept = sentences.processor.decode([*ids[:47], ids[-1]])
    assert sentences.processor.encode(kept) == [*ids[:47], ids[-1]]
    whole, cut = embed_texts(sentences, ["a few more words " * 20, kept])
    close(whole, cut)
    card = dataclasses.replace(sentences, card={"max_tokens": 4})
    short = sentences.processor.decode([*ids[:3], ids[-1]])
    close(*embed_texts(card, ["a few more words " * 20, short]))
    close(*embed_texts(sentences, ["a few more words " * 20, short], max_tokens=4))


def test_what_cannot_be_embedded(sentences: Bundle) -> None:
    masked = bert.model(bert.SIZES["tiny"])
    for bundle, texts, options, message in (
        (
            dataclasses.replace(sentences, model=masked),
            ["a"],
            {},
            "or modernbert with the head 'embed'",
        ),
        (dataclasses.replace(sentences, processor=None), ["a"], {}, "'words' has no tokenizer"),
        (sentences, "a text", {}, "texts: a single string was given"),
        (sentences, ["a"], {"batch_size": 0}, "batch_size: 0 given"),
        (sentences, ["a"], {"max_tokens": 49}, "max_tokens: 49 given; allowed: 2 to 48"),
        (sentences, ["a"], {"max_tokens": 0}, "max_tokens: 0 given; allowed: 2 to 48"),
    ):
        with pytest.raises(InputError, match=message):
            embed_texts(bundle, texts, **options)


# ------------------------------------------------------------------------------------------- images


def test_patches_are_the_rows_of_a_matrix_product() -> None:
    config = vit.SIZES["tiny"]
    model = vit.model(config)
    params = large(model)
    pixels = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
    x, _ = model.parts.embed(params, {"pixels": jnp.asarray(pixels)})
    own = jax.tree.map(np.asarray, params["embed"])
    want = np.zeros((2, 17, 32))
    want[:, 0] = own["class"]
    for row in range(4):
        for column in range(4):
            patch = (
                pixels[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                .transpose(0, 3, 1, 2)
                .reshape(2, -1)
            )
            want[:, 1 + 4 * row + column] = patch @ own["patch"].T + own["patch_bias"]
    close(x, want + own["positions"], 1e-4)


def test_a_mean_without_positions_does_not_see_the_order_of_patches() -> None:
    config = vit.SIZES["tiny-mean"]
    model = vit.model(config)
    params = large(model)
    pixels = RNG.normal(size=(2, 4, 4, 4, 4, 1)).astype(
        np.float32
    )  # B, rows of patches, y, columns, x, C
    mixed = pixels[:, [2, 0, 3, 1]][:, :, :, [3, 2, 0, 1]]
    first, second = (jnp.asarray(p.reshape(2, 16, 16, 1)) for p in (pixels, mixed))
    apply = jax.jit(model.apply)
    assert np.abs(apply(params, first).logits - apply(params, second).logits).max() > 1e-2
    params = tree.map_leaves(lambda path, a: 0 * a if path == "embed/positions" else a, params)
    close(apply(params, first).logits, apply(params, second).logits, 1e-4)


def test_the_class_token_stands_for_the_image() -> None:
    model = vit.model(vit.SIZES["tiny-features"])
    params = large(model)
    out = jax.jit(model.apply)(params, jnp.asarray(RNG.normal(size=(2, 16, 16, 3)), jnp.float32))
    x = np.asarray(out.hidden[:, 0], np.float64)
    p = jax.tree.map(np.asarray, params)
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * p["norm"]["weight"] + p[
        "norm"
    ]["bias"]
    close(out.logits, np.tanh(x @ p["head"]["pool"].T + p["head"]["pool_bias"]), 1e-4)


def test_the_pairs_of_a_siglip_are_judged_one_by_one() -> None:
    """Logits from the vectors of both towers by hand; what a sigmoid's loss says of the bias that
    no softmax sees.
    """
    model = clip.model(clip.SIZES["tiny-siglip"])
    params = large(model) | {"scale": jnp.asarray(1.5), "bias": jnp.asarray(-2.0)}
    inputs = {"tokens": TOKENS, "pixels": jnp.asarray(RNG.normal(size=(B, 16, 16, 3)), jnp.float32)}

    def loss(params: tree.Params) -> tuple[jax.Array, Any]:
        out = model.apply(params, inputs)
        signs = 2 * jnp.eye(B) - 1
        return -jnp.sum(jax.nn.log_sigmoid(signs * out.logits)), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    image, text = np.asarray(out.hidden).swapaxes(0, 1)
    close(np.linalg.norm([image, text], axis=-1), np.ones((2, B)))
    logits = np.exp(1.5) * image @ text.T - 2
    close(out.logits, logits)
    close(grads["bias"], (1 / (1 + np.exp(-logits)) - np.eye(B)).sum(), 1e-4)


def test_other_images_are_refused() -> None:
    model = vit.model(vit.SIZES["tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    for shape in ((2, 16, 16, 1), (2, 3, 16, 16), (2, 32, 32, 3), (16, 16, 3)):
        with pytest.raises(
            InputError, match=r"pixels: the shape .* given; allowed: \[B, 16, 16, 3\]"
        ):
            jax.eval_shape(model.apply, params, jnp.zeros(shape))


def test_images_of_any_size_and_what_stands_for_them() -> None:
    """Positions that are all the same stay so; the class token beside a mean.

    How others come between: goldens of dinov2-c.
    """
    model = vit.model(vit.SIZES["tiny-dino"])
    params = large(model)
    one = np.asarray(params["embed"]["positions"])[:2]
    params["embed"]["positions"] = jnp.asarray(
        np.concatenate([one[:1], np.repeat(one[1:], 16, axis=0)])
    )
    p = jax.tree.map(np.asarray, params)
    for sides in ((16, 16), (8, 8), (32, 16), (67, 34)):
        pixels = RNG.normal(size=(2, *sides, 3)).astype(np.float32)
        x, _ = jax.jit(model.parts.embed)(params, {"pixels": jnp.asarray(pixels)})
        grid = sides[0] // 4, sides[1] // 4
        whole = pixels[:, : 4 * grid[0], : 4 * grid[1]].reshape(2, grid[0], 4, grid[1], 4, 3)
        patches = whole.transpose(0, 1, 3, 5, 2, 4).reshape(2, -1, 48)
        close(x[:, 1:], patches @ p["embed"]["patch"].T + p["embed"]["patch_bias"] + one[1], 1e-4)
        close(x[:, 0], np.broadcast_to(p["embed"]["class"] + one[0], (2, 32)))
        out = jax.jit(model.apply)(params, jnp.asarray(pixels))
        hidden = np.asarray(out.hidden, np.float64)
        normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(
            hidden.var(-1, keepdims=True) + 1e-6
        )
        normed = normed * p["norm"]["weight"] + p["norm"]["bias"]
        both = np.concatenate([normed[:, 0], normed[:, 1:].mean(axis=1)], axis=-1)
        close(out.logits, both @ p["head"]["classes"].T + p["head"]["classes_bias"], 1e-3)
    with pytest.raises(
        InputError, match=r"pixels: .* given; allowed: \[B, Y, X of at least 4, 3\]"
    ):
        jax.eval_shape(model.apply, params, jnp.zeros((2, 3, 16, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 17}, "patch: 17 given; allowed: at most the image's 16 pixels"),
        ({"heads": 5}, "heads: 5 given"),
        ({"pool": "max"}, "pool: 'max' is not known; allowed: attention, both, class, mean"),
        ({"activation": "swish"}, "activation: 'swish' is not known"),
        ({"channels": 0}, "channels: 0 given"),
    ],
)
def test_bad_configs_of_vit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(vit.SIZES["tiny"], **change)


# --------------------------------------------------------------------------------------- two towers


@pytest.fixture(scope="module")
def pair() -> SimpleNamespace:
    config = clip.SIZES["tiny"]
    model = clip.model(config)
    pixels = jnp.asarray(RNG.normal(size=(B, 16, 16, 3)), jnp.float32)
    return SimpleNamespace(
        config=config, model=model, params=large(model), pixels=pixels, towers=clip.towers(config)
    )


def test_the_towers_alone_give_the_logits(pair: SimpleNamespace) -> None:
    out = jax.jit(pair.model.apply)(pair.params, {"tokens": TOKENS, "pixels": pair.pixels})
    image = jax.jit(pair.towers.image)
    text = jax.jit(pair.towers.text)
    images = image(pair.params, pair.pixels)
    texts = text(pair.params, {"tokens": TOKENS})
    close(out.hidden, jnp.stack([images, texts], axis=1))
    for rows in (images, texts):
        close(jnp.linalg.norm(rows, axis=-1), np.ones(B))
    close(
        out.logits, np.exp(float(pair.params["scale"])) * np.asarray(images) @ np.asarray(texts).T
    )
    more = jnp.concatenate([TOKENS, TOKENS[:2] + 1])
    logits = pair.towers.logits(pair.params, images, text(pair.params, {"tokens": more}))
    assert logits.shape == (B, B + 2)
    close(logits[:, :B], out.logits)


def test_a_text_is_read_at_its_end(pair: SimpleNamespace) -> None:
    """At the highest token, or at the first of a given id; what follows has no influence, whether
    masked or not.
    """
    tokens = jnp.asarray([[9, 8, 7, 255, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7, 255]], jnp.int32)
    read = jax.jit(pair.towers.text)
    want = read(pair.params, {"tokens": tokens})
    after = tokens.at[0, 4:].set(jnp.asarray([1, 1, 2, 254]))
    close(read(pair.params, {"tokens": after}), want)
    close(
        read(
            pair.params,
            {"tokens": tokens, "mask": jnp.asarray([[True] * 4 + [False] * 4, [True] * 8])},
        ),
        want,
    )
    close(read(pair.params, {"tokens": tokens[:1, :4]})[0], want[0])
    before = tokens.at[:, 0].set(77)
    assert np.abs(read(pair.params, {"tokens": before}) - want).max() > 1e-2
    named = dataclasses.replace(pair.config, text=dataclasses.replace(pair.config.text, end=4))
    twice = jnp.asarray([[9, 4, 7, 255, 6, 4, 4, 3]], jnp.int32)
    by_id = jax.jit(clip.towers(named).text)
    close(by_id(pair.params, {"tokens": twice}), by_id(pair.params, {"tokens": twice[:, :2]}))
    assert (
        np.abs(by_id(pair.params, {"tokens": twice}) - read(pair.params, {"tokens": twice})).max()
        > 1e-2
    )


def test_bad_configs_of_clip(pair: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="image.labels: 10 given; the image tower has no classes"):
        dataclasses.replace(pair.config, image=vit.SIZES["tiny"])
    with pytest.raises(InputError, match="shared: 0 given"):
        dataclasses.replace(pair.config, shared=0)
    with pytest.raises(InputError, match="heads: 5 given"):
        dataclasses.replace(pair.config.text, heads=5)
    with pytest.raises(InputError, match="activation: 'swish'"):
        dataclasses.replace(pair.config.text, activation="swish")
