"""The options of every verb, one frozen dataclass each.

They are the command line, its help, and the beginning of a run's config. Nothing heavy is imported
here, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from jaxmodel.cli.common import SOURCE, TEXT, Common, defaults
from jaxmodel.cli.train_options import Launch, Replay, Resume, Train
from jaxmodel.errors import ABOVE_ZERO, BELOW_ONE, InputError, within

_RECIPE = (
    "Recipe of the compression. A name: int8 (weights, and activations as they are computed), "
    "int8-weight (weights only), int4 (groups of 64 weights, measured on --calibration), int4-rtn "
    "(without it), sparse50-int8 (half of the weights zero). Or a chain of methods for the layers, "
    "such as 'magnitude(0.5) | rtn(4, group=32)'; "
    "transforms of the whole model stand in front: 'rotate() ; gptq(4)'. `jaxmodel methods` lists "
    "all. Or a .yaml or .json file ('-' for YAML on standard input) with the keys base (one of the "
    "above), rules (pattern: chain), transforms, compute and name. Or the folder of a compressed "
    "bundle, to do the same again."
)
_MODEL = arg(metavar="MODEL", help=f"The model: {SOURCE}.")
_ADAPTERS = (
    "Adapters (LoRA) to add to the model: a folder in PEFT's format, such as `train --lora` "
    "writes, or a hub id; several are added up."
)
_ADAPTER = arg(metavar="FOLDER", help=_ADAPTERS, help_behavior_hint="(default: none)")
_DTYPE = arg(
    metavar="{float32,bfloat16}",
    help="Type of the uncompressed weights and of the computation.",
    help_behavior_hint="(default: as stored, else float32)",
)
_SCORED = arg(metavar="TEXT", help=f"Text to score: {TEXT}.")
_FOLDER_HELP = (
    "Folder of the new bundle: a new or an empty one, or that of an older bundle, which is "
    "replaced once the new one is complete."
)
_OUT = arg(metavar="FOLDER", help=_FOLDER_HELP)
_NONE = "(default: none)"
_MEASURED = arg(
    metavar="TEXT", help=f"Text on which methods that want it measure the inputs: {TEXT}."
)
_CALIBRATION = arg(
    metavar="TEXT",
    help=f"Text on which the inputs of the layers, and what is lost, are measured: {TEXT}.",
    help_behavior_hint="(default: english_train if the recipe, --order or --cap needs one)",
)
_WINDOW = arg(
    metavar="INT",
    help="Tokens in a window, at most the context length of the model.",
    help_behavior_hint="(default: 512, or the context length)",
)
_CAP = arg(
    metavar="FLOAT",
    help="Largest length with which an input counts, as a multiple of the median: some tokens, "
    "often the first of a text, are a thousand times as long as others, and would alone decide.",
    help_behavior_hint="(default: as long as it is)",
)
_ORDER = arg(
    help="Measure all layers of the model as it is, or each with those in front of it compressed "
    "already, which takes a second pass and loses less."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """Show the main job in a few minutes and write it down as report.html.

    It loads SmolLM2-135M-Instruct (decoded from a 4-bit file), compresses it in five ways, measures
    size, quality and speed of each, and trains a small GPT on eight simulated devices.

    Attributes:
      windows: Number of windows of the text to score, from its start.
      window: Tokens in a window, at most the context length of the model.
      train_steps: Updates of the small GPT; 0 skips its training.
      seed: Seed of the training and of the bootstrap intervals.
    """

    LEAST: ClassVar = {"windows": 1, "window": 2, "train_steps": 0}

    model: Annotated[str, arg(metavar="MODEL", help=f"Model to compress: {SOURCE}.")] = (
        "smollm2-135m"
    )
    data: Annotated[str, _SCORED] = "english"
    windows: int = 4
    window: int = 512
    train_steps: int = 200
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Score a text: how well a model predicts each next token.

    The result is the mean negative log-likelihood of a token (NLL, in nats), with its 95% bootstrap
    interval, and the perplexity.

    Attributes:
      window: Tokens in the windows that the text is cut into, each scored on its own; at most the
        context length of the model.
      max_windows: Number of windows to score, from the start of the text.
      seed: Seed of the bootstrap interval.
    """

    LEAST: ClassVar = {"window": 2, "max_windows": 1}

    model: Annotated[Positional[str], _MODEL]
    data: Annotated[str, _SCORED] = "english"
    window: int = 512
    max_windows: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = (
        None
    )
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _DTYPE] = None
    seed: int = 0
    adapter: Annotated[tuple[str, ...], UseAppendAction, _ADAPTER] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Continue a prompt, or answer it with --chat.

    Each token is the likeliest one, unless --temperature is above 0.

    Attributes:
      prompt: Text to continue, or '-' for standard input.
      max_new_tokens: Maximum number of tokens to add.
      temperature: Randomness of sampling: 0 takes the likeliest token, higher values sample more
        freely.
      top_k: Sample from this many of the likeliest tokens; 0 for all.
      top_p: Sample from the likeliest tokens that together have this probability; 1 for all.
      min_p: Sample from tokens with at least this fraction of the highest probability; 0 for all.
      repetition_penalty: Factor above 1 that makes tokens already in the text less likely.
      stop: Stop before this text; may be given several times.
      chat: Send the prompt as a user message, in the format of the chat template of the model.
      system: System message of --chat: a text, a file with the text, or '-' for standard input.
      tools: JSON file, or '-', with the list of tools for the chat template, as function schemas.
      documents: JSON file, or '-', with the list of documents for the chat template, each with
        title and text.
      seed: Seed of sampling; the same seed gives the same text.
    """

    LEAST: ClassVar = {"max_new_tokens": 1}

    model: Annotated[Positional[str], _MODEL]
    prompt: Annotated[str, arg(metavar="TEXT")]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Annotated[
        tuple[str, ...], UseAppendAction, arg(metavar="TEXT", help_behavior_hint=_NONE)
    ] = ()
    chat: bool = False
    system: Annotated[str | None, arg(metavar="TEXT|FILE", help_behavior_hint=_NONE)] = None
    tools: Annotated[str | None, arg(metavar="FILE", help_behavior_hint=_NONE)] = None
    documents: Annotated[str | None, arg(metavar="FILE", help_behavior_hint=_NONE)] = None
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _DTYPE] = None
    seed: int = 0
    adapter: Annotated[tuple[str, ...], UseAppendAction, _ADAPTER] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(Common):
    """Compress a model by a recipe and save it as a bundle, which every verb takes as MODEL.

    If the recipe wants to know the inputs of the layers, they are measured on a text. The last part
    of its windows is only used to say what the compression costs.

    Attributes:
      windows: Number of windows of the text of --calibration, from its start.
      held_out: Part of the windows, the last ones, that only judges.
      latency: Also measure how fast the model reads and writes before and after, with 1 and with 8
        streams.
      seed: Seed of methods that draw.
    """

    LEAST: ClassVar = {"window": 2, "windows": 1, "held_out": BELOW_ONE, "cap": ABOVE_ZERO}

    model: Annotated[Positional[str], _MODEL]
    recipe: Annotated[str, arg(metavar="RECIPE", help=_RECIPE)]
    rule: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(
            metavar="PATTERN=CHAIN",
            help="Exception from the recipe: parameters whose whole path matches the regular "
            "expression get this chain, such as 'blocks/(0|29)/.*/(q|k|v|o)=rtn(bits=8)', or none "
            "('head='). May be given several times; the first match wins.",
            help_behavior_hint=_NONE,
        ),
    ] = ()
    calibration: Annotated[str | None, _CALIBRATION] = None
    order: Annotated[Literal["once", "sequential"], _ORDER] = "once"
    windows: int = 32
    window: Annotated[int | None, _WINDOW] = None
    held_out: float = 0.125
    cap: Annotated[float | None, _CAP] = None
    latency: bool = False
    seed: int = 0
    out: Annotated[str, _OUT]
    adapter: Annotated[tuple[str, ...], UseAppendAction, _ADAPTER] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity(Common):
    """Show what each layer of a model costs when it alone is compressed, at each width.

    The result is the change of the loss (nats a token) on a text, as a table and, where matplotlib
    is installed, as plots/sensitivity.png in the run folder.

    Attributes:
      widths: Bits of a weight to try.
      method: Chain of methods, with {} in the place of the width, such as 'gptq({}, group=64)'.
      window: Tokens in the windows that texts are cut into; at most the context length of the
        model.
      max_windows: Number of windows to score, from the start of the text.
      windows: Number of windows of the text of --calibration.
      seed: Seed of the bootstrap intervals.
    """

    LEAST: ClassVar = {"window": 2, "max_windows": 1, "windows": 1}

    model: Annotated[Positional[str], _MODEL]
    widths: tuple[int, ...] = (2, 3, 4)
    method: Annotated[str, arg(metavar="CHAIN")] = "rtn({})"
    data: Annotated[str, _SCORED] = "english"
    window: int = 512
    max_windows: int = 4
    calibration: Annotated[str, _MEASURED] = "english_train"
    windows: int = 32
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Compare a model with other bundles, and with what recipes make of it, in one table.

    Bytes, bits a weight and the loss on a text, its change with an interval; where matplotlib is
    installed also plots/size.png in the run folder.

    Attributes:
      window: Tokens in the windows that texts are cut into; at most the context length of the
        model.
      max_windows: Number of windows to score, from the start of the text.
      speed: Also measure how fast each reads and writes.
      windows: Number of windows of the text of --calibration.
      seed: Seed of the bootstrap intervals.
    """

    LEAST: ClassVar = {"window": 2, "max_windows": 1, "windows": 1}

    model: Annotated[Positional[str], _MODEL]
    versions: Annotated[
        tuple[str, ...],
        arg(
            metavar="VERSION",
            help="Recipes to apply to the model (names, chains of methods or files), and other "
            "models with the same tokens. They may also stand behind the model, without "
            "--versions.",
        ),
    ]
    data: Annotated[str, _SCORED] = "english"
    window: int = 512
    max_windows: int = 16
    speed: bool = False
    calibration: Annotated[str, _MEASURED] = "english_train"
    windows: int = 32
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Common):
    """Merge adapters (LoRA) into the weights of their model and save the result as a bundle."""

    model: Annotated[Positional[str], _MODEL]
    adapter: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="FOLDER", help=_ADAPTERS)]
    out: Annotated[str, _OUT]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerun(Common):
    """Repeat a run from its folder and compare all results that do not depend on the clock.

    The exit code is 1 if one differs.
    """

    folder: Annotated[
        Positional[str], arg(metavar="RUN", help="The run folder: runs/<time>-<verb>.")
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models(Common):
    """List every architecture and size, with its parameters, memory and trained weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Methods(Common):
    """List what texts of recipes and options may name: methods, transforms, ranges, augmentations.

    With a name or a kind, `jaxmodel methods gptq`, their settings too.
    """

    name: Annotated[
        Positional[str],
        arg(metavar="NAME", help="Whose settings to show: a name, or a kind, such as augment."),
    ] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(Common):
    """Show the parameters of a model by path, with shapes, bytes, and their sharding on a mesh."""

    name: Annotated[
        Positional[str],
        arg(
            metavar="NAME",
            help=f"{SOURCE[0].upper()}{SOURCE[1:]}; or a size that `models` lists.",
        ),
    ]
    running: Annotated[
        bool,
        arg(help="Show the form that runs on this machine instead of the stored one, and how."),
    ] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Classify files, texts or images, with any bundle that has names for its classes.

    Attributes:
      input: UTF-8 texts for a model of text, images for a model of images; '-' for standard input.
        Several may be given, one after the other.
      top: Number of labels to show for each file, the likeliest first.
      batch: Number of files to compute at once.
    """

    LEAST: ClassVar = {"top": 1, "batch": 1}

    model: Annotated[Positional[str], _MODEL]
    input: Annotated[tuple[str, ...], arg(metavar="FILE")]
    top: int = 5
    batch: int = 8
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _DTYPE] = None
    adapter: Annotated[tuple[str, ...], UseAppendAction, _ADAPTER] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion(Common):
    """Print the script that lets a shell complete the verbs and options of jaxmodel.

    For bash, add `source <(jaxmodel completion bash)` to ~/.bashrc. For zsh, add `source <(jaxmodel
    completion zsh)` to ~/.zshrc, below compinit. For fish, save the output of `jaxmodel completion
    fish` as ~/.config/fish/completions/jaxmodel.fish.
    """

    shell: Annotated[
        Positional[Literal["bash", "zsh", "fish"]],
        arg(metavar="SHELL", help="bash, zsh or fish."),
    ]


VERBS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "compress": Compress,
    "sensitivity": Sensitivity,
    "compare": Compare,
    "merge": Merge,
    "models": Models,
    "methods": Methods,
    "summary": Summary,
    "predict": Predict,
    "resume": Resume,
    "replay": Replay,
    "rerun": Rerun,
    "launch": Launch,
    "completion": Completion,
}


def check(options: Any) -> None:
    """Refuse numbers that no work could use, by the name of the option that was given.

    Raises:
      InputError: a number is out of range, or the notices are not at a URL.
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


__all__ = [
    "VERBS",
    "Common",
    "Compare",
    "Completion",
    "Compress",
    "Demo",
    "Eval",
    "Generate",
    "Launch",
    "Merge",
    "Models",
    "Predict",
    "Replay",
    "Rerun",
    "Resume",
    "Sensitivity",
    "Summary",
    "Train",
    "check",
    "defaults",
]
