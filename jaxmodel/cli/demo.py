"""`jaxmodel demo`: the main job from end to end, on a real model and real text.

Load, score, make smaller in five ways, measure each; train a small GPT on eight simulated devices
in a process of its own and make that smaller too; write it all down as a page.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from jaxmodel import compress, data, evaluate, hub, report
from jaxmodel.cli import resolved
from jaxmodel.cli.options import Demo, defaults
from jaxmodel.errors import InputError, require
from jaxmodel.evaluate.compare import COLUMNS
from jaxmodel.progress import step
from jaxmodel.report import html, plot, training as page
from jaxmodel.report.table import number, rate, size

_OTHER_WINDOWS = (
    "made smaller, on other windows of the held-out text than the loss in training is of"
)
PROMPT = "The capital of France is"
MESH = "fsdp=4,tensor=2"
CALIBRATION = 16
"""Windows of another text than the one scored, for the recipes that measure inputs."""


def run(options: Demo, folder: report.Run) -> dict[str, Any]:
    """Return the whole job; see the module's docstring."""
    began = time.perf_counter()
    require("matplotlib", "notebook")  # the plots come last; what they lack must be known first
    text = data.load_text(options.data)
    with step(f"load {options.model}"):
        bundle = hub.from_pretrained(options.model, dtype="float32")
        batches = compress.text_batches(bundle, windows=CALIBRATION)
        versions = compress.variants(bundle, batches=batches)
        windows, tokens = resolved.windows(
            text,
            hub.need_processor(bundle),
            options.window,
            options="--data, --window",
            limit=options.windows,
        )
    recipes = {name: recipe.texts() for name, recipe in compress.RECIPES.items()}
    folder.resolve(
        model=resolved.of_model(bundle.model), data=resolved.of_text(text), recipes=recipes
    )
    rows = evaluate.compare(
        versions,
        windows,
        keep={"int8": folder.path("int8")},
        speed=True,
        prompt=PROMPT,
        seed=options.seed,
        on_row=lambda row: folder.log(**row),
    )
    result: dict[str, Any] = {
        "rows": rows,
        "text": {**resolved.of_text(text), "tokens": tokens},
        "model": {
            "name": bundle.card.get("name", options.model),
            "decoded_from": bundle.card.get("decoded_from"),
        },
        "processor": report.processor(folder.versions),
        "predictions": int(windows.shape[0] * (windows.shape[1] - 1)),
        "prompt": PROMPT,
        "int8_loads_back_identical": next(
            row["loads_back"] for row in rows if row["name"] == "int8"
        ),
        "train": _train(options, folder) if options.train_steps else {},
    }
    result["seconds"] = time.perf_counter() - began
    folder.save_json("report.json", result)
    _write_page(result, folder, options)
    return result


def _train(options: Demo, folder: report.Run) -> dict[str, Any]:
    """Train in a separate process, as eight devices slow one down, and compress the result."""
    out = folder.path("gpt/bundle")
    answer = folder.path("gpt/train.json")
    command = [
        sys.executable,
        "-P",
        "-m",
        "jaxmodel",
        "train",
        "--out",
        out,
        "--json",
        answer,
        "--runs",
        folder.path("gpt"),
    ]
    command += [
        "--devices",
        8,
        "--mesh",
        MESH,
        "--steps",
        options.train_steps,
        "--seed",
        options.seed,
    ]
    print("train a small GPT on eight simulated devices, in a process of its own", file=sys.stderr)
    done = subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise InputError(
            f"train: the training process ended with code {done.returncode}; its messages stand "
            f"above"
        )
    result = json.loads(answer.read_text())
    bundle = hub.from_pretrained(out)
    ids = hub.need_processor(bundle).encode(data.load_text("english").text)
    windows = data.windows(ids, bundle.model.config.context, limit=32)
    rows = evaluate.compare(
        compress.variants(bundle, ("f32", "int8", "int4")), windows, seed=options.seed
    )
    return {**result, "out": "gpt/bundle", "compressed": {row["name"]: row for row in rows}}


# --------------------------------------------------------------------------------------------- show

TRAIN_COLUMNS = (
    report.Column("name", "version"),
    report.Column("resident_bytes", "resident", size),
    report.Column("nll", "NLL", lambda v: f"{v:.4f}"),
)


def show(result: dict[str, Any], console: Any) -> None:
    """Print the table, the continuations and the training."""
    from rich.text import Text

    text = f"{result['text']['name']} ({result['text']['origin']})"
    title = f"{result['model']['name']} on {text}, {result['predictions']:,} predictions"
    report.print_table(result["rows"], COLUMNS, title, console)
    console.print(Text(_explained(result)))
    for row in result["rows"]:
        console.print(Text(f"{row['name']:>14}  {PROMPT}{row['continuation']!r}"))
    train = result["train"]
    if train:
        console.print()
        console.print(
            f"small GPT: {train['parameters']:,} parameters on {train['devices']} simulated "
            f"devices "
            f"({mesh_text(train['mesh'])}), held-out loss {number(train['heldout_loss'])}, "
            f"{rate(train['tokens_per_second'])} tokens/s",
            markup=False,
        )
        report.print_table([*train["compressed"].values()], TRAIN_COLUMNS, _OTHER_WINDOWS, console)
        console.print(Text(train["sample"]))
    console.print(f"the whole took {result['seconds']:.0f} s")


def _explained(result: dict[str, Any]) -> str:
    """Say what the f32 of the table is, and on which processor the speeds were measured."""
    kind = result["model"]["decoded_from"]
    origin = (
        f"f32 is decoded from {kind}, in which the file has the weights; int4 rounds a second "
        f"time. "
        if kind
        else ""
    )
    return f"{origin}Speeds in tokens a second, on {result['processor']}."


def mesh_text(mesh: dict[str, int]) -> str:
    """Return a mesh as `--mesh` takes it: `fsdp=4,tensor=2`."""
    return ",".join(f"{axis}={length}" for axis, length in mesh.items()) or "no mesh"


def _write_page(result: dict[str, Any], folder: report.Run, options: Demo) -> None:
    """report.html, whole in one file, and the plots as pictures."""
    rows = result["rows"]
    train = result["train"]
    sizes = {row["name"]: (row["file_bytes"] / 1e6, row["perplexity"]) for row in rows}
    prefill = {row["name"]: {"prefill of 512": row["prefill_tps"]} for row in rows}
    decode = {
        row["name"]: {"1 stream": row["decode_tps_1"], "8 streams": row["decode_tps_8"]}
        for row in rows
    }
    plots: dict[str, Any] = {
        "size": lambda fmt: plot.scatter(
            sizes, "weights on disk, MB", "perplexity", "Size and quality", fmt, True, True
        ),
        "prefill": lambda fmt: plot.bars(
            prefill, "tokens per second", "Reading a prompt of 512 tokens", fmt
        ),
        "decode": lambda fmt: plot.bars(
            decode, "tokens per second", "Writing, 1 and 8 texts at once", fmt
        ),
    }
    if train:
        plots["loss"] = page.plots(train["history"])["loss"]
    for name, draw in plots.items():
        folder.save_bytes(f"plots/{name}.png", draw("png"))
    figures = {name: html.figure(draw("svg")) for name, draw in plots.items()}
    figures["decode"] = html.figure(
        plots["decode"]("svg"), f"Both speeds on {result['processor']}."
    )
    sections = [
        html.text(
            f"Every version of {result['model']['name']} scored on {result['predictions']:,} "
            f"predictions of "
            f"{result['text']['origin']}, and timed "
            "in one process on one device. Change is the mean difference of the loss to f32 on "
            "the same tokens. " + _explained(result)
        ),
        html.table(rows, COLUMNS),
        figures["size"],
        figures["prefill"],
        figures["decode"],
        html.heading("The same greedy continuation"),
        html.table(
            rows, [report.Column("name", "version"), report.Column("continuation", PROMPT + " ...")]
        ),
    ]
    if train:
        sections += [
            html.heading("A small GPT, trained from scratch"),
            html.text(
                f"{train['parameters']:,} parameters on {train['devices']} simulated devices, "
                f"mesh {mesh_text(train['mesh'])}; "
                f"held-out loss {train['heldout_loss']:.3f}, {rate(train['tokens_per_second'])} "
                f"tokens/s on "
                f"{result['processor']}. Saved, loaded and made smaller by the same calls:"
            ),
            figures["loss"],
            html.table(
                [*train["compressed"].values()], TRAIN_COLUMNS, _OTHER_WINDOWS.capitalize() + "."
            ),
            html.code(train["sample"]),
        ]
    sections += [
        html.heading("How to repeat it"),
        html.text("This repeats every number that does not depend on the clock:"),
        html.code(f"jaxmodel rerun {folder.folder}"),
        html.heading("What was asked for"),
        html.options(folder.config, defaults(options)),
        html.ran_on(folder.versions),
    ]
    folder.save_bytes("report.html", html.page("jaxmodel demo", sections))
