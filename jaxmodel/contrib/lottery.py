"""Lottery tickets: train, prune, rewind the rest to its early weights, and train again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import data, optim, train, tree
from jaxmodel.axes import role_of
from jaxmodel.brief import briefly
from jaxmodel.errors import InputError, at_least
from jaxmodel.leaves.largest import largest
from jaxmodel.losses import Loss, default_loss
from jaxmodel.models import Model
from jaxmodel.optim.zeros import Kept
from jaxmodel.train.config import make_optimizer


@briefly
@dataclasses.dataclass(frozen=True)
class Ticket:
    """A network that was trained with some of its weights at zero.

    Attributes:
      zeros: the fraction of its matrices that is zero.
      state: after training; `optim.kept(state)` has its masks.
      history: of the training, as from `train.fit`.
    """

    zeros: float
    state: train.TrainState
    history: list[dict[str, Any]]


def lottery(
    model: Model,
    stream: data.Batches,
    config: train.TrainConfig,
    fraction: float = 0.2,
    *,
    rounds: int = 5,
    rewind: int = 0,
    loss: Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> list[Ticket]:
    """Train, prune the smallest weights of each matrix, rewind the others, and again.

    The state that a ticket starts from is that of the first run after `rewind` updates, with its
    step, its moments and its batches (Frankle and Carbin, 2019; Frankle et al., 2020).

    Args:
      model: the model.
      stream: the batches.
      config: of each run; the seed is that of the first weights.
      fraction: of the weights left that each round prunes.
      rounds: how many rounds follow the first run, in which nothing is zero.
      rewind: the update to whose weights a ticket is rewound; 0 for the first weights.
      loss: as for `train.fit`.
      optimizer: of the weights that stay; None for that of `config`.

    Returns:
      The tickets, the first one with no zeros.

    Raises:
      InputError: a fraction out of range, or `rewind` beyond the run.
    """
    at_least("rounds", rounds, 0)
    at_least("rewind", rewind, 0)
    if not 0 < fraction < 1:
        raise InputError(f"fraction: {fraction} given; allowed: above 0 and below 1")
    if rewind >= config.steps:
        raise InputError(f"rewind: {rewind} given; allowed: below the {config.steps} of a run")
    loss = default_loss(model, stream.batch(0)) if loss is None else loss
    inner = make_optimizer(config, model.axes) if optimizer is None else optimizer
    wrapped = optim.keep(inner, roles=role_of(model.axes))
    program = train.Program(model, config, loss=loss, optimizer=wrapped)
    early = program.init()
    for i in range(rewind):
        early, _ = program.step(early, program.place(stream.batch(i)))
    tickets: list[Ticket] = []
    masks = _all_true(optim.kept(early.opt_state).masks)
    for _ in range(rounds + 1):
        start = _rewound(early, masks)
        state, history = train.fit(model, stream, config, state=start, loss=loss, optimizer=wrapped)
        whole = tree.count(masks)
        zeros = 1 - sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(masks)) / whole
        tickets.append(Ticket(zeros, state, history))
        masks = _smaller(masks, state.params, fraction)
    return tickets


@jax.jit
def _all_true(masks: tree.Params) -> tree.Params:
    return jax.tree.map(jnp.ones_like, masks)


@jax.jit
def _rewound(early: train.TrainState, masks: tree.Params) -> train.TrainState:
    """Return the early state with masks; the state is copied, because a run donates its own."""
    known = tree.flatten(masks)

    def one(path: str, leaf: Any) -> Any:
        return jnp.where(known[path], leaf, jnp.zeros((), leaf.dtype)) if path in known else leaf

    is_kept = lambda node: isinstance(node, Kept)
    swap = lambda node: node._replace(masks=masks) if is_kept(node) else node
    opt_state = jax.tree.map(swap, early.opt_state, is_leaf=is_kept)
    return train.TrainState(
        early.step, early.data_step, tree.map_leaves(one, early.params), opt_state, early.extra
    )


def _smaller(masks: tree.Params, params: tree.Params, fraction: float) -> tree.Params:
    @jax.jit
    def one(mask: jax.Array, leaf: jax.Array) -> jax.Array:
        there = jnp.sum(mask, axis=(-2, -1), dtype=jnp.int32)
        left = there - jnp.round(there.astype(jnp.float32) * fraction).astype(jnp.int32)
        return largest(jnp.where(mask, jnp.abs(leaf), -jnp.inf), left, axes=2)

    leaves = tree.flatten(params)
    return tree.map_leaves(lambda path, mask: one(mask, leaves[path]), masks)
