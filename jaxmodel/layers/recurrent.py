"""Recurrent layers, and the attention by which recurrent decoders read a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer
from jaxmodel.ops.norms import on_last
from jaxmodel.ops.recurrent import GATES

type Read = Callable[[Array], Array]
"""A function from the hidden state before a step, `[B, H]`, to what it reads, `[B, M]`."""


class Recurrent(nn.Module):
    """A layer of LSTM or GRU cells, run over each row by one scan.

    Leaves: input `[G, I]`, state `[G, H]`, input_bias `[G]`, for a GRU state_bias `[G]` (an LSTM
    adds both sums, so one bias is enough), and context `[G, M]` if a memory is read. G is 4H or 3H;
    see `ops.recurrent_step`.

    Attributes:
      kind: "lstm" or "gru".
      width: H of new leaves.
      initializer: the initialiser of the matrices.
      policy: dtypes and placement.
      backward: whether the layer runs from the end of a row to its beginning.
    """

    kind: str
    width: int
    initializer: Initializer
    policy: ops.Policy
    backward: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T I"],
        start: Float[Array, "B n H"],
        mask: Bool[Array, "B T"] | None = None,
        read: Read | None = None,
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B n H"], Float[Array, "B T M"] | None]:
        """Return each step's hidden state, the state after the last step, and what each step read.

        Args:
          x: the inputs; their contribution to the gates is one contraction for the whole row.
          start: the state before the first step, float32.
          mask: False where a step changes nothing, so padding may be on either side.
          read: a function that reads a memory for each step (see `BahdanauAttention`), or None.
        """
        size = GATES[self.kind] * self.width
        stream = self.policy.activation_dtype
        matrix = lambda name, wide: leaf(self, name, self.initializer, (size, wide))
        from_input = ops.einsum("BTI,GI->BTG", x, matrix("input", x.shape[-1]), self.policy)
        given = leaf(self, "input_bias", _remembering(self.kind), (size,))
        from_input = from_input + on_last(given.astype(stream), 3)
        state = matrix("state", start.shape[-1])
        shift = (
            leaf(self, "state_bias", nn.initializers.zeros, (size,)).astype(stream)
            if self.kind == "gru"
            else None
        )
        context = (
            None if read is None else matrix("context", jax.eval_shape(read, start[:, 0]).shape[-1])
        )

        def step(
            old: Array, now: tuple[Array, Array | None]
        ) -> tuple[Array, tuple[Array, Array | None]]:
            given, valid = now
            from_state = ops.einsum("BH,GH->BG", old[:, 0], state, self.policy)
            from_state = from_state if shift is None else from_state + on_last(shift, 2)
            found = None if read is None else read(old[:, 0])
            if found is not None:
                given = given + ops.einsum("BM,GM->BG", found, context, self.policy)
            new = ops.recurrent_step(self.kind, given, from_state, old)
            new = new if valid is None else jnp.where(valid[:, None, None], new, old)
            return new, (new[:, 0].astype(stream), found)

        rows = from_input.swapaxes(0, 1), None if mask is None else mask.swapaxes(0, 1)
        last, (shown, found) = jax.lax.scan(step, start, rows, reverse=self.backward)
        return shown.swapaxes(0, 1), last, None if found is None else found.swapaxes(0, 1)


def _remembering(kind: str) -> Initializer:
    """Return an initialiser of zeros, with ones for an LSTM's forget gate.

    Source: Jozefowicz et al., 2015.
    """

    def bias(key: Any, shape: Any, dtype: Any = jnp.float32, *_: Any) -> jax.Array:
        zeros = jnp.zeros(shape, dtype)
        return zeros.at[shape[0] // 4 : shape[0] // 2].set(1) if kind == "lstm" else zeros

    return bias


class BahdanauAttention(nn.Module):
    """Additive attention `score . tanh(query s + memory_k m)` (Bahdanau et al., 2014).

    s is the state of the step before. Leaves: memory_k `[A, M]`, query `[A, H]`, score `[A]`.

    Attributes:
      width: A of new leaves.
      initializer: the initialiser of the leaves.
      policy: dtypes and placement.
    """

    width: int
    initializer: Initializer
    policy: ops.Policy

    @nn.compact
    def __call__(
        self,
        memory: Float[Array, "B S M"],
        valid: Bool[Array, "B S"],
        keys: Float[Array, "B S A"] | None,
        wide: int,
    ) -> tuple[Read, Float[Array, "B S A"]]:
        """Return a function that reads the memory at a step, and the keys.

        The keys are the memory's contribution to the sums; pass them to later calls.

        Args:
          memory: the encoded source.
          valid: False for padding.
          keys: the keys that an earlier call with this memory returned, or None.
          wide: H of a new query.
        """
        keys = _keys(self, memory) if keys is None else keys
        query = leaf(self, "query", self.initializer, (keys.shape[-1], wide))
        score = leaf(
            self, "score", nn.initializers.normal(self.width**-0.5), (keys.shape[-1],)
        ).astype(jnp.float32)

        def read(shown: Array) -> Array:
            asked = ops.einsum("BH,AH->BA", shown, query, self.policy)
            sums = jnp.tanh((asked[:, None] + keys.astype(asked.dtype)).astype(jnp.float32))
            scores = jnp.einsum("bsa,a->bs", sums, score, precision="highest")
            weights = jax.nn.softmax(jnp.where(valid, scores, -1e30), axis=-1)
            found = jnp.einsum(
                "bs,bsm->bm", weights, memory.astype(jnp.float32), precision="highest"
            )
            return found.astype(self.policy.activation_dtype)

        return read, keys


class LuongAttention(nn.Module):
    """Multiplicative attention `s . memory_k m` (Luong et al., 2015; their score "general").

    s is the state of the same step. Leaf: memory_k `[H, M]`.

    Attributes:
      width: H of a new leaf.
      initializer: the initialiser of the leaf.
      policy: dtypes and placement.
    """

    width: int
    initializer: Initializer
    policy: ops.Policy

    @nn.compact
    def __call__(
        self,
        shown: Float[Array, "B T H"],
        memory: Float[Array, "B S M"],
        valid: Bool[Array, "B S"],
        keys: Float[Array, "B S A"] | None,
    ) -> tuple[Float[Array, "B T M"], Float[Array, "B S A"]]:
        """Return what each step reads, and the keys, to be passed to later calls.

        The arguments are those of `BahdanauAttention`.
        """
        keys = _keys(self, memory) if keys is None else keys
        seen = ops.AttentionMask(valid=valid, causal=False)
        found = ops.attention(
            shown[:, :, None], keys[:, None], memory[:, None], seen, self.policy, scale=1.0
        )
        return found[:, :, 0], keys


def _keys(module: BahdanauAttention | LuongAttention, memory: Array) -> Array:
    w = leaf(module, "memory_k", module.initializer, (module.width, memory.shape[-1]))
    return ops.einsum("BSM,AM->BSA", memory, w, module.policy)
