"""The options of every verb, one frozen dataclass each: they are the command line, its help, and a run's resolved config.

Nothing heavy is imported here, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

_MODEL = arg(metavar="MODEL", help="A known name (smollm2-135m), a bundle folder, a .gguf file, or a hub id 'org/name'.")
_FILE = arg(metavar="FILE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb takes."""

    json: Annotated[str | None, _FILE] = None
    """Write the numbers as JSON to FILE; '-' is standard output, and then nothing else is printed there."""
    runs: Annotated[str, arg(metavar="FOLDER")] = "runs"
    """The folder that gets FOLDER/<time>-<verb>/ with the resolved config, versions and results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The main job: load SmolLM2, make it smaller in five ways, measure each, train a small GPT on eight devices."""

    model: Annotated[str, arg(metavar="MODEL")] = "smollm2-135m"
    """The model to compress: a known name, a bundle folder, a .gguf file, or a hub id."""
    data: Annotated[str, arg(metavar="TEXT")] = "english"
    """Text for perplexity: a file or a known source."""
    windows: int = 4
    """Windows of text to score (16 for the full figure)."""
    window: int = 512
    """Tokens in a window."""
    train_steps: int = 200
    """Updates of the small GPT (0 leaves it out)."""
    seed: int = 0
    """Of training and of the bootstrap intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Perplexity of a model on a text, with a bootstrap interval."""

    model: Annotated[Positional[str], _MODEL]
    data: Annotated[str, arg(metavar="TEXT")] = "english"
    """A UTF-8 file, or a known source: english, wikitext2-test, wikitext2-valid, tinyshakespeare, pydoc."""
    window: int = 512
    """Tokens in a window; the whole text is tokenised at once and cut."""
    max_windows: int | None = None
    """Score only the first so many windows."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of plain weights and of the computation; default as the bundle was stored, else float32."""
    seed: int = 0
    """Of the bootstrap interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Continue a prompt."""

    model: Annotated[Positional[str], _MODEL]
    prompt: str
    """The text to continue."""
    max_new_tokens: int = 64
    """The most tokens to add."""
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 draws."""
    top_k: int = 0
    """Draw among so many likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw among tokens at least so probable relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Divide the scores of tokens that were there by this."""
    stop: Annotated[tuple[str, ...], UseAppendAction] = ()
    """End in front of this text (may be given several times)."""
    chat: bool = False
    """Put the prompt through the model's chat template, as a user's message."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of plain weights and of the computation; default as the bundle was stored, else float32."""
    seed: int = 0
    """Of the draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(Common):
    """Make a model smaller by a recipe and save it as a bundle."""

    model: Annotated[Positional[str], _MODEL]
    recipe: str
    """int8 (weights and, as they come, activations), int8-weight, int4 (groups of 64), sparse50-int8; or a chain such as
    'magnitude(0.5) | rtn(bits=4, group=32)' for the blocks."""
    out: Annotated[str, arg(metavar="FOLDER")]
    """Where the bundle goes; an older bundle there is replaced when the new one is whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train a small GPT from scratch on a text, on one device or on a mesh, and save it as a bundle."""

    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Where the bundle goes; default `bundle` in the run folder."""
    data: Annotated[str, arg(metavar="TEXT")] = "english_train"
    """Text to train on: a UTF-8 file or a known source."""
    heldout: Annotated[str, arg(metavar="TEXT")] = "english"
    """Text for the held-out loss."""
    steps: int = 200
    """Updates."""
    batch: int = 16
    """Rows in a batch."""
    context: int = 128
    """Tokens in a row."""
    vocab: int = 1024
    """Tokens of the byte-pair vocabulary, learnt from the training text."""
    width: int = 128
    """Width of the model."""
    depth: int = 4
    """Layers."""
    heads: int = 4
    """Attention heads."""
    learning_rate: float = 3e-3
    """At the peak of the schedule."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the operands of contractions; weights and the optimiser are float32."""
    mesh: Annotated[str | None, arg(metavar="SHAPE")] = None
    """Shape of the mesh, such as 'fsdp=4,tensor=2'; default one device."""
    devices: int = 1
    """Simulate so many CPU devices (for trying a mesh; slower than one)."""
    sample: str = "The "
    """Prompt of the sample that is shown at the end."""
    seed: int = 0
    """Of the initial weights, the order of the data and the sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerun(Common):
    """Repeat a run from its folder and compare every number that does not depend on the clock."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER", help="A folder under runs/.")]


VERBS: dict[str, type[Common]] = {
    "demo": Demo,
    "train": Train,
    "generate": Generate,
    "eval": Eval,
    "compress": Compress,
    "rerun": Rerun,
}

__all__ = ["VERBS", "Common", "Compress", "Demo", "Eval", "Generate", "Rerun", "Train"]
