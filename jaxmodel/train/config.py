"""`TrainConfig`: how to train, and the optimiser that it describes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax

from jaxmodel import moved, tree
from jaxmodel.axes import UNDECLARED, Axes, role_of
from jaxmodel.brief import briefly
from jaxmodel.errors import InputError, at_least, named_fields
from jaxmodel.optim.guard import Guard
from jaxmodel.optim.optimizers import optimizer
from jaxmodel.optim.schedules import reduce_on_plateau, schedule
from jaxmodel.train.exchange import GradientCompression
from jaxmodel.train.options import TrainOptions

OTHER_NAMES = {
    **dict.fromkeys(("lr", "max_lr", "rate"), "learning_rate"),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "updates"), "steps"),
    **dict.fromkeys(
        ("epochs", "num_epochs", "num_train_epochs"),
        "steps are counted: epochs x rows // batch_size",
    ),
    "batch_size": "a stream has its own: data.Stream(rows, batch_size=32)",
    **dict.fromkeys(("lr_schedule", "lr_scheduler_type", "scheduler"), "schedule"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("beta2", "adam_beta2"), "b2"),
    "wd": "weight_decay",
    "optim": "optimizer",
    **dict.fromkeys(("clip", "grad_clip", "gradient_clip_norm"), "max_grad_norm"),
    **dict.fromkeys(("accumulate", "grad_accum"), "gradient_accumulation_steps"),
    **dict.fromkeys(("ema", "average"), "ema_decay"),
    "early_stopping": "patience",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "random_seed": "seed",
}
"""Names of other frameworks that are not accepted -> our field, or what to do instead."""


@moved.keywords(**moved.CONFIG)
@briefly
@named_fields(OTHER_NAMES)
@dataclasses.dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """The settings of a training run.

    Attributes:
      decay: rules, path -> whether the weights decay; None for matrices, tables and heads, by the
        model's axes.
      trainable: rules, path -> whether the leaf trains; None for every plain floating leaf but
        statistics (see `tree.partition`).
      eval_rows: the number of held-out rows to evaluate, from the start of their stream; 0 for all
        of them, each once.

    Raises:
      InputError: a number is out of range, or a name is unknown.
    """

    decay: tree.Rules | None = None
    trainable: tree.Rules | None = None
    eval_rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("eval_rows", self.eval_rows, 0)

    @property
    def evaluations(self) -> int:
        """The number of held-out evaluations in a run."""
        return -(-self.steps // self.eval_every) if self.eval_every else 1

    def check_patience(self) -> None:
        """Refuse a patience that is too large ever to stop a run of this length.

        Raises:
          InputError: there are too few held-out evaluations.
        """
        if self.patience and self.patience >= self.evaluations:
            raise InputError(
                f"patience: {self.patience} given for {self.steps} steps with {self.evaluations} "
                "held-out loss(es), so it would never stop the run; allowed: fewer, or a smaller "
                f"eval_every than {self.eval_every or self.steps}"
            )

    def guard(self) -> Guard:
        """Return the guard that detects bad steps."""
        return Guard(self.spike)

    def made_exchange(self) -> GradientCompression | None:
        """Return how gradients are summed over the data axis; None leaves it to XLA."""
        if self.gradient_compression == "exact":
            return None
        return GradientCompression(self.gradient_compression, self.top_k_fraction)

    def due(self, i: int) -> set[str]:
        """Return what is due after update `i`.

        The set may hold "row" (of the history), "heldout" (an evaluation) and "save" (a
        checkpoint).
        """
        last = i == self.steps
        heldout = last or bool(self.eval_every and i % self.eval_every == 0)
        row = heldout or i == 1 or i % self.log_every == 0
        save = bool(self.save_every and i % self.save_every == 0)
        return {
            name for name, wanted in (("row", row), ("heldout", heldout), ("save", save)) if wanted
        }


if TrainConfig.__doc__ and TrainOptions.__doc__:  # both are None under python -OO
    values = TrainOptions.__doc__.partition("Attributes:\n")[2].partition("\n\n")[0]
    TrainConfig.__doc__ = TrainConfig.__doc__.replace("Attributes:\n", f"Attributes:\n{values}\n")


def schedule_of(config: TrainConfig) -> optax.Schedule:
    """Return the learning-rate schedule; for a plateau, the rate before it is lowered."""
    return schedule(
        config.schedule,
        config.learning_rate,
        config.steps,
        warmup_steps=min(config.warmup_steps, config.steps // 2),
        final_lr_fraction=config.final_lr_fraction,
        stable_fraction=config.stable_fraction,
        step_size=config.step_size or None,
        gamma=config.gamma,
    )


def rate_of(rate: optax.Schedule, opt_state: Any, bad: bool) -> float:
    """Return the learning rate of the update that led to a state of `make_optimizer`.

    It follows the optimiser's own count, which skipped steps do not advance. For a bad step it is
    the rate that the step would have had.
    """
    kinds: Any = optax.ScaleByScheduleState, optax.contrib.ReduceLROnPlateauState
    known: list[Any] = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    count: int = next(int(one.count) for one in known if isinstance(one, kinds[0]))
    lowered = next((float(one.scale) for one in known if isinstance(one, kinds[1])), 1.0)
    used: Any = rate(count if bad else max(count - 1, 0))
    return float(used) * lowered


def make_optimizer(config: TrainConfig, axes: Axes = UNDECLARED) -> optax.GradientTransformation:
    """Make the optimiser that a config describes.

    It is gradient clipping, then the optimiser of that name with its schedule, and decay by rules.

    Args:
      config: see `TrainConfig`.
      axes: the model's axes, which say what is a matrix; without them that is guessed from names
        and shapes.
    """
    chain = [
        optax.clip_by_global_norm(config.max_grad_norm)
        if config.max_grad_norm
        else optax.identity(),
        optimizer(
            config.optimizer,
            schedule_of(config),
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=None if config.decay is None else functools.partial(_decays, config.decay),
            roles=role_of(axes),
            seed=config.seed,
        ),
    ]
    if config.schedule == "plateau":
        patience = config.step_size or max(1, config.steps // 20)
        # The losses are of single batches, so they are averaged over enough of them for a steady
        # mean.
        chain.append(
            reduce_on_plateau(config.gamma, 1, window=patience, least=config.final_lr_fraction)
        )
    return optax.chain(*chain)


def _decays(rules: tree.Rules, params: tree.Params) -> tree.Params:
    """Return which leaves decay."""
    values = tree.assign(rules, params)

    def value(path: str, _: Any) -> bool:
        of_layers = {values[layer] for layer in tree.layer_paths(path)}
        if len(of_layers) > 1:
            raise InputError(
                f"decay: the layers of {path!r} differ; split the tree first (tree.match), as "
                f"`fit` does"
            )
        return of_layers.pop()

    return tree.map_leaves(value, params)


def split_by(config: TrainConfig, params: tree.Params) -> tree.Params:
    """Split the segments of `params` whose layers a rule of the config treats differently."""
    for rules in (config.decay, config.trainable):
        if rules is not None:
            params, _ = tree.match(
                [(tree.optional(pattern), value) for pattern, value in rules], params
            )
    return params
