"""The loop's answer to bad steps, which the step itself has skipped.

It is to go on, to raise an error, or to go back to a checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodel.checkpoint.manager import Checkpoints
from jaxmodel.errors import InputError, one_of
from jaxmodel.train import position
from jaxmodel.train.state import TrainState

POLICIES = ("skip", "rewind", "stop")
MOST_BAD = 50
"""The limit of bad steps in a row before a run gives up, and of returns to the same step."""


class BadSteps:
    """The consequences of bad steps, by `config.on_bad_step`: "skip", "stop" or "rewind".

    Raises:
      InputError: the policy is unknown.
    """

    def __init__(self, policy: str) -> None:
        one_of("on_bad_step", policy, POLICIES)
        self._policy = policy
        self._row = 0
        self._last = -2
        self._rewound = collections.Counter[int]()
        self._first = 0
        self._told: set[str] = set()

    def rewind_to(
        self, bad: Mapping[int, Mapping[str, str]], i: int, checkpoints: Checkpoints | None
    ) -> int | None:
        """Return the step to go back to, or None to go on.

        A leaf of the data that is not finite is reported once.

        Args:
          bad: number of a bad step -> the leaves of its batch that are not finite, each with the
            value and its place (`placing.not_finite`).
          i: the number of steps taken.
          checkpoints: where to go back to.

        Raises:
          InputError: the policy is to stop, or there are too many bad steps.
        """
        for number, leaves in bad.items():
            self._row = self._row + 1 if number == self._last + 1 else 1
            self._last = number
            what = f"the loss or the gradient of step {number + 1} is not finite or a spike"
            cause = " and ".join(leaves.values())
            what += f" ({cause})" if cause else ""
            if self._policy == "stop":
                raise InputError(
                    f"{what}; allowed: --on-bad-step skip or --on-bad-step rewind to go on, or a "
                    f"smaller learning rate"
                )
            if self._row >= MOST_BAD:
                raise InputError(
                    f"{what}, as were the {MOST_BAD - 1} before; try a smaller learning rate or a "
                    f"longer warm-up"
                )
            if leaves.keys() - self._told and jax.process_index() == 0:
                print(
                    f"jaxmodel: data: {cause}; step {number + 1} is left out, and further batches "
                    f"like it are only counted (`bad` in the history)",
                    file=sys.stderr,
                )
            self._told |= leaves.keys()
            if self._policy == "rewind" and checkpoints is not None:
                checkpoints.wait()
                if (back := checkpoints.latest(at_most=number)) is not None:
                    self._first = number
                    self._rewound[back] += 1
                    if self._rewound[back] >= MOST_BAD:
                        raise InputError(
                            f"{what}, after going back to step {back} for the {MOST_BAD}th time"
                        )
                    return back
        return None

    def rewind(
        self, current: TrainState, i: int, back: int, restored: TrainState | None
    ) -> TrainState:
        """Return the restored state, with its data moved past the bad batch.

        The position is counted in batches as they are now; those of the checkpoint may have had
        another size.
        """
        assert restored is not None and int(restored.step) == back
        past = int(current.data_step) - (i - self._first) + 1
        moved = jax.device_put(jnp.int32(past), restored.data_step.sharding)
        return dataclasses.replace(position.counted_as(restored, current), data_step=moved)
