"""One step of a recurrent cell, elementwise in float32, and the cache of such cells.

A step starts from the sums that the cell's matrices give. A state is `[B, n, H]`: `n` is 2 for an
LSTM (hidden and cell state), 1 for a GRU. The gates are concatenated along one axis in PyTorch's
order, so its weights can be used unchanged.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodel.errors import one_of
from jaxmodel.leaves.leaf import register

GATES = {"lstm": 4, "gru": 3}
"""The number of gates: LSTM input, forget, new, output; GRU reset, update, new."""
STATES = {"lstm": 2, "gru": 1}
"""The number of vectors in the state of a cell; the first is the hidden state."""


def check_cell(argument: str, kind: str) -> None:
    """Raise InputError if the kind of cell is not in `GATES`."""
    one_of(argument, kind, GATES)


def recurrent_step(
    kind: str,
    from_input: Float[Array, "B G"],
    from_state: Float[Array, "B G"],
    state: Float[Array, "B n H"],
) -> Float[Array, "B n H"]:
    """Compute the next state of an LSTM or GRU.

    With `i, f, g, o` the parts of `from_input + from_state`, an LSTM has the cell state
    `c' = sigmoid(f) c + sigmoid(i) tanh(g)` and the hidden state `h' = sigmoid(o) tanh(c')`
    (Hochreiter & Schmidhuber, 1997; with forget gates, Gers et al., 2000). With `r, z, n` the parts
    of both sums `x` and `s`, a GRU has `h' = (1 - z') tanh(n_x + r' n_s) + z' h`, where
    `r' = sigmoid(r_x + r_s)` and `z' = sigmoid(z_x + z_s)` (Cho et al., 2014).

    Args:
      kind: "lstm" or "gru".
      from_input: the input's contribution to all gates, `G = 4H` or `3H`, with its bias.
      from_state: the state's contribution to all gates, with its bias.
      state: the last state, float32; see the module.
    """
    x = from_input.astype(jnp.float32)
    s = from_state.astype(jnp.float32)
    if kind == "lstm":
        i, f, g, o = jnp.split(x + s, 4, axis=-1)
        kept = jax.nn.sigmoid(f) * state[:, 1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jnp.stack([jax.nn.sigmoid(o) * jnp.tanh(kept), kept], axis=1)
    check_cell("kind", kind)
    (rx, zx, nx), (rs, zs, ns) = jnp.split(x, 3, axis=-1), jnp.split(s, 3, axis=-1)
    keep = jax.nn.sigmoid(zx + zs)
    new = jnp.tanh(nx + jax.nn.sigmoid(rx + rs) * ns)
    return ((1 - keep) * new + keep * state[:, 0])[:, None]


@register
class StateCache:
    """The cache of a recurrent decoder: its states, and the memory that it reads.

    It holds a text of any length. Until there is a source, S is 0, as in `CrossAttentionCache`.

    Attributes:
      state: `[L, B, n, H]`, float32, the state of each layer.
      memory: `[B, S, M]`, the encoded source.
      keys: `[B, S, A]`, the memory's contribution to the attention scores.
      valid: bool `[B, S]`, False for padding of the source.
      length: int32 `[B]`, the number of tokens read in each row.
    """

    state: jax.Array
    memory: jax.Array
    keys: jax.Array
    valid: jax.Array
    length: jax.Array

    @classmethod
    def zeros(cls, kind: str, layers: int, batch: int, width: int, dtype: str) -> StateCache:
        """Make the cache before the source is read.

        `width` is that of the state and of the memory, `dtype` that of the memory.
        """
        state = jnp.zeros((layers, batch, STATES[kind], width), jnp.float32)
        nothing = jnp.zeros((batch, 0, width), dtype)
        return cls(
            state, nothing, nothing, jnp.zeros((batch, 0), jnp.bool_), jnp.zeros(batch, jnp.int32)
        )

    def reading(
        self,
        valid: Bool[Array, "B S"],
        memory: Float[Array, "B S M"],
        start: Float[Array, "L B n H"],
    ) -> StateCache:
        """Return the cache with a source, which begins at the states `start`.

        `remember` writes the keys.
        """
        room = jnp.zeros((*valid.shape, self.keys.shape[-1]), self.keys.dtype)
        return StateCache(start, memory, room, valid, self.length)

    def remember(
        self,
        layer: jax.Array | int,
        state: Float[Array, "B n H"],
        keys: Float[Array, "B S A"] | None,
    ) -> StateCache:
        """Return the cache after a layer's steps, with the keys if the layer reads the memory."""
        states = jax.lax.dynamic_update_slice(self.state, state[None], (layer, 0, 0, 0))
        keys = self.keys if keys is None else keys.astype(self.keys.dtype)
        return dataclasses.replace(self, state=states, keys=keys)

    def positions(self, t: int) -> Int[Array, "B T"]:
        """Return the positions of the next `t` tokens of each row."""
        return self.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]

    def checked(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the activations unchanged: there is always room."""
        return x

    def advance(self, count: Int[Array, " B"] | int) -> StateCache:
        """Return the cache with `count` more tokens in each row."""
        return dataclasses.replace(self, length=self.length + count)
