"""The loss of a model of experts: cross entropy and, in training only, its balance, by hand from
the parts of the model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import losses, tree
from jaxmodel.errors import InputError
from jaxmodel.models import llama

CONFIG = dataclasses.replace(llama.SIZES["tiny-moe"], depth=2, init_scale=0.3, balance=0.05)
MODEL = llama.model(CONFIG)
ROWS = np.random.default_rng(0).integers(0, 256, (4, 13))
BATCH = {
    "tokens": jnp.asarray(ROWS[:, :-1], jnp.int32),
    "targets": jnp.asarray(ROWS[:, 1:], jnp.int32),
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def by_hand(params: tree.Params) -> tuple[float, float]:
    """Cross entropy, and `E sum_e f_e p_e` of each layer's router on the mean over the layers."""
    embed, block, head = map(jax.jit, MODEL.parts)
    x, context = embed(params, {"tokens": BATCH["tokens"]})
    each = []
    for i, layer in tree.unstack(params)["blocks"].items():
        moe = {
            **layer["moe"],
            "down": jnp.zeros_like(layer["moe"]["down"]),
        }  # what the experts read: the stream before them
        before = np.asarray(block({**layer, "moe": moe}, x, context, None, int(i))[0], np.float64)
        normed = before / np.sqrt(
            np.mean(before**2, -1, keepdims=True) + CONFIG.norm_eps
        )  # the norm's weight is 1
        scores = normed.reshape(-1, CONFIG.width) @ np.asarray(layer["moe"]["router"], np.float64).T
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        chosen = np.argsort(-scores, -1)[:, : CONFIG.experts_per_token]
        f = np.bincount(chosen.ravel(), minlength=CONFIG.experts) / len(scores)
        each.append(CONFIG.experts * float(f @ p.mean(0)))
        x = block(layer, x, context, None, int(i))[0]
    logits = np.asarray(head(params, x), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(
        np.take_along_axis(log_p, np.asarray(BATCH["targets"])[..., None], -1).mean()
    ), float(np.mean(each))


def test_training_adds_the_balance_and_a_held_out_loss_does_not(params):
    entropy, balance = by_hand(params)

    def both(params):
        of = lambda train_: jax.value_and_grad(
            lambda p: losses.next_token(MODEL, p, BATCH, train=train_), has_aux=True
        )(params)
        return (
            of(True),
            of(False),
            jax.grad(lambda p: MODEL.hidden(p, BATCH["tokens"]).aux["load_balance"])(params),
        )

    ((loss, metrics), grads), ((heldout, same), plain), pull = jax.jit(both)(params)
    assert balance > CONFIG.experts_per_token + 0.05  # not balanced, so that something is added
    assert (
        float(metrics["load_balance"])
        == pytest.approx(balance, rel=1e-5)
        == float(same["load_balance"])
    )
    assert float(loss) == pytest.approx(entropy + 0.05 * balance, rel=1e-5)
    assert float(heldout) == pytest.approx(entropy, rel=1e-5)
    grads, plain, pull = (a["blocks"]["0-1"]["moe"]["router"] for a in (grads, plain, pull))
    assert np.abs(pull).max() > 0.05
    np.testing.assert_allclose(grads - plain, 0.05 / CONFIG.depth * pull, atol=1e-6)


def test_a_dense_model_has_no_balance():
    dense = llama.model(llama.SIZES["tiny"])
    shapes = jax.eval_shape(dense.init, jax.random.key(0))
    assert set(
        jax.eval_shape(lambda params: losses.next_token(dense, params, BATCH), shapes)[1]
    ) == {"weight"}
    with pytest.raises(
        InputError, match="balance: -0.1 given; allowed: a finite number of at least 0"
    ):
        dataclasses.replace(CONFIG, balance=-0.1)
