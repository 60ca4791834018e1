"""Learning-rate schedules as pure functions of the step, and reduction on a plateau.

The latter follows a value and therefore has a state.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxmodel import moved
from jaxmodel.errors import FACTOR, FROM_ZERO, SHARE, InputError, at_least, one_of, within

type Schedule = Callable[[ArrayLike], Float[Array, ""]]
"""`rate(step)`, step counted from 0."""


@moved.keywords(
    warmup="warmup_steps", end="final_lr_fraction", stable="stable_fraction", every="step_size"
)
def schedule(
    name: str,
    rate: float,
    steps: int,
    *,
    warmup_steps: int = 0,
    final_lr_fraction: float = 0.1,
    stable_fraction: float = 0.8,
    step_size: int | None = None,
    gamma: float = 0.1,
) -> Schedule:
    """Make a learning-rate schedule by name.

    All but "one_cycle" rise linearly from 0 to the peak during the warm-up; then

    - "constant" stays there;
    - "step" is multiplied by `gamma` after each `step_size` steps;
    - "cosine" falls to `final_lr_fraction` times the peak along half a cosine (Loshchilov & Hutter,
      2017);
    - "wsd" (warm-up, stable, decay) stays for `stable_fraction` of the steps, and falls to
      `final_lr_fraction` times the peak in a line (Hu et al., 2024);
    - "one_cycle" rises from 1/25 of the peak along half a cosine, and falls like "cosine" (Smith &
      Topin, 2018);
    - "plateau" stays; `reduce_on_plateau` after the optimiser lowers it.

    Args:
      name: one of these names.
      rate: the peak, at least 0.
      steps: the number of steps of the run. After the last, the rate stays constant, except for
        "step".
      warmup_steps: the number of steps of the rise, less than `steps`. For "one_cycle", Smith and
        Topin use 30 to 45 % of the steps.
      final_lr_fraction: for "cosine", "wsd" and "one_cycle", the last rate as a share of the peak.
      stable_fraction: for "wsd", the share of the steps after the warm-up that stay at the peak, 0
        to 1; with 0 the rate falls linearly from the peak.
      step_size: for "step", the number of steps between two drops; None for a third of those after
        the warm-up.
      gamma: for "step", the factor of a drop, above 0.

    Raises:
      InputError: the name is unknown, or a value is out of range.

    >>> rate = schedule(
    ...     "wsd", 1.0, steps=100, warmup_steps=10, stable_fraction=0.5, final_lr_fraction=0.0
    ... )
    >>> [round(float(rate(i)), 2) for i in (0, 5, 10, 54, 55, 77, 100)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 0.51, 0.0]
    """
    at_least("steps", steps)
    within("rate", rate, FROM_ZERO)
    if not 0 <= warmup_steps < steps:
        raise InputError(
            f"warmup_steps: {warmup_steps} given for {steps} steps; allowed: 0 to {steps - 1}"
        )
    within("final_lr_fraction", final_lr_fraction, SHARE)
    within("stable_fraction", stable_fraction, SHARE)
    within("gamma", gamma, FACTOR)
    rest = steps - warmup_steps
    last = final_lr_fraction * rate
    step_size = max(1, rest // 3) if step_size is None else step_size
    at_least("step_size", step_size)
    flat = round(stable_fraction * rest)
    falls = {
        "constant": lambda step: rate,
        "step": optax.exponential_decay(rate, step_size, gamma, staircase=True),
        "cosine": optax.cosine_decay_schedule(rate, rest, alpha=final_lr_fraction),
        "wsd": optax.linear_schedule(rate, last, max(1, rest - flat), transition_begin=flat),
        "one_cycle": optax.cosine_decay_schedule(rate, rest, alpha=final_lr_fraction),
        "plateau": lambda step: rate,
    }
    one_of("schedule", name, falls)
    if not warmup_steps:
        return _in_float32(falls[name])
    rises = optax.linear_schedule(0.0, rate, warmup_steps)
    if name == "one_cycle":
        missing = optax.cosine_decay_schedule(rate - rate / 25, warmup_steps)
        rises = lambda step: rate - missing(step)
    return _in_float32(optax.join_schedules([rises, falls[name]], [warmup_steps]))


def reduce_on_plateau(
    factor: float = 0.5,
    patience: int = 10,
    *,
    window: int = 1,
    cooldown: int = 0,
    least: float = 0.01,
    rtol: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by a factor that drops when a value has stopped falling.

    Chain it after an optimiser. The value comes with each update:
    `optimizer.update(grads, state, params, value=loss)`. The scale and the best value are in the
    optimiser's state, so a run that continues from a checkpoint keeps them.

    Args:
      factor: the factor of a drop, between 0 and 1.
      patience: the number of windows without a new best value before a drop.
      window: the number of updates whose values are averaged before they are compared. A training
        loss is noisy: take an epoch, or about 100.
      cooldown: the number of windows after a drop that do not count.
      least: the smallest scale.
      rtol: the relative decrease by which a value counts as better.

    Raises:
      InputError: a value out of range.

    >>> optimizer = optax.chain(optax.sgd(1.0), reduce_on_plateau(0.5, patience=2))
    >>> params = jnp.zeros(())
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...     updates, state = optimizer.update(jnp.ones(()), state, params, value=7.0)
    >>> float(updates)  # the first value is the best so far, two more are not better
    -0.5
    """
    if not 0 < factor < 1 or not 0 <= least <= 1 or not 0 < rtol < 1:
        given = f"{factor}, {least}, {rtol}"
        raise InputError(
            f"factor, least, rtol: {given} given; allowed: between 0 and 1 (least: 0 and 1 too)"
        )
    for name, value, low in (
        ("patience", patience, 1),
        ("window", window, 1),
        ("cooldown", cooldown, 0),
    ):
        at_least(name, value, low)
    return optax.contrib.reduce_on_plateau(factor, patience, rtol, 0.0, cooldown, window, least)


def _in_float32(of_step: Callable[..., ArrayLike]) -> Schedule:
    """Return a schedule that computes in float32, where a step is exact up to 2^24.

    Optax's schedules mix integers and floating-point numbers.
    """
    return lambda step: jnp.asarray(of_step(jnp.asarray(step, jnp.float32)), jnp.float32)
