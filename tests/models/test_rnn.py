"""Cells and the encoder against torch (see tests/hub/goldens/make_t5.py); attention against the
papers' formulas in NumPy.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import models, ops, tree
from jaxmodel.errors import InputError
from jaxmodel.models import rnn

STORED = Path(__file__).parents[1] / "hub" / "goldens" / "seq2seq" / "recurrent.npz"
KINDS = ("lstm", "gru")


def stored(kind: str) -> dict[str, np.ndarray]:
    with np.load(STORED) as file:
        return {
            key.removeprefix(f"{kind}:"): value
            for key, value in file.items()
            if key.startswith(f"{kind}:")
        }


def cell_of(kind: str, want: dict[str, np.ndarray], suffix: str) -> dict[str, jax.Array]:
    """torch's weights of a layer and direction under our names."""
    ours = {"input": want[f"weight_ih_{suffix}"], "state": want[f"weight_hh_{suffix}"]}
    to_input = want[f"bias_ih_{suffix}"]
    to_state = want[f"bias_hh_{suffix}"]
    biases = (
        {"input_bias": to_input + to_state}
        if kind == "lstm"
        else {"input_bias": to_input, "state_bias": to_state}
    )
    return {name: jnp.asarray(value) for name, value in (ours | biases).items()}


def of_torch(kind: str) -> tuple[models.Model, dict, dict[str, jax.Array], dict[str, np.ndarray]]:
    """A model, its parameters and inputs, and what torch's layers made of them: `memory` where the
    mask is, and `start`.

    Two layers in both directions, rows of 7, 3 and 5 steps; the inputs are put into the embedding.
    """
    want = stored(kind)
    model = rnn.model(rnn.Config(21, 8, 2, kind, "none"))
    params = jax.jit(model.init)(jax.random.key(0))
    directions = {"forward": "", "backward": "_reverse"}
    layer = lambda i: {
        name: cell_of(kind, want, f"l{i}{suffix}") for name, suffix in directions.items()
    }
    assert jax.tree.structure(layer(0)) == jax.tree.structure(params["encoder"]["blocks"]["0-1"])
    params["encoder"] = {
        "embed": jnp.asarray(want["x"].reshape(21, 8)),
        "blocks": {"0": layer(0), "1": layer(1)},
    }
    mask = np.arange(7) < want["lengths"][:, None]
    source = jnp.asarray(np.where(mask, np.arange(21).reshape(3, 7), 20), jnp.int32)
    inputs = {
        "source": source,
        "source_mask": jnp.asarray(mask),
        "tokens": jnp.zeros((3, 1), jnp.int32),
    }
    last = want["last"].reshape(
        -1, 2, 2, 3, 4
    )  # [n, layer, direction, B, H] -> [layer, B, n, direction and H]
    start = last.transpose(1, 3, 0, 2, 4).reshape(2, 3, -1, 8)
    return model, params, inputs, {"mask": mask, "memory": want["shown"], "start": start}


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_is_that_of_torch(kind):
    model, params, inputs, want = of_torch(kind)
    _, context = jax.jit(model.parts.embed)(params, inputs)
    np.testing.assert_allclose(
        np.asarray(context["memory"])[want["mask"]], want["memory"][want["mask"]], atol=1e-6
    )
    np.testing.assert_allclose(context["start"], want["start"], atol=1e-6)
    assert (
        np.abs(want["memory"]).max() > 0.5 and ops.recurrent.STATES[kind] == want["start"].shape[2]
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def numpy_cell(kind, cell, given, state):
    """The formulas of `ops.recurrent_step`, for one row: (shown, kept)."""
    from_state = cell["state"] @ state[0] + cell.get("state_bias", 0)
    if kind == "lstm":
        i, f, g, o = np.split(given + from_state, 4)
        kept = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return np.stack([sigmoid(o) * np.tanh(kept), kept])
    (rx, zx, nx), (rs, zs, ns) = np.split(given, 3), np.split(from_state, 3)
    keep = sigmoid(zx + zs)
    return ((1 - keep) * np.tanh(nx + sigmoid(rx + rs) * ns) + keep * state[0])[None]


@pytest.mark.parametrize("attention", ["none", "additive", "multiplicative"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_step_by_step(kind, attention):
    """One row, two layers: what the papers say, in float64."""
    model = rnn.model(rnn.Config(11, 6, 2, kind, attention))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.8, a.dtype), shapes)
    tokens = rng.integers(0, 11, (1, 5))
    inputs = {
        "source": jnp.asarray(rng.integers(0, 11, (1, 4)), jnp.int32),
        "tokens": jnp.asarray(tokens, jnp.int32),
    }
    _, context = model.parts.embed(params, inputs)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    memory = np.asarray(context["memory"][0], np.float64)
    states = list(np.asarray(context["start"][:, 0], np.float64))
    blocks = tree.unstack(p)["blocks"]
    layers = [blocks["0"], blocks["1"]]
    logits = []
    for token in tokens[0]:
        x = p["embed"][token]
        for i, layer in enumerate(layers):
            cell = layer["cell"]
            attn = layer.get("attn")
            given = cell["input"] @ x + cell["input_bias"]
            if (
                attn is not None and attention == "additive"
            ):  # with the state of the step before, before the cell
                scores = [
                    attn["score"] @ np.tanh(attn["query"] @ states[i][0] + attn["memory_k"] @ m)
                    for m in memory
                ]
                found = softmax(np.array(scores)) @ memory
                given = given + cell["context"] @ found
            states[i] = numpy_cell(kind, cell, given, states[i])
            x = states[i][0]
            if attn is not None and attention == "multiplicative":
                found = softmax(np.array([x @ attn["memory_k"] @ m for m in memory])) @ memory
            if attn is not None:
                x = np.tanh(layer["mix"] @ np.concatenate([found, x]))
        logits.append(p["head"] @ x + p["head_bias"])
    np.testing.assert_allclose(
        jax.jit(model.apply)(params, inputs).logits[0], np.stack(logits), atol=2e-5
    )


def test_a_new_lstm_remembers():
    params = jax.jit(rnn.model(rnn.SIZES["tiny"]).init)(jax.random.key(0))
    bias = params["blocks"]["1"]["cell"]["input_bias"]
    assert bias.tolist() == [0.0] * 32 + [1.0] * 32 + [0.0] * 64
    gru = jax.jit(rnn.model(rnn.SIZES["tiny-gru"]).init)(jax.random.key(0))
    assert not np.any(gru["blocks"]["2"]["cell"]["input_bias"])


def test_wrong_configs():
    for change, message in (
        ({"cell": "rnn"}, "cell: 'rnn' is not known; allowed: gru, lstm"),
        (
            {"attention": "dot"},
            "attention: 'dot' is not known; allowed: additive, multiplicative, none",
        ),
        ({"width": 7}, "width: 7 given; allowed: an even number"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(rnn.SIZES["tiny"], **change)
    with pytest.raises(InputError, match="kind: 'rnn' is not known"):
        ops.recurrent_step("rnn", jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.zeros((1, 1, 1)))
