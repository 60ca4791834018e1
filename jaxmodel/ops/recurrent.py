"""One step of a recurrent cell, from the sums that its matrices give: elementwise, in float32.

A state is `[B, n, H]`: `n` is 2 for an LSTM (what it shows, what it keeps), 1 for a GRU. The gates stand in one axis in the
order that PyTorch has, so its weights can be taken as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.errors import unknown

GATES = {"lstm": 4, "gru": 3}
"""Gates of a cell: input, forget, new, output of an LSTM; reset, keep, new of a GRU."""
STATES = {"lstm": 2, "gru": 1}
"""Vectors in the state of a cell; the first is what it shows."""


def check_cell(argument: str, kind: str) -> None:
    """Raise InputError for a cell that is none of `GATES`."""
    if kind not in GATES:
        raise unknown(argument, kind, GATES)


def recurrent_step(
    kind: str, from_input: Float[Array, "B G"], from_state: Float[Array, "B G"], state: Float[Array, "B n H"]
) -> Float[Array, "B n H"]:
    """The next state of an LSTM (Hochreiter & Schmidhuber, 1997; with forget gates, Gers et al., 2000) or GRU (Cho et al., 2014).

    With `i, f, g, o` the parts of `from_input + from_state`, an LSTM keeps `c' = sigmoid(f) c + sigmoid(i) tanh(g)` and shows
    `h' = sigmoid(o) tanh(c')`. With `r, z, n` the parts of both sums `x` and `s`, a GRU shows
    `h' = (1 - z') tanh(n_x + r' n_s) + z' h`, where `r' = sigmoid(r_x + r_s)` and `z' = sigmoid(z_x + z_s)`.

    Args:
      kind: "lstm" or "gru".
      from_input: the input's share of all gates, `G = 4H` or `3H`, with its bias.
      from_state: the state's share, with its bias.
      state: see the module; float32.
    """
    x, s = from_input.astype(jnp.float32), from_state.astype(jnp.float32)
    if kind == "lstm":
        i, f, g, o = jnp.split(x + s, 4, axis=-1)
        kept = jax.nn.sigmoid(f) * state[:, 1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jnp.stack([jax.nn.sigmoid(o) * jnp.tanh(kept), kept], axis=1)
    check_cell("kind", kind)
    (rx, zx, nx), (rs, zs, ns) = jnp.split(x, 3, axis=-1), jnp.split(s, 3, axis=-1)
    keep, new = jax.nn.sigmoid(zx + zs), jnp.tanh(nx + jax.nn.sigmoid(rx + rs) * ns)
    return ((1 - keep) * new + keep * state[:, 0])[:, None]
