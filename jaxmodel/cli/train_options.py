"""The options of `train`, of `launch`, and of the verbs that go on with a run of `train`."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from jaxmodel.cli.common import NAMES, Common, defaults
from jaxmodel.errors import FROM_ZERO
from jaxmodel.train.options import RANGES, TrainOptions

_COUNT = (lambda n: 1 <= n <= 512, "1 to 512")
_MESH = (
    "Shape of the device mesh to train on: 'fsdp=4,tensor=2' for eight devices; one length may be "
    "*, which takes all devices that are left. Axes: data (cuts the batch), fsdp (cuts the batch "
    "and the parameters), tensor (cuts heads and widths), sequence (cuts positions), pipeline "
    "(cuts layers), expert (cuts experts, in models that have them)."
)
_RUN = arg(metavar="RUN", help="The run folder that `train` left: runs/<time>-train.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Common, TrainOptions):
    """Train a model and save it as a bundle.

    By default this trains a small new GPT on a text. --model trains a new model of any
    architecture, --init fine-tunes existing weights: all of them, some of them (--trainable), or
    adapters beside them (--lora). It runs on one device or on a mesh of many.

    Attributes:
      model: Train a new model of this architecture and size from random weights; `jaxmodel models`
        lists them. A bundle, a known name or a hub id given here is taken as --init.
      init: Fine-tune these weights, with their own tokenizer, instead of training a new model: a
        bundle folder, a known name or a hub id, as MODEL of the other verbs.
      task: Training task: to predict the next token (language), to predict hidden tokens (masked),
        to classify texts or images (classify), to give texts of the same meaning similar
        vectors (embed), or to write one text given another (seq2seq).
      trainable: Train only the parameters whose whole path matches one of these regular
        expressions, such as 'head.*' or 'blocks/(2|3)/.*', and freeze the others. `jaxmodel
        summary` lists the paths.
      lora: Freeze the weights of --init and train low-rank adapters (LoRA) of this rank beside
        them. Give a number, or settings such as 'r=8,alpha=16,dropout=0.05,targets=q|v'; the
        default targets are all matrices of the layers but those of experts. Only the adapters
        (and the head of a classifier, which trains too) are saved, in PEFT's format, for --adapter
        of the other verbs.
      learning_rate: Peak of the learning-rate schedule.
      eval_every: Updates between two evaluations on the held-out data; 0 for four evaluations
        during the run.
      eval_batches: Number of held-out rows to evaluate, in units of sixteen rows. The rows are the
        same for every batch size and seed.
      seed: Seed of the initial weights, the order of the data and the sample.
      out: Folder in which the trained bundle (or the adapters) is saved.
      checkpoints: Folder of the checkpoints, or a URL such as gs://... or s3://.... If a run with
        the same options left checkpoints there, this run continues from the last one, for example
        on a restarted machine with an empty disk.
      weights: Proportions in which several texts are mixed.
      heldout: Held-out text, or rows, to evaluate on; the same formats as --data.
      field: Field or column that holds the text, in files of records or tables.
      pack: Pack whole documents into each row, separated by the attention mask, instead of cutting
        the concatenated documents into windows.
      augment: Random changes to each batch, such as 'token_dropout(0, rate=0.1)' or
        'local_shuffle(3)'; several are joined by '|'.
      batch: Rows in a batch.
      context: Tokens in a row; for a new model also the longest text that it can read.
      vocab: Size of the vocabulary (byte-level BPE) that is learnt from the training text; the
        least is 257.
      width: Width of the new GPT.
      depth: Number of layers of the new GPT.
      heads: Number of attention heads in each layer of the new GPT; it must divide the width.
      dtype: Type in which matrix products are computed; weights and optimiser state stay float32.
      activation_dtype: Type in which activations are kept between the matrix products. Training is
        fastest if this and --dtype are bfloat16.
      remat: Recompute in the backward pass to save memory: nothing (none), whole blocks, which
        is full, or all but the results of matrix products (dots).
      unroll: Number of layers in each turn of the loop over the layers. More run faster on a CPU
        but take longer to compile.
      microbatches: Micro-batches of a mesh with a pipeline axis, a multiple of its stages; 0 for
        one for each stage.
      devices: Simulate this many devices on the CPU, to try a --mesh without having the devices;
        slower than one.
      watchdog: Stop a process that has made no step for this many seconds, and report the rank that
        is stuck; 0 for never.
      notices: URL to poll for notices of maintenance; when one appears, the run saves a checkpoint
        and stops.
      config: Read options from a YAML or TOML file (or '-' for YAML on standard input) with the
        sections model, data, optim, train and run; options on the command line override it. Each
        run writes such a file to its folder.
      print_config: Print all options as such a file and exit.
      profile: Write an XProf trace of three steps to the run folder.
      tensorboard: Also log for TensorBoard. For MLflow, set the environment variable
        MLFLOW_TRACKING_URI to a place such as sqlite:///runs.db.
      sample: Prompt of the sample that the trained model writes at the end.
    """

    LEAST: ClassVar = {
        **dict.fromkeys(
            ("steps", "batch", "width", "depth", "heads", "log_every", "eval_batches"), 1
        ),
        **dict.fromkeys(("gradient_accumulation_steps", "unroll"), 1),
        "devices": _COUNT,
        **dict.fromkeys(
            ("warmup_steps", "eval_every", "save_every", "patience", "microbatches"), 0
        ),
        "context": 2,
        "vocab": 257,  # all bytes and the end of a text
        "watchdog": FROM_ZERO,
    }

    model: Annotated[
        str | None, arg(metavar="FAMILY/SIZE", help_behavior_hint="(default: a new GPT)")
    ] = None
    init: Annotated[
        str | None, arg(metavar="BUNDLE", help_behavior_hint="(default: random weights)")
    ] = None
    task: Annotated[
        Literal["language", "masked", "classify", "embed", "seq2seq"] | None,
        arg(
            metavar="{language,masked,classify,embed,seq2seq}",
            help_behavior_hint="(default: what suits the model and the data)",
        ),
    ] = None
    trainable: Annotated[
        tuple[str, ...], arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="(default: all)")
    ] = ()
    lora: Annotated[
        str | None, arg(metavar="RANK", help_behavior_hint="(default: train all weights)")
    ] = None
    learning_rate: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]  # a number from `__post_init__` on
        float | None,
        arg(
            metavar="FLOAT",
            help_behavior_hint="(default: 3e-3 for a new model, 2e-4 for adapters, 2e-5 for all "
            "weights of --init)",
        ),
    ] = None
    eval_every: int = 0
    eval_batches: int = 8
    seed: int = 0
    out: Annotated[
        str | None,
        arg(metavar="FOLDER", help_behavior_hint="(default: bundle/ in the run folder)"),
    ] = None
    checkpoints: Annotated[
        str | None,
        arg(metavar="PLACE", help_behavior_hint="(default: checkpoints/ in the run folder)"),
    ] = None
    data: Annotated[
        tuple[str, ...],
        arg(
            metavar="TEXT [TEXT ...]",
            help=f"Data to train on. Texts: a UTF-8 file, or one of {', '.join(NAMES)}; .jsonl, "
            ".ndjson, .json, .csv, .tsv, .parquet or .arrayrecord (see --field), a folder saved by "
            "`datasets`, 'hf:NAME', a pattern with *, or a URL such as gs://... or s3://.... "
            "Records with 'messages' (a chat) or "
            "with 'prompt' and 'completion': only the answers count in the loss. Records with "
            "'text' and 'label': classes. Records with two texts: pairs. A folder of images with "
            "a sub-folder for each class.",
        ),
    ] = ("english_train",)
    weights: Annotated[
        tuple[float, ...], arg(metavar="W [W ...]", help_behavior_hint="(default: equal)")
    ] = ()
    heldout: Annotated[
        str | None,
        arg(
            metavar="TEXT",
            help_behavior_hint="(default: english; a tenth of the rows with answers, pairs or "
            "classes)",
        ),
    ] = None
    field: Annotated[str, arg(metavar="NAME")] = "text"
    pack: bool = False
    augment: Annotated[str | None, arg(metavar="CHAIN", help_behavior_hint="(default: none)")] = (
        None
    )
    batch: int = 16
    context: int = 128
    vocab: int = 1024
    width: int = 128
    depth: int = 4
    heads: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    microbatches: int = 0
    mesh: Annotated[
        str | None,
        arg(
            metavar="SHAPE",
            help=_MESH,
            help_behavior_hint="(default: one device; data=* with several processes)",
        ),
    ] = None
    devices: int = 1
    watchdog: float = 0.0
    notices: Annotated[
        str | None,
        arg(
            metavar="URL",
            help_behavior_hint="(default: the machine's metadata server, if it has one)",
        ),
    ] = None
    config: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    print_config: bool = False
    profile: bool = False
    tensorboard: bool = False
    sample: Annotated[
        str | None,
        arg(
            metavar="TEXT",
            help_behavior_hint="(default: the first held-out question of chats and of prompts "
            "with completions, else 'The ')",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.model is not None and self.init is None and not _is_size(self.model):
            object.__setattr__(self, "init", self.model)
            object.__setattr__(self, "model", None)
        if self.learning_rate is None:
            usual = 3e-3 if self.init is None else 2e-5 if self.lora is None else 2e-4
            object.__setattr__(self, "learning_rate", usual)
        super().__post_init__()
        places: dict[str, Any] = {"data": tuple(map(_text_from_anywhere, self.data))}
        places |= {} if self.heldout is None else {"heldout": _text_from_anywhere(self.heldout)}
        places |= {
            name: _place_from_anywhere(getattr(self, name)) for name in ("out", "checkpoints")
        }
        if self.init is not None and os.path.exists(self.init):
            places["init"] = os.path.abspath(self.init)
        for name, place in places.items():  # a run is resumed from any folder
            object.__setattr__(self, name, place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Start a run of several processes on this machine, to try what a cluster does.

    COMMAND is `train` or `resume` with its options: `jaxmodel launch --processes 2 train --data
    pydoc --mesh 'data=*'`. On a cluster `jaxmodel train` is started once on each host instead; the
    processes find each other on TPU pods, under Slurm, Open MPI and Kubernetes, and through the
    environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Attributes:
      processes: Number of processes to start.
      devices_per_process: Number of CPU devices that each process simulates.
      elastic: When a process dies, continue from the last checkpoint with one process fewer, and
        later with all of them again.
      regrow: Seconds after which an elastic run returns to all of its processes.
    """

    LEAST: ClassVar = {"processes": _COUNT, "devices_per_process": _COUNT, "regrow": FROM_ZERO}

    command: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="COMMAND",
            help="`train` or `resume`, with its options.",
            help_behavior_hint="(required)",
        ),
    ]
    processes: int
    devices_per_process: int = 1
    elastic: bool = False
    regrow: float = 30.0


_Int = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as before)")]
_Float = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: as before)")]
_Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="(default: as before)")]
_Type = Annotated[
    Literal["float32", "bfloat16"] | None,
    arg(metavar="{float32,bfloat16}", help_behavior_hint="(default: as before)"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume(Common):
    """Go on with a run of `train` that was stopped or killed, from its last checkpoint.

    Without options the run ends with the same parameters as if it had never stopped. With options
    it goes on differently, even if it had ended: with more steps, on another mesh, with another
    batch size. The schedule is then that of the new values, at the step that was reached, and the
    run folder keeps them. The other options of `train` cannot change, because what was trained
    depends on them; to start a new run from the weights of an old one use `jaxmodel train --init
    RUN/bundle`.

    Attributes:
      steps: Updates of the weights, including those already made.
      batch: Rows in a batch. No row of the data is skipped or repeated when it changes.
      mesh: Shape of the device mesh to go on with, such as 'fsdp=4,tensor=2'; 'data=1' for one
        device.
    """

    folder: Annotated[Positional[str], _RUN]
    steps: _Int = None
    learning_rate: _Float = None
    warmup_steps: _Int = None
    schedule: Annotated[
        Literal["constant", "step", "cosine", "wsd", "one_cycle", "plateau"] | None,
        arg(
            metavar="{constant,step,cosine,wsd,one_cycle,plateau}",
            help_behavior_hint="(default: as before)",
        ),
    ] = None
    final_lr_fraction: _Float = None
    stable_fraction: _Float = None
    step_size: _Int = None
    gamma: _Float = None
    weight_decay: _Float = None
    max_grad_norm: _Float = None
    b2: _Float = None
    gradient_accumulation_steps: _Int = None
    ema_decay: _Float = None
    batch: _Int = None
    heldout: _Text = None
    augment: _Text = None
    eval_every: _Int = None
    eval_batches: _Int = None
    patience: _Int = None
    dtype: _Type = None
    activation_dtype: _Type = None
    remat: Annotated[
        Literal["none", "full", "dots"] | None,
        arg(metavar="{none,full,dots}", help_behavior_hint="(default: as before)"),
    ] = None
    unroll: _Int = None
    mesh: _Text = None
    devices: _Int = None
    microbatches: _Int = None
    pipeline: Annotated[
        Literal["gpipe", "1f1b"] | None,
        arg(metavar="{gpipe,1f1b}", help_behavior_hint="(default: as before)"),
    ] = None
    on_bad_step: Annotated[
        Literal["skip", "rewind", "stop"] | None,
        arg(metavar="{skip,rewind,stop}", help_behavior_hint="(default: as before)"),
    ] = None
    spike: _Float = None
    save_every: _Int = None
    save_seconds: _Float = None
    watchdog: _Float = None
    notices: _Text = None
    log_every: _Int = None
    out: _Text = None
    profile: bool = False
    tensorboard: bool = False
    sample: _Text = None

    @property
    def given(self) -> dict[str, Any]:
        """Return the options that change, with their new values."""
        usual = defaults(self)
        values = {name: getattr(self, name) for name in CHANGEABLE}
        return {name: value for name, value in values.items() if value != usual[name]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay(Common):
    """Compute one step of a run of `train` again and compare it with what the run recorded.

    The computation starts from the last checkpoint before that step.

    Attributes:
      step: Number of the step; 1 for the first.
    """

    LEAST: ClassVar = {"step": 1}

    folder: Annotated[Positional[str], _RUN]
    step: int


@functools.cache
def _families() -> frozenset[str]:
    """Return the names of the architectures, without importing them."""
    names = json.loads(Path(__file__).with_name("parameters.json").read_text("utf-8"))
    return frozenset(name.partition("/")[0] for name in names)


def _is_size(name: str) -> bool:
    """Return whether a model is FAMILY/SIZE, and not a folder or a hub id."""
    return (
        name.count("/") == 1 and name.partition("/")[0] in _families() and not os.path.exists(name)
    )


def _place_from_anywhere(place: str | None) -> str | None:
    """Return a folder as an absolute path, which is the same from every folder; URLs stay."""
    return place if place is None or "://" in place else os.path.abspath(os.path.expanduser(place))


def _text_from_anywhere(text: str) -> str:
    """Return a file, folder or pattern that exists as an absolute path; names and URLs stay."""
    if text in NAMES or text.startswith("hf:") or "://" in text:
        return text
    path = os.path.expanduser(text)
    whole = os.path.abspath(path)
    if os.path.isfile(path) or (
        os.path.isdir(path) and not glob.has_magic(whole)
    ):  # with magic it would be a pattern
        return whole
    return os.path.join(glob.escape(os.getcwd()), path) if glob.glob(path, recursive=True) else text


def _texts_of(cls: type) -> dict[str, str]:
    """Return the entry of each attribute in a docstring."""
    entries = (cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0].rstrip()
    parts = re.split(r"^(?=      \w+: )", entries, flags=re.MULTILINE)
    return {part.partition(":")[0].strip(): part.rstrip() for part in parts if part.strip()}


CHANGEABLE = tuple(field.name for field in dataclasses.fields(Resume))[3:]
"""The options of a run of `train` that may change when it goes on."""
Resume.LEAST = {name: r for name, r in {**RANGES, **Train.LEAST}.items() if name in CHANGEABLE}
if Resume.__doc__:  # None under python -OO; what an option means is written down once
    _told = _texts_of(TrainOptions) | _texts_of(Train) | _texts_of(Resume)
    _about = Resume.__doc__.partition("Attributes:\n")[0]
    _entries = [_told[name] for name in CHANGEABLE if name in _told]
    Resume.__doc__ = "\n".join([f"{_about}Attributes:", *_entries, ""])
