"""The groups of options of `jaxmodel train`: boxes of the help, and sections of a config file."""

from __future__ import annotations

SECTIONS = ("model", "data", "optim", "train", "run")
"""Sections of a config file."""
BOXES: dict[str, tuple[str, str]] = {
    "model options": (
        "model",
        "model init task trainable lora adapter width depth heads dtype activation_dtype remat "
        "unroll",
    ),
    "data options": ("data", "data weights heldout field pack augment batch context vocab"),
    "optimizer options": (
        "optim",
        "optimizer learning_rate schedule warmup_steps final_lr_fraction stable_fraction step_size "
        "gamma weight_decay max_grad_norm b2",
    ),
    "training options": (
        "train",
        "steps seed gradient_accumulation_steps ema_decay eval_every eval_batches patience",
    ),
    "device options": (
        "run",
        "mesh devices microbatches pipeline gradient_compression top_k_fraction",
    ),
    "fault options": (
        "run",
        "on_bad_step spike save_every save_seconds checkpoints watchdog notices",
    ),
    "output options": (
        "run",
        "out json runs log_every sample profile tensorboard config print_config",
    ),
}
"""Title of a box -> the section, and the options in it, in order."""

BOX_OF = {name: title for title, (_, names) in BOXES.items() for name in names.split()}
"""Option -> the box of the help that it is in; others are in the box `options`."""


def section(option: str) -> str:
    """Return the section of a config file that an option is in.

    >>> section("learning_rate"), section("mesh"), section("steps")
    ('optim', 'run', 'train')
    """
    return BOXES[BOX_OF[option]][0]
