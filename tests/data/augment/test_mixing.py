"""Mixup and CutMix by their closed forms, their shares against scipy's Beta."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import stats

from jaxmodel.data import augment
from jaxmodel.data.augment.base import row_keys
from jaxmodel.data.augment.mixing import beta

B = 64
C = 5


def mixed(
    made: augment.Augmentation, seed: int = 0, labels: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    pixels = np.random.default_rng(seed).random((B, 9, 12, 3), np.float32)
    labels = (np.arange(B) % C).astype(np.int32) if labels is None else labels
    out = jax.jit(made)(jax.random.key(seed), {"pixels": pixels, "labels": labels})
    assert out["labels"].shape == (B, C) and out["labels"].dtype == np.float32
    return pixels, np.asarray(out["pixels"]), np.asarray(out["labels"])


def test_mixup() -> None:
    pixels, out, labels = mixed(augment.Mixup(C, 1.0))
    kept = labels[np.arange(B), np.arange(B) % C]
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(
        labels[np.arange(B), np.roll(np.arange(B) % C, 1)], 1 - kept, atol=1e-6
    )
    share = kept[:, None, None, None]
    np.testing.assert_allclose(
        out, share * pixels + (1 - share) * np.roll(pixels, 1, axis=0), atol=1e-6
    )
    assert kept.min() < 0.1 and kept.max() > 0.9


def test_cutmix_labels_are_shares_of_area_exactly() -> None:
    pixels, out, labels = mixed(augment.CutMix(C, 1.0))
    own = (out == pixels).all(-1)
    other = (out == np.roll(pixels, 1, axis=0)).all(-1)
    assert (own ^ other).all()
    assert (other == other.any(2, keepdims=True) & other.any(1, keepdims=True)).all()  # a box
    share = other.sum((1, 2)).astype(np.float32) / np.float32(9 * 12)
    # to the last bit of single precision (XLA multiplies by 1 / 108)
    np.testing.assert_allclose(
        labels[np.arange(B), np.roll(np.arange(B) % C, 1)], share, rtol=1.2e-7
    )
    np.testing.assert_allclose(labels[np.arange(B), np.arange(B) % C], 1 - share, atol=1.2e-7)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    assert share.min() < 0.02 and share.max() > 0.5


def test_a_box_in_the_middle_has_the_share_drawn() -> None:
    (made,) = augment.parse("cut_mix(5)").links
    pixels = np.random.default_rng(0).random((B, 40, 40, 1), np.float32)
    given = np.linspace(0, 1, B, dtype=np.float32)
    both = [jax.numpy.asarray(a) for a in (pixels, np.roll(pixels, 1, axis=0))]
    out, share = made.mix(row_keys(jax.random.key(0), B), *both, jax.numpy.asarray(given))
    changed = np.asarray(out != pixels)
    inner = ~(changed[:, [0, -1]].any((1, 2, 3)) | changed[:, :, [0, -1]].any((1, 2, 3)))
    side = np.floor(np.sqrt(given) * np.float32(40))
    np.testing.assert_allclose(np.asarray(share)[inner], ((side / 40) ** 2)[inner], atol=1e-6)
    assert inner.sum() > 10 and (np.asarray(share) <= (side / 40) ** 2 + 1e-6).all()


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 3.0])
def test_shares_are_of_beta(alpha: float) -> None:
    drawn = np.asarray(
        jax.jit(beta, static_argnums=1)(row_keys(jax.random.key(1), 100_000), alpha), np.float64
    )
    for place in (
        1e-5,
        1e-3,
        0.1,
        0.3,
        0.5,
        0.8,
        0.99,
        0.999,
    ):  # single precision has nothing just below 1
        wanted = stats.beta(alpha, alpha).cdf(place)
        assert (
            abs((drawn < place).mean() - wanted) <= 4 * (wanted * (1 - wanted) / len(drawn)) ** 0.5
        )


def test_probability_and_distributions_as_labels() -> None:
    pixels, out, labels = mixed(augment.Mixup(C, 1.0, probability=0.4))
    still = (out == pixels).all((1, 2, 3))
    assert 0.4 < still.mean() < 0.8 and set(np.unique(labels[still])) == {0, 1}
    soft = np.random.default_rng(1).dirichlet(np.ones(C), B).astype(np.float32)
    _, _, twice = mixed(augment.Mixup(C, 1.0) | augment.CutMix(C), labels=soft)
    np.testing.assert_allclose(twice.sum(1), 1, atol=1e-6)
    assert not np.allclose(twice, soft, atol=0.01)


def test_a_label_that_is_no_class_is_not_hidden() -> None:
    labels = np.zeros(B, np.int32)
    labels[3], labels[10] = C, -1
    _, _, out = mixed(augment.Mixup(C, 1.0), labels=labels)
    assert np.flatnonzero(np.isnan(out).any(1)).tolist() == [
        3,
        4,
        10,
        11,
    ]  # and the neighbours that it is mixed into
