"""What `jaxmodel train` refuses by its options alone, before it reads a text or a model."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from jaxmodel.cli.options import Train
from jaxmodel.errors import InputError, one_of, require, unknown
from jaxmodel.files import check_writable

_OF_NEW = ("vocab", "width", "depth", "heads")


def check(options: Train) -> None:
    """Refuse options that no run could be made of or that do nothing, and missing packages.

    Raises:
      InputError: says which option it is.
    """
    from jaxmodel import data, sharding
    from jaxmodel.cli import tasks
    from jaxmodel.hub.bundle import check_target

    default = {field.name: field.default for field in dataclasses.fields(Train)}
    given = {name for name, value in default.items() if getattr(options, name) != value}
    if options.model is not None and options.init is not None:
        raise InputError(
            f"--init: {options.init!r} given with --model {options.model!r}; allowed: one of the "
            f"two: --model for a new model, --init for weights that are there"
        )
    if options.model is not None:
        tasks.size(options)
    begins = "--init" if options.init is not None else "--model"
    for own in _OF_NEW:
        if own in given and (options.init is not None or (options.model and own != "vocab")):
            raise InputError(
                f"--{own}: {getattr(options, own)} given with {begins}, which has its own; "
                f"allowed: without it"
            )
    if options.trainable and options.lora is not None:
        raise InputError(
            "--trainable: given with --lora, where the adapters alone train; allowed: one of both"
        )
    if options.init is options.model is None and options.width % options.heads:
        near = [n for n in range(1, options.width + 1) if options.width % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - options.heads))[:4])
        raise InputError(
            f"--heads: {options.heads} given; allowed: a divisor of the width {options.width}: "
            f"{', '.join(map(str, near))}"
        )
    if options.batch % options.gradient_accumulation_steps:
        raise InputError(
            f"--gradient-accumulation-steps: {options.gradient_accumulation_steps} micro-batches "
            f"do not divide a batch of "
            f"{options.batch} rows"
        )
    if options.weights:
        if len(options.weights) != len(options.data):
            said = f"{len(options.weights)} given for {len(options.data)} texts of --data"
            raise InputError(f"--weights: {said}; allowed: one for each")
        if not all(0 < weight < math.inf for weight in options.weights):
            raise InputError(
                f"--weights: {' '.join(map(str, options.weights))} given; allowed: finite numbers "
                f"above 0"
            )
    if options.mesh is not None:
        for axis in re.findall(r"(\w+)\s*=", options.mesh):
            if axis not in (known := (*sharding.BATCH_AXES, *sharding.ACTIVATION_AXES, "tensor")):
                raise unknown("--mesh", axis, set(known))
    cut = options.mesh or ""
    for name, usual, axis in (
        ("gradient_compression", "exact", "data"),
        ("microbatches", 0, "pipeline"),
        ("pipeline", "gpipe", "pipeline"),
    ):
        if (
            getattr(options, name) != usual
            and axis not in cut
            and "JAX_NUM_PROCESSES" not in os.environ
        ):
            raise InputError(
                f"--{name.replace('_', '-')}: {getattr(options, name)} given without an axis "
                f"{axis} in --mesh, so "
                f"it does nothing"
            )
    if options.sample is not None and not options.sample:
        raise InputError("--sample: '' given; allowed: at least one token")
    lora(options)
    config(options)
    if options.tensorboard:
        require("tensorboardX", "notebook")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        require("mlflow", "lifecycle")
    for text in (*options.data, options.heldout or "english"):
        if tasks.images(text):
            continue
        data.documents(text, options.field).check()
    if options.out is not None:
        check_target(options.out, "config.json" if options.lora is None else "adapter_config.json")
    if options.checkpoints is not None and "://" in options.checkpoints:
        data.storage.check_protocol(options.checkpoints, "checkpoints", ("gs", "s3"))
    elif options.checkpoints is not None:
        if Path(options.checkpoints).is_file():
            raise InputError(
                f"--checkpoints: {options.checkpoints!r} is a file; a folder is needed"
            )
        try:
            check_writable(options.checkpoints)
        except OSError as error:
            raise InputError(
                f"--checkpoints: {options.checkpoints!r} cannot be used ({error.strerror})"
            ) from None


def config(options: Train) -> Any:
    """Return the `TrainConfig` that the options come to, all weights training.

    Raises:
      InputError: as the config, or a patience that never stops.
    """
    from jaxmodel import train
    from jaxmodel.cli import corpus

    values: dict[str, Any] = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(train.TrainOptions)
    }
    values["eval_every"] = options.eval_every or max(1, options.steps // 4)
    values["eval_rows"] = options.eval_batches * corpus.HELDOUT_ROWS
    made = train.TrainConfig(**values)
    made.check_patience()
    return made


def lora(options: Train) -> Any:
    """Return the rules of the adapters: for every matrix of the layers, or for those named.

    Raises:
      InputError: a setting that is not known, or adapters without a model to begin with.
    """
    if options.lora is None:
        return None
    if not options.init:
        raise InputError("--lora: given without --init, the model whose weights stay as they are")
    yes = {"true": True, "false": False}
    known = {
        "r": int,
        "alpha": float,
        "dropout": float,
        "rslora": lambda text: yes[text],
        "targets": str,
    }
    found: dict[str, Any] = {}
    for part in options.lora.split(","):
        name, _, text = part.strip().partition("=")
        if re.fullmatch(r"[0-9]+", part.strip()):  # the rank alone
            name, text = "r", part.strip()
        one_of("--lora", name, known)
        try:
            found[name] = known[name](text)
        except (ValueError, KeyError):
            raise InputError(
                f"--lora: {part.strip()!r} given; allowed: such as "
                f"r=8,alpha=16,dropout=0.05,targets=q|v"
            ) from None
    targets = found.pop("targets", None)
    if targets is not None and not re.fullmatch(r"\w+(\|\w+)*", targets):
        raise InputError(
            f"--lora: targets={targets!r} given; allowed: names of matrices, such as q|v"
        )
    from jaxmodel import adapt

    one = adapt.LoRA(found.pop("r", 8), **found)
    return one if targets is None else ((f"(.*/)?blocks/.*/({targets})", one), (".*", None))


def targets(options: Train, model: Any) -> None:
    """Refuse a name among the targets of --lora that no matrix of the model has.

    Raises:
      InputError: says which, and those that there are.
    """
    import jax

    from jaxmodel import axes

    asked = re.search(r"targets=([\w|]+)", options.lora or "")
    roles = axes.roles(model.axes, jax.eval_shape(model.init, jax.random.key(0)))
    there = {
        path.rpartition("/")[2]
        for path, role in roles.items()
        if role == "matrix" and "blocks" in path.split("/")
    }
    for name in asked[1].split("|") if asked else ():
        one_of("--lora: targets", name, there)
    if not there:
        leaves = sorted({path.rpartition("/")[2] for path in roles})
        raise InputError(
            f"--lora: {options.init!r} has no matrices in layers for adapters to stand beside; its "
            f"leaves are {', '.join(leaves[:12])}"
        )
