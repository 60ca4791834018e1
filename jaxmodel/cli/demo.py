"""`jaxmodel demo`: the main job from end to end, on a real model and real text.

Load, score, make smaller in five ways, measure each; train a small GPT on eight simulated devices in a process of its own and
make that smaller too; write it all down as a page.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import compress, data, evaluate, generation, hub, leaves, report, tree
from jaxmodel.cli.options import Demo
from jaxmodel.errors import InputError, require
from jaxmodel.report import html, plot
from jaxmodel.report.table import megabytes, number, rate

PROMPT = "The capital of France is"
NEW_TOKENS = 16
MESH = "fsdp=4,tensor=2"


def run(options: Demo, folder: report.Run) -> dict[str, Any]:
    """The whole job; see the module's docstring."""
    began = time.perf_counter()
    if options.windows < 1 or options.train_steps < 0:
        raise InputError(f"windows: {options.windows}, train-steps: {options.train_steps}; at least 1 and 0 are needed")
    require("matplotlib", "notebook")  # the plots come last; what they lack must be known first
    text = data.load_text(options.data)
    with report.step(f"load {options.model}"):
        bundle = hub.from_pretrained(options.model, dtype="float32")
        if any(isinstance(leaf, leaves.Compressed) for leaf in tree.flatten(bundle.params).values()):
            raise InputError(f"model: {options.model!r} is compressed already; the demo starts from plain weights")
        ids = hub.need_processor(bundle).encode(text.text)
        windows = data.windows(ids, options.window, limit=options.windows)
    rows: list[dict[str, Any]] = []
    base: np.ndarray | None = None
    same = False
    with report.bar(len(VERSIONS), "versions") as shown:
        for name, version in _versions(bundle):
            row, nll = _measure(name, version, windows, base, folder, options.seed)
            base = nll if base is None else base
            rows.append(row)
            if name == "int8":
                same = _loads_back(version, folder, windows[:1, :64])
            shown.advance(1, done=name)
    result: dict[str, Any] = {
        "rows": rows,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256, "tokens": len(ids)},
        "predictions": int(windows.shape[0] * (windows.shape[1] - 1)),
        "prompt": PROMPT,
        "int8_loads_back_identical": same,
        "train": _train(options, folder) if options.train_steps else {},
    }
    result["seconds"] = time.perf_counter() - began
    folder.save_json("report.json", result)
    _write_page(result, folder)
    return result


# ------------------------------------------------------------------------------------------------------ versions

VERSIONS = ("f32", "bf16", *compress.NAMED)


def _versions(bundle: hub.Bundle) -> Iterator[tuple[str, hub.Bundle]]:
    """The model as it is, in bfloat16, and by each named recipe; one at a time, so that two never share the memory."""
    yield "f32", bundle
    policy = dataclasses.replace(bundle.model.policy, compute="bfloat16")
    half = bundle.model.with_policy(policy)
    yield "bf16", dataclasses.replace(bundle, model=half, params=tree.cast(bundle.params, "bfloat16"))
    for name, recipe in compress.NAMED.items():
        yield name, compress.compress_bundle(bundle, recipe, name)[0]


def _measure(
    name: str, bundle: hub.Bundle, windows: np.ndarray, base: np.ndarray | None, folder: report.Run, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """One row of the table, and the loss of every token."""
    file_bytes = _file_bytes(bundle, folder.path("int8") if name == "int8" else None)
    params = generation.running(bundle)
    nll = evaluate.token_nll(bundle.model, params, windows)
    score = evaluate.summarize(nll, seed=seed)
    change = nll - base if base is not None else np.zeros_like(nll)
    with report.step(f"{name}: speed"):
        speed = generation.measure_speed(bundle)
    text = generation.generate(bundle, PROMPT, max_new_tokens=NEW_TOKENS)
    row = {
        "name": name,
        "resident_bytes": tree.nbytes(params),
        "packed_bytes": tree.nbytes(bundle.params),
        "file_bytes": file_bytes,
        "bits_per_weight": 8 * tree.nbytes(bundle.params) / tree.count(bundle.params),
        "nll": score.nll,
        "nll_interval": score.interval,
        "perplexity": score.perplexity,
        "nll_change": float(np.mean(change, dtype=np.float64)),
        "nll_change_interval": evaluate.bootstrap(change, seed=seed),
        **speed,
        "continuation": text,
    }
    folder.log(**row)
    return row, nll


def _file_bytes(bundle: hub.Bundle, keep: Path | None) -> int:
    """Bytes of the weights on disk; the folder stays only where `keep` says."""
    with tempfile.TemporaryDirectory() as room:
        place = bundle.save_pretrained(keep or Path(room) / "bundle")
        return sum(file.stat().st_size for file in place.glob("*.safetensors"))


def _loads_back(bundle: hub.Bundle, folder: report.Run, tokens: np.ndarray) -> bool:
    """Whether the bundle read back from disk gives the same logits as this one in memory, bit for bit."""
    loaded = hub.from_pretrained(folder.path("int8"))
    inputs = jnp.asarray(tokens)
    first, second = (np.asarray(jax.jit(b.model.apply)(b.params, inputs).logits) for b in (bundle, loaded))
    return bool(np.array_equal(first, second))


# --------------------------------------------------------------------------------------------------------- train


def _train(options: Demo, folder: report.Run) -> dict[str, Any]:
    """Train in a process of its own (eight devices would slow this one down), then make the result smaller here."""
    out, answer = folder.path("gpt/bundle"), folder.path("gpt/train.json")
    command = [sys.executable, "-m", "jaxmodel", "train", "--out", out, "--json", answer, "--runs", folder.path("gpt")]
    command += ["--devices", 8, "--mesh", MESH, "--steps", options.train_steps, "--seed", options.seed]
    print("train a small GPT on eight simulated devices, in a process of its own", file=sys.stderr)
    done = subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise InputError(f"train: the training process ended with code {done.returncode}; its messages stand above")
    result = json.loads(answer.read_text())
    bundle = hub.from_pretrained(out)
    heldout = data.load_text("english")
    windows = data.windows(hub.need_processor(bundle).encode(heldout.text), bundle.model.config.context, limit=32)
    smaller = {}
    for name in ("f32", "int8", "int4"):
        version = bundle if name == "f32" else compress.compress_bundle(bundle, compress.NAMED[name], name)[0]
        score = evaluate.perplexity(version.model, version.running(), windows, seed=options.seed)
        smaller[name] = {"resident_bytes": tree.nbytes(version.params), "nll": score.nll, "nll_interval": score.interval}
    return {**result, "out": "gpt/bundle", "compressed": smaller}


# --------------------------------------------------------------------------------------------------------- show

COLUMNS = (
    report.Column("name", "version"),
    report.Column("resident_bytes", "resident\nMB", megabytes),
    report.Column("packed_bytes", "packed\nMB", megabytes),
    report.Column("file_bytes", "file\nMB", megabytes),
    report.Column("bits_per_weight", "bits per\nweight", lambda v: f"{v:.2f}"),
    report.Column("nll", "NLL", lambda v: f"{v:.4f}"),
    report.Column("nll_change", "change", lambda v: f"{v:+.4f}"),
    report.Column("perplexity", "perplexity", lambda v: f"{v:.2f}"),
    report.Column("prefill_tps", "prefill\ntok/s", rate),
    report.Column("decode_tps_1", "decode\n1 stream", rate),
    report.Column("decode_tps_8", "decode\n8 streams", rate),
)
TRAIN_COLUMNS = (
    report.Column("name", "version"),
    report.Column("resident_bytes", "MB", megabytes),
    report.Column("nll", "held-out NLL", lambda v: f"{v:.4f}"),
)


def show(result: dict[str, Any], console: Any) -> None:
    """The table, the continuations and the training, for people."""
    from rich.text import Text

    title = f"{result['text']['origin']}, {result['predictions']} predictions"
    report.print_table(result["rows"], COLUMNS, title, console)
    for row in result["rows"]:
        console.print(Text(f"{row['name']:>14}  {PROMPT}{row['continuation']!r}"))
    train = result["train"]
    if train:
        console.print()
        console.print(
            f"small GPT: {train['parameters']} parameters on {train['devices']} devices {train['mesh']}, "
            f"held-out loss {number(train['heldout_loss'])}, {rate(train['tokens_per_second'])} tokens/s",
            markup=False,
        )
        report.print_table([{"name": k, **v} for k, v in train["compressed"].items()], TRAIN_COLUMNS, None, console)
        console.print(Text(train["sample"]))
    console.print(f"{result['seconds']:.0f} s")


def _write_page(result: dict[str, Any], folder: report.Run) -> None:
    """report.html, whole in one file, and the plots as pictures."""
    rows, train = result["rows"], result["train"]
    sizes = {row["name"]: (row["file_bytes"] / 1e6, row["perplexity"]) for row in rows}
    speeds = {
        row["name"]: {"prefill 512": row["prefill_tps"], "decode, 1": row["decode_tps_1"], "decode, 8": row["decode_tps_8"]}
        for row in rows
    }
    plots: dict[str, Any] = {
        "size": lambda fmt: plot.scatter(sizes, "weights on disk, MB", "perplexity", "Size and quality", fmt, True, True),
        "speed": lambda fmt: plot.bars(speeds, "tokens per second", "Speed on this machine", fmt),
    }
    if train:
        steps = [row["step"] for row in train["history"]]
        losses = {"training": (steps, [row["loss"] for row in train["history"]])}
        held = [row for row in train["history"] if "heldout_loss" in row]
        losses["held out"] = ([row["step"] for row in held], [row["heldout_loss"] for row in held])
        plots["loss"] = lambda fmt: plot.curves(losses, "step", "loss, nats per token", "Training the small GPT", fmt)
    for name, draw in plots.items():
        folder.save_bytes(f"plots/{name}.png", draw("png"))
    figures = {name: html.figure(draw("svg")) for name, draw in plots.items()}
    sections = [
        html.text(
            f"Every version of the model scored on {result['predictions']} predictions of {result['text']['origin']}, and timed "
            "in one process on one device. Change is the mean difference of the loss to f32 on the same tokens."
        ),
        html.table(rows, COLUMNS),
        figures["size"],
        figures["speed"],
        html.heading("The same greedy continuation"),
        html.table(rows, [report.Column("name", "version"), report.Column("continuation", PROMPT + " ...")]),
    ]
    if train:
        sections += [
            html.heading("A small GPT, trained from scratch"),
            html.text(
                f"{train['parameters']} parameters on {train['devices']} simulated devices, mesh {train['mesh']}; "
                f"held-out loss {train['heldout_loss']:.3f}. Saved, loaded and made smaller by the same calls:"
            ),
            figures["loss"],
            html.table([{"name": k, **v} for k, v in train["compressed"].items()], TRAIN_COLUMNS),
            html.code(train["sample"]),
        ]
    sections += [
        html.heading("How to repeat it"),
        html.text("`jaxmodel rerun` on this folder repeats every number that does not depend on the clock."),
        html.key_value(folder.config),
        html.heading("What it ran on"),
        html.key_value(folder.versions),
    ]
    folder.save_bytes("report.html", html.page("jaxmodel demo", sections))
