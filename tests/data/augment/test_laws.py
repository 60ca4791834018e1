"""What holds for every augmentation; members are found, and each must be told here how it looks
with strength zero.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel.data import augment
from jaxmodel.data.augment.geometric import HorizontalFlip
from jaxmodel.errors import InputError

ROWS = 6
SIDES = (19, 18)
CLASSES = 4

# As it is tried, and with strength zero; None where there is no such setting.
SETTINGS = {
    "affine": ("affine(20, 0.2, 0.2, 0.1)", "affine(0, 0, 0, 0)"),
    "aug_mix": (
        "aug_mix(width=2, depth=1)",
        "aug_mix(0, operations=('rotate', 'posterize', 'solarize', 'shear_x'))",
    ),
    "autocontrast": ("autocontrast()", "autocontrast(probability=0)"),
    "blur": ("blur(1)", "blur(0)"),
    "brightness": ("brightness(0.5)", "brightness(0)"),
    "colour_jitter": ("colour_jitter()", "colour_jitter(0, 0, 0, 0)"),
    "contrast": ("contrast(0.5)", "contrast(0)"),
    "cut_mix": ("cut_mix(4)", "cut_mix(4, alpha=0)"),
    "cutout": ("cutout(4)", "cutout(0)"),
    "equalize": ("equalize()", "equalize(probability=0)"),
    "greyscale": ("greyscale(0.5)", "greyscale(0)"),
    "horizontal_flip": ("horizontal_flip()", "horizontal_flip(0)"),
    "hue": ("hue(0.4)", "hue(0)"),
    "invert": ("invert(probability=0.5)", "invert(probability=0)"),
    "local_shuffle": ("local_shuffle(3)", "local_shuffle(0)"),
    "mixup": ("mixup(4, 1)", "mixup(4, alpha=0)"),
    "noise": ("noise(0.2)", "noise(0)"),
    "posterize": ("posterize(2, probability=0.5)", "posterize(8)"),
    "rand_augment": ("rand_augment(2, 9)", "rand_augment(0, 9)"),
    "random_crop": ("random_crop(3)", "random_crop(0)"),
    "random_resized_crop": ("random_resized_crop()", "random_resized_crop((1, 1), (1, 1))"),
    "rotate": ("rotate(40)", "rotate(0)"),
    "saturation": ("saturation(0.5)", "saturation(0)"),
    "scale": ("scale(0.5)", "scale(0)"),
    "sentence_shuffle": ("sentence_shuffle(2)", None),
    "sharpness": ("sharpness(0.9)", "sharpness(0)"),
    "shear": ("shear(0.3)", "shear(0)"),
    "solarize": ("solarize(0.4, probability=0.5)", "solarize(2)"),
    "span_corruption": ("span_corruption(99)", None),
    "span_masking": ("span_masking(1, 50, rate=0.4)", "span_masking(1, 50, rate=0)"),
    "token_dropout": ("token_dropout(1, 0.4)", "token_dropout(1, 0)"),
    "translate": ("translate(0.3)", "translate(0)"),
    "vertical_flip": ("vertical_flip()", "vertical_flip(0)"),
}
TEXT = {"local_shuffle", "sentence_shuffle", "span_corruption", "span_masking", "token_dropout"}
MIXES = {"mixup", "cut_mix"}
FIXED = {"autocontrast", "equalize"}  # nothing is drawn
OF_COLOUR = {"hue", "saturation", "greyscale"}  # nothing to change in one channel


def batch_of(channels: int, rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    segments = np.tile(np.repeat(np.array([1, 2, 0], np.int32), [12, 8, 4]), (rows, 1))
    pixels = rng.random((rows, *SIDES, channels), np.float32)
    pixels[1:2] = 1  # where rounding could leave the range
    return {
        "pixels": pixels,
        "labels": rng.integers(0, CLASSES, rows, np.int32),
        "tokens": np.where(segments > 0, rng.integers(2, 9, segments.shape, np.int32), np.int32(0)),
        "targets": rng.integers(2, 9, segments.shape, np.int32),
        "weights": (segments > 0).astype(np.float32),
        "segments": segments,
        "positions": np.tile(np.arange(24, dtype=np.int32), (rows, 1)),
    }


def same(left: dict, right: dict, rows: slice = slice(None)) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[k][rows], right[k][rows]) for k in left
    )


def test_every_member_is_told_of() -> None:
    assert augment.members().keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_laws(name: str) -> None:
    made = augment.parse(SETTINGS[name][0])
    batch = batch_of(3)
    changed = batch_of(3, seed=1)
    assert augment.parse(str(made)) == made and hash(augment.parse(str(made))) == hash(made)
    compiled = jax.jit(made)
    before = {k: v.copy() for k, v in batch.items()}
    run = lambda i, batch: jax.tree.map(np.asarray, compiled(jax.random.key(i), batch))
    out = run(0, batch)
    assert same(batch, before) and same(out, run(0, batch))
    assert all(same(out, run(i, batch)) for i in (1, 2, 3)) == (name in FIXED)
    assert not np.array_equal(
        *((b["tokens"] if name in TEXT else b["pixels"]) for b in (batch, out))
    )
    assert out["pixels"].min() >= 0 and out["pixels"].max() <= 1
    touched = (
        {"tokens", "targets", "weights"}
        if name in TEXT
        else {"pixels", "labels"}
        if name in MIXES
        else {"pixels"}
    )
    for k in out.keys() & batch.keys():
        if k not in touched:
            assert np.array_equal(out[k], batch[k])
        if name != "span_corruption" and k != "labels":
            assert (out[k].shape, out[k].dtype) == (batch[k].shape, batch[k].dtype)
    # Row i depends on (key, i, row i) only; where rows are mixed, on row i - 1 too.
    for k in changed:
        changed[k][2:4] = batch[k][2:4]
    out_changed = run(0, changed)
    assert same(out, out_changed, slice(3 if name in MIXES else 2, 4)) and not same(
        out, out_changed
    )


def test_strength_zero_changes_nothing() -> None:
    batch = batch_of(3)
    made = {name: augment.parse(zero) for name, (_, zero) in SETTINGS.items() if zero is not None}
    outs = jax.jit(lambda key, batch: {name: one(key, batch) for name, one in made.items()})(
        jax.random.key(0), batch
    )
    for name, out in outs.items():
        assert np.array_equal(out["pixels"], batch["pixels"]) and np.array_equal(
            out["tokens"], batch["tokens"]
        ), name


def test_one_row_of_one_channel() -> None:
    batch = batch_of(1, rows=1)
    made = {name: augment.parse(text) for name, (text, _) in SETTINGS.items() if name not in TEXT}
    run = jax.jit(
        lambda key, batch: {name: one(key, batch)["pixels"] for name, one in made.items()}
    )
    for name, out in run(jax.random.PRNGKey(1), batch).items():  # the older kind of key, too
        assert out.shape == batch["pixels"].shape and out.min() >= 0 and out.max() <= 1, name
        if name in OF_COLOUR:
            assert np.array_equal(out, batch["pixels"]), name


@pytest.mark.parametrize("name", ["rotate", "contrast", "cutout", "span_masking"])
def test_eager_equals_compiled(name: str) -> None:
    made = augment.parse(SETTINGS[name][0])
    batch = batch_of(3)
    eager, compiled = (run(jax.random.key(2), batch) for run in (made, jax.jit(made)))
    for k in eager:
        np.testing.assert_allclose(eager[k], compiled[k], atol=1e-6)


def test_probability() -> None:
    rows = 400
    pixels = np.full((rows, 2, 2, 1), 0.25, np.float32)
    made = augment.parse("invert(probability=0.3)")
    out = np.asarray(jax.jit(made)(jax.random.key(0), {"pixels": pixels})["pixels"])
    applied = (out == 0.75).all(axis=(1, 2, 3))
    assert (applied | (out == 0.25).all(axis=(1, 2, 3))).all()
    assert abs(applied.mean() - 0.3) < 3 * (0.3 * 0.7 / rows) ** 0.5


def test_half_precision_stays_and_is_computed_in_single() -> None:
    batch = batch_of(3)
    half = jnp.asarray(batch["pixels"], jnp.bfloat16)
    out = augment.parse("contrast(0.5)")(jax.random.key(0), {"pixels": half})["pixels"]
    single = augment.parse("contrast(0.5)")(
        jax.random.key(0), {"pixels": half.astype(jnp.float32)}
    )["pixels"]
    assert out.dtype == jnp.bfloat16 and np.array_equal(out, single.astype(jnp.bfloat16))


def test_a_chain_folds_the_key_for_each_link() -> None:
    flip = HorizontalFlip()
    noise = augment.Noise(0.1)
    batch = batch_of(1)
    key = jax.random.key(5)
    by_hand = noise(jax.random.fold_in(key, 1), flip(jax.random.fold_in(key, 0), batch))
    assert same(augment.chain(flip, noise)(key, batch), by_hand)
    assert (
        flip | noise
        == augment.chain(flip, noise)
        == augment.chain(augment.chain(flip), augment.chain(noise))
    )
    assert augment.parse(" ") == augment.chain() and same(augment.chain()(key, batch), batch)
    assert augment.chain(lambda key, batch: {**batch, "seen": 1})(key, batch)["seen"] == 1


def test_text_form() -> None:
    for text, shown in [
        ("rotate(15)", "rotate(degrees=15.0)"),
        ("rotate(15, fill=1, probability=0.5)", "rotate(degrees=15.0, probability=0.5, fill=1.0)"),
        ("random_resized_crop((0.5, 1))", "random_resized_crop(area=(0.5, 1.0))"),
        ("horizontal_flip | mixup(10) ", "horizontal_flip(probability=0.5) | mixup(classes=10)"),
        ("rand_augment(2, 9)", "rand_augment(count=2)"),
        (
            "rand_augment(1, 5, ('rotate', 'shear_x'))",
            "rand_augment(count=1, magnitude=5.0, operations=('rotate', 'shear_x'))",
        ),
    ]:
        assert str(augment.parse(text)) == shown and augment.parse(shown) == augment.parse(text)


def test_numbers_outside_of_what_is_allowed_are_refused_everywhere() -> None:
    for name, cls in augment.members().items():
        (made,) = augment.parse(SETTINGS[name][0]).links
        for field in dataclasses.fields(cls):
            value = getattr(made, field.name)
            for bad in (-1, 1e9 if isinstance(value, float) else 2**40, True, float("nan")):
                bad = (bad, bad) if isinstance(value, tuple) else bad
                with pytest.raises(
                    InputError, match=re.escape(f"{name}: {field.name} is {bad!r}; allowed: ")
                ):
                    dataclasses.replace(made, **{field.name: bad})


def test_bad_input_is_one_clear_line() -> None:
    pixels = np.zeros((2, 3, 3, 1), np.float32)
    labels = np.zeros(2, np.int32)
    key = jax.random.key(0)
    run = lambda text, **batch: augment.parse(text)(key, batch)
    for call, message in [
        (lambda: augment.parse("rotate(15"), "augment: 'rotate(15' cannot be read"),
        (
            lambda: augment.parse("rotat(15)"),
            "augment: 'rotat' is not known; allowed: affine, .* (nearest: rotate",
        ),
        (
            lambda: augment.parse("rotate(15) & noise()"),
            "augment: 'rotate(15) & noise()' is not known",
        ),
        (
            lambda: augment.parse("rotate(angle=15)"),
            "rotate takes the settings degrees, probability, fill",
        ),
        (lambda: augment.parse("rotate(x)"), "rotate takes the settings degrees"),
        (lambda: augment.parse("mixup()"), "mixup takes the settings classes, alpha, probability"),
        (
            lambda: augment.parse("random_resized_crop((1, 0.5))"),
            "area is (1.0, 0.5); allowed: the smaller number first",
        ),
        (
            lambda: augment.parse("rand_augment(operations=('rotat',))"),
            "operations is ('rotat',); allowed: ",
        ),
        (
            lambda: augment.parse("aug_mix(operations=())"),
            "operations is (); allowed: one or more",
        ),
        (
            lambda: augment.parse("span_masking(1, 50, lowest=50)"),
            "lowest is 50; allowed: 0 to 49, below vocab",
        ),
        (
            lambda: augment.parse("span_masking(1, 50, 0.5, 1.5)"),
            "span is 1.5; allowed: 0, or at least 1 / (1 - rate) = 2",
        ),
        (lambda: run("noise()"), "batch: nothing given; 'pixels' [B, Y, X, C] is needed"),
        (
            lambda: run("noise()", pixels=labels),
            "batch: pixels are int32 (2,); allowed: floating-point [B, Y, X, C] from 0 to 1",
        ),
        (
            lambda: run("contrast()", pixels=np.zeros((2, 3, 3, 2), np.float32)),
            "pixels have 2 channels; allowed: 1 or 3",
        ),
        (lambda: run("mixup(3)", pixels=pixels), "batch: pixels given; 'labels' [B] is needed too"),
        (
            lambda: run("mixup(3)", pixels=pixels, labels=np.zeros((2, 4), np.float32)),
            "or distributions [B, 3]",
        ),
        (
            lambda: run("local_shuffle()", pixels=pixels),
            "batch: pixels given; 'tokens' [B, T] is needed",
        ),
        (
            lambda: run("span_corruption(1)", tokens=labels[None]),
            "first is 1; allowed: at least 2, for 1 spans in 2 tokens",
        ),
        (
            lambda: run("local_shuffle()", tokens=labels),
            "batch: tokens are int32 (2,); allowed: integers [B, T]",
        ),
        (
            lambda: run("local_shuffle()", tokens=labels[None], mask=labels),
            "mask are (2,); allowed: (1, 2), the shape of",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        told = str(caught.value)
        words = message.split(" .* ")
        assert all(w in told for w in words) and "\n" not in told, told


def test_importing_data_does_not_import_jax() -> None:
    code = (
        "import sys, jaxmodel.data as data; assert 'jax' not in sys.modules; "
        "data.augment.Noise(); assert 'jax' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
