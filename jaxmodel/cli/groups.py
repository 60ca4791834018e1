"""The boxes of the help: which kind each option is of."""

from __future__ import annotations

GROUPS: dict[str, str] = {
    **dict.fromkeys(
        (
            "steps",
            "optimizer",
            "learning_rate",
            "warmup_steps",
            "schedule",
            "final_lr_fraction",
            "stable_fraction",
        ),
        "optimiser options",
    ),
    **dict.fromkeys(
        (
            "step_size",
            "gamma",
            "weight_decay",
            "max_grad_norm",
            "b2",
            "gradient_accumulation_steps",
            "ema_decay",
        ),
        "optimiser options",
    ),
    **dict.fromkeys(
        ("data", "weights", "heldout", "field", "pack", "augment", "batch", "context", "vocab"),
        "data options",
    ),
    **dict.fromkeys(
        (
            "model",
            "init",
            "task",
            "trainable",
            "lora",
            "adapter",
            "width",
            "depth",
            "heads",
            "dtype",
            "stream",
            "remat",
            "unroll",
        ),
        "model options",
    ),
    **dict.fromkeys(
        ("mesh", "devices", "processes", "devices_per_process", "microbatches", "pipeline"),
        "device options",
    ),
    **dict.fromkeys(("gradient_compression", "top_k_fraction"), "device options"),
    **dict.fromkeys(
        ("on_bad_step", "spike", "save_every", "save_seconds", "checkpoints", "elastic", "regrow"),
        "fault options",
    ),
    **dict.fromkeys(("watchdog", "notices"), "fault options"),
    **dict.fromkeys(
        ("json", "runs", "out", "profile", "tensorboard", "sample", "log_every"), "output options"
    ),
    **dict.fromkeys(("config", "print_config"), "output options"),
    **dict.fromkeys(("eval_every", "eval_batches", "patience"), "evaluation options"),
}
"""Option -> the box of the help where it stands; those of the work itself stand in `options`."""
