"""The options of every verb, one frozen dataclass each: they are the command line, its help, and
what a run's config begins with.

Nothing heavy is imported here, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from jaxmodel.errors import FROM_ZERO, InputError, Range, within
from jaxmodel.train.options import TrainOptions

_SOURCE = (
    "a known name (smollm2-135m, which is SmolLM2-135M-Instruct from a file of 4 bits), a size "
    "whose weights are at the hub "
    "(gpt2), a bundle folder, a .gguf file, or a hub id 'org/name' or 'org/name@revision'"
)
_NAMES = (
    "english",
    "english_train",
    "pydoc",
    "tinyshakespeare",
    "wikitext2-test",
    "wikitext2-valid",
)  # `data.text.NAMES`
_TEXT = f"a UTF-8 file, or one of {', '.join(_NAMES)}"
_TEXTS = (
    f"{_TEXT}; or .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrayrecord (see --field), a "
    f"folder that `datasets` saved, "
    "'hf:NAME', a pattern with *; a path, or a URL such as gs:// or s3://."
)
_TO_TRAIN_ON = (
    f"The texts to train on, each {_TEXTS} Also records to learn answers from, with "
    f"'messages' (a chat) or 'prompt' "
    "and 'completion', where only the answers count in the loss; or classes, with 'text' and "
    "'label', for an encoder."
)
_RECIPE = (
    "int8 (weights, and activations as they come), int8-weight (weights only), int4 (groups of "
    "64), sparse50-int8 (half of the "
    "weights zero); a chain of methods for the layers, such as 'magnitude(0.5) | rtn(bits=4, "
    "group=32)'; a .yaml or .json file "
    "with the keys base (one of these), rules (pattern: chain), compute, name; or a bundle's "
    "folder, to do as was done there."
)
_MODEL = arg(metavar="MODEL", help=f"The model: {_SOURCE}.")
_ADAPTERS = (
    "Adapters (LoRA) for the model, a folder in PEFT's layout as `train --lora` writes "
    "it, or a hub id; several add up."
)
_ADAPTER = arg(metavar="FOLDER", help=_ADAPTERS, help_behavior_hint="(default: none)")
_DTYPE = arg(
    metavar="{float32,bfloat16}",
    help="Type of plain weights and of the computation.",
    help_behavior_hint="(default: as the bundle was stored, else float32)",
)


_AS_BEFORE = arg(help_behavior_hint="(default: as before)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb takes."""

    LEAST: ClassVar[Mapping[str, int | Range]] = {}
    """Option -> the smallest whole number that it allows, or its range of numbers."""

    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: no JSON)")] = None
    """Write the numbers as JSON to FILE too; '-' prints them on standard output, and nothing else
    is printed there then.
    """
    runs: Annotated[str, arg(metavar="FOLDER")] = "runs"
    """Folder in which the run leaves its own, FOLDER/<time>-<verb>/, with config, versions and
    results.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The main job, in some minutes: load SmolLM2-135M-Instruct (from a file of 4 bits), make it
    smaller in five ways, measure each (size, quality, speed), train a small GPT on eight simulated
    devices, and write it all down as report.html.
    """

    LEAST: ClassVar = {"windows": 1, "window": 2, "train_steps": 0}

    model: Annotated[str, arg(metavar="MODEL", help=f"The model to make smaller: {_SOURCE}.")] = (
        "smollm2-135m"
    )
    data: Annotated[str, arg(metavar="TEXT", help=f"The text to score: {_TEXT}.")] = "english"
    windows: int = 4
    """Number of windows of the text that are scored, the first ones."""
    window: int = 512
    """Tokens in a window, at most the model's context."""
    train_steps: int = 200
    """Updates of the small GPT; 0 leaves it out."""
    seed: int = 0
    """Seed of the training and of the bootstrap intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Score a text: how well a model predicts each next token (NLL in nats, perplexity), with a 95
    % bootstrap interval.
    """

    LEAST: ClassVar = {"window": 2, "max_windows": 1}

    model: Annotated[Positional[str], _MODEL]
    data: Annotated[str, arg(metavar="TEXT", help=f"The text to score: {_TEXT}.")] = "english"
    window: int = 512
    """Tokens of the windows that the text is cut into, each scored on its own; at most the model's
    context.
    """
    max_windows: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = (
        None
    )
    """Score only so many windows, the first ones."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _DTYPE] = None
    seed: int = 0
    """Seed of the bootstrap interval."""
    adapter: Annotated[tuple[str, ...], UseAppendAction, _ADAPTER] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Continue a prompt, or with --chat answer it; the likeliest tokens, unless --temperature is
    above 0.
    """

    LEAST: ClassVar = {"max_new_tokens": 1}

    model: Annotated[Positional[str], _MODEL]
    prompt: Annotated[str, arg(metavar="TEXT")]
    """The text to continue."""
    max_new_tokens: int = 64
    """The most tokens to add."""
    temperature: float = 0.0
    """Freedom of the draws: 0 takes the likeliest token; above 0 draws, the more freely the higher.
    """
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1 for all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability; 0 for all."""
    repetition_penalty: float = 1.0
    """Factor, above 1, that makes tokens that are in the text already less likely."""
    stop: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="TEXT")] = ()
    """End before this text; may be given several times."""
    chat: bool = False
    """Ask the prompt as a user's message, in the form that the model's chat template gives it."""
    system: Annotated[str | None, arg(metavar="TEXT|FILE")] = None
    """System message of --chat, which the assistant is told first: a text, or a file that holds it.
    """
    tools: Annotated[str | None, arg(metavar="FILE")] = None
    """JSON file for --chat with the list of tools that the template may offer, as schemas of
    functions.
    """
    documents: Annotated[str | None, arg(metavar="FILE")] = None
    """JSON file for --chat with the list of documents that the answer may rest on, each with title
    and text.
    """
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _DTYPE] = None
    seed: int = 0
    """Seed of the draws: the same gives the same text."""
    adapter: Annotated[tuple[str, ...], UseAppendAction, _ADAPTER] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(Common):
    """Make a model smaller by a recipe and save it as a bundle, a folder that every verb takes as
    MODEL.
    """

    model: Annotated[Positional[str], _MODEL]
    recipe: Annotated[str, arg(metavar="RECIPE", help=_RECIPE)]
    rule: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(
            metavar="PATTERN=CHAIN",
            help="Exception from the recipe: leaves whose whole path matches the regular "
            "expression get this chain, such as "
            "'blocks/(0|29)/.*/(q|k|v|o)=rtn(bits=8)', or none ('head='); may be given several "
            "times, the first match wins.",
            help_behavior_hint="(default: none)",
        ),
    ] = ()
    out: Annotated[str, arg(metavar="FOLDER")]
    """Folder of the bundle: a new or empty one, or an older bundle, which is replaced once the new
    one is whole.
    """
    adapter: Annotated[tuple[str, ...], UseAppendAction, _ADAPTER] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Common):
    """Add adapters (LoRA) to the weights that they belong to, and save a bundle that needs none."""

    model: Annotated[Positional[str], _MODEL]
    adapter: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="FOLDER", help=_ADAPTERS)]
    out: Annotated[str, arg(metavar="FOLDER")]
    """Folder of the bundle: a new or empty one, or an older bundle, which is replaced once the new
    one is whole.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Common, TrainOptions):
    """Train a model and save it as a bundle: a small GPT on a text if nothing else is said, a new
    model of any architecture (--model), or weights that are there already (--init), all of them,
    some (--trainable) or adapters beside them (--lora); on one device or on a mesh.
    """

    LEAST: ClassVar = {
        **dict.fromkeys(
            ("steps", "batch", "width", "depth", "heads", "log_every", "eval_batches"), 1
        ),
        **dict.fromkeys(("gradient_accumulation_steps", "unroll"), 1),
        **dict.fromkeys(
            ("devices", "processes", "devices_per_process"), (lambda n: 1 <= n <= 512, "1 to 512")
        ),
        **dict.fromkeys(
            ("warmup_steps", "eval_every", "save_every", "patience", "microbatches"), 0
        ),
        "context": 2,
        "vocab": 257,  # all bytes and the end of a text
        **dict.fromkeys(("watchdog", "regrow"), FROM_ZERO),
    }

    model: Annotated[
        str | None, arg(metavar="FAMILY/SIZE", help_behavior_hint="(default: a new GPT)")
    ] = None
    """Train a new model of this architecture and size from random weights; `jaxmodel models` lists
    them. A bundle, known name or hub id here means --init.
    """
    init: Annotated[
        str | None, arg(metavar="BUNDLE", help_behavior_hint="(default: random weights)")
    ] = None
    """Fine-tune these weights, with their own tokenizer, instead of training a new model: a folder,
    a known name or a hub id, as MODEL of the other verbs.
    """
    task: Annotated[
        Literal["language", "masked", "classify", "embed", "seq2seq"] | None,
        arg(help_behavior_hint="(default: what fits the model and the data)"),
    ] = None
    """Goal of the training: predict the next token, predict hidden tokens, classify texts or
    images, give texts that mean the same near vectors, or write texts from others.
    """
    trainable: Annotated[
        tuple[str, ...], arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="(default: all)")
    ] = ()
    """Train only the parameters whose whole path matches one of these regular expressions, such as
    'head.*' or 'blocks/(2|3)/.*'; the others stay as they are. `jaxmodel summary` lists the paths.
    """
    lora: Annotated[
        str | None, arg(metavar="RANK", help_behavior_hint="(default: all weights train)")
    ] = None
    """Train low-rank adapters (LoRA) of this rank beside the weights of --init, which stay as they
    are: a number, or settings such as 'r=8,alpha=16,dropout=0.05,targets=q|v' (default targets: all
    matrices of the layers but experts). Only the adapters are saved, for --adapter of the other
    verbs and for PEFT.
    """
    learning_rate: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]  # a number from `__post_init__` on
        float | None,
        arg(
            help_behavior_hint="(default: 3e-3 for a new model, 2e-4 for adapters, 2e-5 for all "
            "weights of --init)"
        ),
    ] = None
    """Learning rate at the peak of the schedule."""
    eval_every: int = 0
    """Updates between two held-out losses; 0 for four of them in the whole run."""
    eval_batches: int = 8
    """Held-out rows that are judged, in sixteens; always the same, whatever the batch and the seed.
    """
    seed: int = 0
    """Seed of the initial weights, the order of the data and the sample."""
    out: Annotated[
        str | None,
        arg(metavar="FOLDER", help_behavior_hint="(default: bundle/ in the run's folder)"),
    ] = None
    """Folder of the bundle."""
    checkpoints: Annotated[
        str | None,
        arg(
            metavar="PLACE",
            help="Folder of the checkpoints, or a URL such as gs:// or s3://. If a run of the "
            "same config left some there, "
            "this one goes on from the last, as a restarted machine does that begins with an "
            "empty disk.",
            help_behavior_hint="(default: checkpoints/ in the run's folder)",
        ),
    ] = None
    data: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]", help=_TO_TRAIN_ON)] = (
        "english_train",
    )
    weights: Annotated[
        tuple[float, ...], arg(metavar="W [W ...]", help_behavior_hint="(default: all the same)")
    ] = ()
    """Proportions in which several texts are mixed."""
    heldout: Annotated[
        str | None,
        arg(
            metavar="TEXT",
            help="The text, or rows, of the held-out loss; like --data.",
            help_behavior_hint="(default: english; of rows with answers or labels each tenth)",
        ),
    ] = None
    field: Annotated[str, arg(metavar="NAME")] = "text"
    """The field or column with the texts, in files of records or tables."""
    pack: bool = False
    """Rows of whole documents, packed, that do not see each other; else windows of the run of all
    documents.
    """
    augment: Annotated[str | None, arg(metavar="CHAIN", help_behavior_hint="(default: none)")] = (
        None
    )
    """Changes of each batch, such as 'token_dropout(0, rate=0.1)' or 'local_shuffle(3)'."""
    batch: int = 16
    """Rows of the text in a batch."""
    context: int = 128
    """Tokens in a row, and the most that the model can read at once."""
    vocab: int = 1024
    """Tokens of the vocabulary (byte-level BPE), which is learnt from the training text; at least
    257.
    """
    width: int = 128
    """Width of the model."""
    depth: int = 4
    """Layers of the model."""
    heads: int = 4
    """Attention heads of each layer; a divisor of the width."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that matrix products are computed in; weights and the optimiser are float32."""
    stream: Literal["float32", "bfloat16"] = "float32"
    """Type of what is kept between products; with both in bfloat16 training is fastest."""
    remat: Literal["none", "full", "dots"] = "none"
    """Part that the backward pass computes again instead of keeping it: nothing, whole blocks, all
    but matrix products.
    """
    unroll: int = 1
    """Layers that the program runs without a loop: more run faster on a CPU and compile longer."""
    microbatches: int = 0
    """Micro-batches of a mesh with pipeline, a multiple of its stages; 0: as many as stages."""
    mesh: Annotated[
        str | None,
        arg(
            metavar="SHAPE",
            help="Layout of several devices to train on: 'fsdp=4,tensor=2' for eight; one length "
            "may be *, what the devices "
            "leave. Axes: data, fsdp, tensor, sequence, pipeline (and expert, for models that "
            "have them).",
            help_behavior_hint="(default: one device; data=* with several processes)",
        ),
    ] = None
    devices: int = 1
    """Devices that the CPU pretends to be, to try a --mesh without having one; slower than one."""
    processes: Annotated[
        int,
        arg(
            help="Processes that are started on this machine, to try what a cluster does. On a "
            "cluster start one on each host "
            "instead: they find each other (TPU pod, Slurm, Open MPI, Kubernetes, or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, "
            "JAX_PROCESS_ID)."
        ),
    ] = 1
    devices_per_process: int = 1
    """Simulated devices of each of these processes."""
    elastic: bool = False
    """When one of these processes dies, go on with one fewer from the last checkpoint; later with
    all again.
    """
    regrow: float = 30.0
    """Seconds after which an elastic run goes back to all of its processes."""
    watchdog: float = 0.0
    """End a process that makes no step for so many seconds, and say which rank is stuck; 0 for
    never.
    """
    notices: Annotated[
        str | None,
        arg(
            metavar="URL",
            help_behavior_hint="(default: the machine's metadata server, if it has one)",
        ),
    ] = None
    """Address where notices of maintenance stand; at one, the run saves and stops."""
    config: Annotated[
        str | None, arg(metavar="FILE", help_behavior_hint="(default: options alone)")
    ] = None
    """Take options from a YAML or TOML file with the sections model, data, optim, train and run;
    those on the command line override it. Each run leaves such a file in its folder.
    """
    print_config: bool = False
    """Print all options as such a file, and do nothing else."""
    profile: bool = False
    """Write an XProf trace of three steps into the run's folder."""
    tensorboard: bool = False
    """Write the rows for TensorBoard too. MLflow gets them where the environment variable
    MLFLOW_TRACKING_URI names a place, such as sqlite:///runs.db.
    """
    sample: Annotated[str | None, arg(metavar="TEXT")] = None
    """Prompt of the sample that the trained model writes at the end. The default is the first
    held-out question of chats and of prompts with completions, and "The " of texts.
    """

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
class Rerun(Common):
    """Repeat a run from its folder and compare every number that does not depend on the clock;
    exits with 1 where one differs.
    """

    folder: Annotated[
        Positional[str],
        arg(metavar="FOLDER", help="The folder that the run left: runs/<time>-<verb>."),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume(Common):
    """Go on with a run of train that was stopped or killed, from its last checkpoint; it ends in
    the same parameters. With an option it goes on in another way, also a run that had ended: the
    schedule is then that of the new values.
    """

    LEAST: ClassVar = {
        "steps": 1,
        "batch": 1,
        "learning_rate": FROM_ZERO,
        "weight_decay": FROM_ZERO,
    }

    folder: Annotated[
        Positional[str],
        arg(metavar="FOLDER", help="The folder that the run left: runs/<time>-train."),
    ]
    steps: Annotated[int | None, _AS_BEFORE] = None
    """Updates of the weights, those that were made included."""
    learning_rate: Annotated[float | None, _AS_BEFORE] = None
    """The rate at the peak of the schedule."""
    schedule: Annotated[
        Literal["constant", "step", "cosine", "wsd", "one_cycle", "plateau"] | None, _AS_BEFORE
    ] = None
    """Course of the learning rate after the warm-up."""
    weight_decay: Annotated[float | None, _AS_BEFORE] = None
    """Strength of the decay of weights towards zero."""
    batch: Annotated[int | None, _AS_BEFORE] = None
    """Rows in a batch; the next row stays the next, whatever the size was before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay(Common):
    """Compute one step of a run of train again, from the last checkpoint before it, and compare it
    with what the run wrote.
    """

    LEAST: ClassVar = {"step": 1}

    folder: Annotated[
        Positional[str],
        arg(metavar="FOLDER", help="The folder that the run left: runs/<time>-train."),
    ]
    step: int
    """Number of the step: 1 for the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Common):
    """List every architecture and size: its parameters, the memory of its weights, and where
    trained ones can be had.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(Common):
    """Show what a model consists of: its leaves by path, with shapes, bytes, and where a mesh would
    cut them.
    """

    name: Annotated[
        Positional[str],
        arg(
            metavar="NAME",
            help=f"{_SOURCE[0].upper()}{_SOURCE[1:]}; or a size that `models` lists.",
        ),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Classify files: texts, or images, with any bundle that has names for its classes."""

    LEAST: ClassVar = {"top": 1, "batch": 1}

    model: Annotated[Positional[str], _MODEL]
    input: Annotated[tuple[str, ...], arg(metavar="FILE")]
    """UTF-8 texts for a model of text, images for a model of images; several, one after the other.
    """
    top: int = 5
    """Labels that are shown for each file, the likeliest first."""
    batch: int = 8
    """Files that are computed at once."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _DTYPE] = None


VERBS: dict[str, type[Common]] = {
    "demo": Demo,
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "compress": Compress,
    "merge": Merge,
    "models": Models,
    "summary": Summary,
    "predict": Predict,
    "resume": Resume,
    "replay": Replay,
    "rerun": Rerun,
}


def check(options: Common) -> None:
    """Refuse numbers that no work could use, by the name of the option that was given.

    Raises:
      InputError: a number out of range, or notices that are not at a URL.
    """
    for name, allowed in options.LEAST.items():
        if (value := getattr(options, name)) is not None:
            within(f"--{name.replace('_', '-')}", value, allowed)
    notices = getattr(options, "notices", None)
    if notices is not None and not re.match(r"https?://[^/]", notices):
        raise InputError(
            f"--notices: {notices!r} given; allowed: a URL that begins with http:// or https://"
        )
    seed = getattr(options, "seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"--seed: {seed} given; allowed: 0 to {2**32 - 1}")


def defaults(options: Common) -> dict[str, Any]:
    """Option -> what it is where it is not given, of those that need not be."""
    return {
        field.name: field.default
        for field in dataclasses.fields(options)
        if field.default is not dataclasses.MISSING
    }


@functools.cache
def _families() -> frozenset[str]:
    """Return the names of the architectures, without importing them."""
    names = json.loads(Path(__file__).with_name("parameters.json").read_text("utf-8"))
    return frozenset(name.partition("/")[0] for name in names)


def _is_size(name: str) -> bool:
    """Say whether a model is FAMILY/SIZE, and not a folder or a hub id."""
    return (
        name.count("/") == 1 and name.partition("/")[0] in _families() and not os.path.exists(name)
    )


def _place_from_anywhere(place: str | None) -> str | None:
    """A folder as an absolute path, which is the same from every folder; a URL is one as it stands."""
    return place if place is None or "://" in place else os.path.abspath(place)


def _text_from_anywhere(text: str) -> str:
    """Files that are there, a folder or a pattern for some, by an absolute path; names and URLs as
    they stand.
    """
    if text in _NAMES or text.startswith("hf:") or "://" in text:
        return text
    path = os.path.expanduser(text)
    whole = os.path.abspath(path)
    if os.path.isfile(path) or (
        os.path.isdir(path) and not glob.has_magic(whole)
    ):  # with magic it would be a pattern
        return whole
    return os.path.join(glob.escape(os.getcwd()), path) if glob.glob(path, recursive=True) else text


__all__ = [
    "VERBS",
    "Common",
    "Compress",
    "Demo",
    "Eval",
    "Generate",
    "Models",
    "Predict",
    "Replay",
    "Rerun",
    "Resume",
    "Summary",
    "Train",
    "check",
    "defaults",
]
