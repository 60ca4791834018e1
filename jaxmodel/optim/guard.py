"""Bad steps: detecting a loss or gradient that is not finite or a spike, and skipping the step.

Both happen inside the compiled step. A skipped step changes neither parameters nor the optimiser's
state nor averages. All randomness is folded from `data_step`, so the run equals, bit for bit, one
on a stream without that batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmodel.errors import InputError, at_least


@dataclasses.dataclass(frozen=True)
class Guard:
    """The criterion for bad steps.

    Attributes:
      sigmas: a loss or gradient norm is a spike if it exceeds the mean of the last good ones by
        this many standard deviations; 0 for no such check (a loss or norm that is not finite is
        always bad).
      window: the number of good steps for mean and deviation; before there are so many, nothing is
        a spike.

    Raises:
      InputError: sigmas is below 0, or the window below 2.
    """

    sigmas: float = 0.0
    window: int = 128

    def __post_init__(self) -> None:
        if not self.sigmas >= 0:
            raise InputError(
                f"spike: {self.sigmas} given; allowed: 0 for no check, or standard deviations "
                f"above 0, such as 6"
            )
        at_least("window", self.window, 2)

    def init(self) -> dict[str, jax.Array]:
        """Return the initial memory of a state.

        It holds the last good losses and norms, `[window, 2]` (if `sigmas` is above 0), and the
        numbers of good and bad steps.
        """
        seen = {} if self.sigmas == 0 else {"seen": jnp.zeros((self.window, 2), jnp.float32)}
        return {**seen, "good": jnp.zeros((), jnp.int32), "bad": jnp.zeros((), jnp.int32)}

    def judge(
        self, memory: dict[str, jax.Array], loss: jax.Array, norm: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return whether a step is good, and the memory after it.

        >>> guard = Guard(sigmas=6.0, window=4)
        >>> memory = guard.init()
        >>> found = []
        >>> for loss in (2.0, 2.1, 1.9, 2.0, 7.0, jnp.nan):
        ...     ok, memory = guard.judge(memory, jnp.float32(loss), jnp.float32(1.0))
        ...     found.append(bool(ok))
        >>> found
        [True, True, True, True, False, False]
        >>> int(memory["good"]), int(memory["bad"])
        (4, 2)
        """
        found = jnp.stack([loss.astype(jnp.float32), norm.astype(jnp.float32)])
        ok = jnp.all(jnp.isfinite(found))
        new = dict(memory)
        good = memory["good"]
        if self.sigmas:
            seen = memory["seen"]
            # a lower limit of the deviation, so that a nearly constant loss does not give only
            # spikes
            spread = jnp.maximum(jnp.std(seen, axis=0), 1e-3 * jnp.abs(jnp.mean(seen, axis=0)))
            ok &= (good < self.window) | jnp.all(
                found <= jnp.mean(seen, axis=0) + jnp.float32(self.sigmas) * spread
            )
            new["seen"] = jnp.where(ok, seen.at[good % self.window].set(found), seen)
        new["good"], new["bad"] = (
            good + ok.astype(jnp.int32),
            memory["bad"] + (~ok).astype(jnp.int32),
        )
        return ok, new
