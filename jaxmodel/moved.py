"""Old names: they still work, with a warning that says which name to use now."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_MOVED = {
    "adapt": {
        "adapt": "coordinates=coord_check scale_updates=scale_by_path transplant=load_matching"
    },
    "checkpoint": {"checkpoint": "Keep=RetentionPolicy"},
    "distributed": {"distributed": "Ledger=GoodputRecorder Supervisor=RunMonitor"},
    "compress": {
        "compress.report": "COLUMNS",
        "text_form": "text_of=write",
        "compress.recipe_file": "SUFFIXES",
        "compress.recipes": "NAMED=RECIPES named=get_recipe",
        "compress.variants": "VERSIONS",
        "compress": "versions=variants",
    },
    "data": {
        "data.examples": "Answers",
        "data.given": "as_batches",
        "data.images": "Images",
        "data": "Paired=WithUnlabelled Pairs=SyntheticSeq2Seq take=subset",
        "data.pack": "Bins=PackedRows",
        "data.packed_shards": "ShardWindows",
        "data.sources": "Documents records",
        "data.text": "NAMES Text",
    },
    "data.augment": {
        "data.augment.base": "Chain ImageAugmentation",
        "data.augment.colour": (
            "Autocontrast Brightness ColourJitter Contrast Equalize Greyscale Hue Invert "
            "Posterize Saturation Sharpness Solarize"
        ),
        "data.augment.damage": "Blur",
        "data.augment.geometric": (
            "Affine HorizontalFlip RandomResizedCrop Rotate Scale Shear Translate VerticalFlip"
        ),
        "data.augment.text": "LocalShuffle SentenceShuffle TokenDropout",
    },
    "evaluate": {
        "evaluate.compare": "COLUMNS resident_bytes",
        "evaluate.perplexity": "summarize",
    },
    "generation": {
        "generation.beam": "Beams",
        "generation": "Request=GenerationRequest Sampling=SamplingParams "
        "running_only=for_inference",
        "generation.generate": "Completion=GenerationResult",
        "generation.hypotheses": "Hypothesis",
        "generation.sampling": "filter_logits sample",
    },
    "hub": {
        "hub.bundle": "check_target",
        "hub.pretrained": "KNOWN",
    },
    "layers": {
        "layers.batch_norm": "fold_batch_norm",
        "layers.cross": "CrossAttention",
        "layers.encoder": "AttentionPool EncoderBlock PooledHead",
        "layers.moe": "load_balance real_tokens",
        "layers.patches": "Patches",
        "layers.recurrent": "Additive=BahdanauAttention Multiplicative=LuongAttention Recurrent",
    },
    "layers.connect": {
        "layers.connect.groups": "edge_name weight_names",
        "layers.connect.sparse": "block_columns",
    },
    "leaves": {
        "leaves.fields": "check_fields static_fields",
        "leaves.leaf": "from_tensors to_tensors",
        "leaves.packing": "pack unpack",
        "leaves.sparse": "expand",
    },
    "losses": {
        "losses.chosen": "checked_loss",
        "losses.contract": "IGNORED counting model_inputs",
        "losses.factory": "Each=PerExampleLoss",
        "losses.labels": "class_means=online_label_smoothing class_sums distribution",
        "losses.views": "info_nce",
    },
    "models": {
        "adapt": "coordinates=coord_check initialize mup scale_updates=scale_by_path",
        "adapt.maximal_update": "Mup",
        "models.foreign": "set_state",
        "models.parts": "Inputs",
    },
    "ops": {
        "ops": "Seen=AttentionMask blocks=block_sparse_matmul take=embed",
        "ops.contract": "round_rows=quantize_rows",
        "ops.edges": "EdgeBlock Edges edge_sum edges_of",
        "ops.memory": "MemoryCache=CrossAttentionCache",
        "ops.norms": "Measured=BatchStatsProbe on_last",
        "ops.probe": "GRADIENT histogram tap zeros_for",
        "ops.product": "compiler_options",
        "ops.recurrent": "StateCache",
        "ops.rope": "rope_frequencies",
    },
    "report": {
        "files": "atomic_write",
        "progress": "bar progress set_quiet step",
        "report.json_out": "check_target clean_stdout emit goal_met rows to_plain",
        "report.run": "versions",
        "report.shown": "card",
        "report.table": "console_for",
    },
    "train": {
        "adapt": (
            "ADAPTERS LoRA last_layers layer_rates lora merge_adapters replace_head "
            "transplant=load_matching "
            "with_adapters"
        ),
        "checkpoint": "Checkpoints Keep=RetentionPolicy fingerprint",
        "contrib": (
            "confident_learning count_active fixmatch masked_patches mean_teacher pretext "
            "pseudo_label revive sigmoid_ramp unit_dictionary with_projection without_projection"
        ),
        "contrib.selfsupervised": "patch_error restored two_views",
        "contrib.semi": "linear_ramp pseudo_labels",
        "distributed": "Ledger=GoodputRecorder Supervisor=RunMonitor Watchdog process_began "
        "stop_signals",
        "losses": (
            "Loss autoencoder classification contrastive cross_entropy next_token regression "
            "regularized supervised"
        ),
        "optim": "Guard optimizer project quantize_weights sam schedule",
        "optim.optimizers": "each_layer scale_by_adam8",
        "optim.schedules": "reduce_on_plateau",
        "train": "set_batch_statistics=recalibrate_batch_norm",
        "train.gradients": "accumulated value_and_grad",
        "train.pipeline": "one_forward_one_backward",
        "train.state": "init_state state_shardings",
        "train.step": "make_step",
    },
}
_MODULES = {
    "train": {
        "losses": "losses",
        "page": "report.training",
        **{
            name: f"optim.{name}"
            for name in ("optimizers", "schedules", "masters", "quantized", "rounding", "guard")
        },
        **{name: f"distributed.{name}" for name in ("launch", "faults", "ledger", "supervise")},
        **{name: f"contrib.{name}" for name in ("semi", "selfsupervised", "dictionary")},
        "checkpoint": "checkpoint.manager",
        "finetune": "adapt.finetune",
    },
}

CONFIG = {
    "accumulate": "gradient_accumulation_steps",
    "average": "ema_decay",
    "bad": "on_bad_step",
    "beta2": "b2",
    "clip": "max_grad_norm",
    "drop": "gamma",
    "drop_every": "step_size",
    "end_rate": "final_lr_fraction",
    "exchange": "gradient_compression",
    "exchange_share": "top_k_fraction",
    "stable": "stable_fraction",
    "warmup": "warmup_steps",
}
"""Old names of fields of `TrainConfig`, which are options of `jaxmodel train` too."""

POLICY = {"cache": "cache_dtype", "compute": "compute_dtype", "stream": "activation_dtype"}
"""... and of `Policy`."""

OPTIONS = {**CONFIG, "stream": "activation_dtype"}
"""... and of options of `jaxmodel train`."""

LAUNCH = ("processes", "devices_per_process", "elastic", "regrow")
"""Options of `jaxmodel launch` that `train` had once."""


def current(record: Mapping[str, Any], now: Mapping[str, str] = CONFIG) -> dict[str, Any]:
    """Give the fields of a stored `TrainConfig`, or policy, the names that they have now.

    >>> current({"steps": 3, "clip": 1.0})
    {'steps': 3, 'max_grad_norm': 1.0}
    """
    return {now.get(name, name): value for name, value in record.items()}


def keywords[F: Callable[..., Any]](**now: str) -> Callable[[F], F]:
    """Decorate a function or a dataclass: old names of arguments and fields still work.

    Args:
      now: old name -> the name that it has now.

    >>> @keywords(beta2="b2")
    ... def adam(b2=0.9):
    ...     return b2
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     print(adam(beta2=0.5), said[0].message)
    0.5 adam: beta2 is b2 now
    """

    def decorate(function: Any) -> Any:
        kind: Any = function if isinstance(function, type) else None
        call: Callable[..., Any] = function if kind is None else kind.__init__

        @functools.wraps(call)
        def made(*args: Any, **values: Any) -> Any:
            for old in values.keys() & now.keys():
                _say(f"{function.__name__}: {old} is {now[old]} now", 3)
                values[now[old]] = values.pop(old)
            return call(*args, **values)

        if kind is None:
            return made
        kind.__init__ = made
        for old, new in now.items():
            setattr(kind, old, property(functools.partial(_read, old, new)))
        return function

    return decorate


def _read(old: str, new: str, value: Any) -> Any:
    _say(f"{type(value).__name__}.{old} is {new} now", 4)
    return getattr(value, new)


def spelling(what: str, name: str, known: Iterable[str]) -> str:
    """Return the name that a name without its underscores, as texts had it, has now.

    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     print(spelling("bound", "maxnorm", ["max_norm"]), said[0].message)
    max_norm bound: maxnorm is max_norm now
    """
    known = set(known)
    now = next((one for one in known - {name} if one.replace("_", "") == name), None)
    if now is None or name in known:
        return name
    _say(f"{what}: {name} is {now} now", 3)
    return now


def _say(line: str, level: int) -> None:
    warnings.warn(line, DeprecationWarning, stacklevel=level)


def attach(package: str) -> None:
    """Let a package find its old names, besides what its own `__getattr__` finds.

    Type checkers do not see this, so that they know the new names alone.

    Args:
      package: its `__name__`; called at the end of its `__init__`.

    >>> import jaxmodel.train
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     found = jaxmodel.train.classification
    >>> found.__module__
    'jaxmodel.losses.factory'
    >>> str(said[0].message)
    'jaxmodel.train.classification is jaxmodel.losses.classification now'
    """
    module = sys.modules[package]
    short = package.removeprefix("jaxmodel.")
    own = vars(module).get("__getattr__")
    homes: dict[str, tuple[str, str]] = {
        old: (f"jaxmodel.{home}", new or old)
        for home, names in _MOVED.get(short, {}).items()
        for old, _, new in (name.partition("=") for name in names.split())
    }
    modules = {name: f"jaxmodel.{home}" for name, home in _MODULES.get(short, {}).items()}

    def find(name: str) -> Any:
        if name in modules:
            _say(f"{package}.{name} is {modules[name]} now", 3)
            return importlib.import_module(modules[name])
        if name in homes:
            home, now = homes[name]
            _say(f"{package}.{name} is {home}.{now} now", 3)
            return getattr(importlib.import_module(home), now)
        if own is not None:
            return own(name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    vars(module)["__getattr__"] = find
