"""`jaxmodel models`, `summary` and `predict`: what there is, what it consists of, what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodel.cli.options import Models, Predict, Summary
from jaxmodel.errors import InputError, unknown
from jaxmodel.files import read_bytes
from jaxmodel.hub.published import WEIGHTS
from jaxmodel.progress import progress

# ------------------------------------------------------------------------------------------- models


def models(options: Models, folder: Any) -> list[dict[str, Any]]:
    """Return every size with its parameters and what it needs."""
    from jaxmodel.models import sizes

    known = sizes()
    rows = []
    stored = json.loads(COUNTS.read_text(encoding="utf-8"))
    counts = {
        name: stored[name]["parameters"]
        for name in known
        if stored.get(name, {}).get("config") == _digest(known[name])
    }
    counts |= count_parameters({name: size for name, size in known.items() if name not in counts})
    for name in known:
        (family, _, size), count = name.partition("/"), counts[name]
        place = WEIGHTS.get(name, "none")
        weights = f"hub {place}" if "/" in place else place
        needs = {"weights": weights, "float32_bytes": 4 * count, "bfloat16_bytes": 2 * count}
        rows.append({"family": family, "name": size, "parameters": count, "needs": needs})
    return rows


MOST_BYTES = 2**28
"""The largest file to classify."""
COUNTS = Path(__file__).with_name("parameters.json")
"""Parameters of the sizes, since tracing the initialisation of all takes ten seconds. A size that
is not there, or whose config has changed, is counted on the spot; a test counts all, and
`store_counts` writes the file anew.
"""


def count_parameters(known: Mapping[str, tuple[Any, Any]]) -> dict[str, int]:
    """Return the parameters of sizes, from shapes alone: no array is made."""
    import jax

    from jaxmodel import tree

    shown = progress(known.items(), "count parameters") if known else ()
    return {
        name: tree.count(jax.eval_shape(of.model(config).init, jax.random.key(0)))
        for name, (of, config) in shown
    }


def store_counts() -> None:
    """Write `COUNTS`, a line for each size."""
    from jaxmodel.models import sizes

    known = sizes()
    counts = count_parameters(known)
    lines = (
        f'"{name}": {json.dumps({"parameters": counts[name], "config": _digest(known[name])})}'
        for name in known
    )
    COUNTS.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


def _digest(size: tuple[Any, Any]) -> str:
    return hashlib.sha256(repr(size[1]).encode()).hexdigest()[:8]


def show_models(result: list[dict[str, Any]], console: Any) -> None:
    """Print a line for each size."""
    from jaxmodel import report
    from jaxmodel.report.table import count, size

    columns = [
        report.Column("family"),
        report.Column("name"),
        report.Column("parameters", format=count),
        report.Column("float32_bytes", "float32", size),
        report.Column("bfloat16_bytes", "bfloat16", size),
        report.Column("weights", "trained weights"),
    ]
    report.print_table([{**row, **row["needs"]} for row in result], columns, None, console)
    console.print(
        "Memory is that of the weights alone. `jaxmodel summary FAMILY/NAME` shows one.",
        markup=False,
    )


# ------------------------------------------------------------------------------------------ summary


def summary(options: Summary, folder: Any) -> dict[str, Any]:
    """Return the leaves of a bundle, or of a size without weights."""
    from jaxmodel import models as house
    from jaxmodel.cli import resolved
    from jaxmodel.hub import Bundle

    model, params, card = _named(options.name)
    if options.running and params is None:
        raise InputError(
            f"--running: {options.name!r} is a size without weights; allowed: a bundle"
        )
    rows = (
        Bundle(model, params, card=card).summary()
        if options.running and params is not None
        else house.summary(model, params)
    )
    total = {key: sum(row[key] for row in rows) for key in ("parameters", "bytes")}
    said = {
        "name": options.name,
        "weights": params is not None,
        **resolved.of_model(model),
        "card": dict(card),
    }
    return {
        **said,
        **total,
        "bits_per_weight": 8 * total["bytes"] / max(total["parameters"], 1),
        "leaves": rows,
    }


def _named(name: str) -> tuple[Any, Any, Any]:
    """Return the model of a bundle or of a size; its weights and card, where it has them.

    Raises:
      InputError: neither is known by that name, or several sizes are.
    """
    from jaxmodel import hub
    from jaxmodel.hub.pretrained import KNOWN
    from jaxmodel.models import families, sizes

    known = sizes()
    alike = [size for size in known if size.split("/", 1)[1] == name]
    if (
        name in KNOWN
        or Path(name).exists()
        or (name.count("/") == 1 and name.split("/")[0] not in families())
    ):
        bundle = hub.from_pretrained(name)
        return bundle.model, bundle.params, bundle.card
    if len(alike) > 1 and name not in known:
        raise InputError(
            f"name: {name!r} is a size of several families; allowed: {', '.join(alike)}"
        )
    if name not in known and not alike:
        places = "; or give a bundle's folder, a .gguf file, or a hub id 'org/name'"
        within = [size for size in known if size.startswith(name.split("/")[0] + "/")]
        raise InputError(f"{unknown('name', name, within or [*KNOWN, *known])}{places}")
    module, config = known[name if name in known else alike[0]]
    return module.model(config), None, {}


def show_summary(result: dict[str, Any], console: Any) -> None:
    """Print a line for each leaf, with the layers of a segment together, and the sums."""
    from jaxmodel import report
    from jaxmodel.models.contents import columns
    from jaxmodel.report.table import size

    title = f"{result['name']} ({result['family']})" + (
        "" if result["weights"] else ", without weights"
    )
    shown = columns()
    if "runs" in next(iter(result["leaves"]), {}):
        shown.append(report.Column("runs"))
    report.print_table(result["leaves"], shown, title, console)
    console.print(
        f"{result['parameters']:,} parameters, {size(result['bytes'])}, "
        f"{result['bits_per_weight']:.2f} bits a weight",
        markup=False,
    )


# ------------------------------------------------------------------------------------------ predict


def predict(options: Predict, folder: Any) -> dict[str, Any]:
    """Return the likeliest labels of each file."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodel import generation, hub
    from jaxmodel.cli import resolved
    from jaxmodel.models.predict import predict_fn, says

    if not options.input:
        raise InputError("--input: no file given; allowed: one or more files of text or of images")
    contents = [
        read_bytes(name, MOST_BYTES) for name in options.input
    ]  # what cannot be read is known before the model is loaded
    bundle = generation.for_inference(
        hub.from_pretrained(options.model, dtype=options.dtype, adapters=options.adapter)
    )
    labels = bundle.labels
    if not labels:
        raise InputError(
            f"model: {options.model!r} has no labels; allowed: a bundle of a classifier, whose "
            f"config or card names its classes"
        )
    folder.resolve(model=resolved.of_model(bundle.model))
    names = list(bundle.model.inputs(1, 1))
    if names not in (["tokens"], ["pixels"]):
        raise InputError(
            f"model: {options.model!r} reads {', '.join(names)}; allowed: a model of text or of "
            f"images"
        )
    read = _texts if names == ["tokens"] else _images
    inputs, cut = read(bundle, options.input, contents)
    kind = says(bundle.model.config)
    gives = predict_fn(bundle.model, "logits" if kind == "number" else "probabilities")
    run = jax.jit(gives)
    size = min(options.batch, len(contents))
    chunks = []
    for start in progress(range(0, len(contents), size), "predict"):
        batch = {name: a[start : start + size] for name, a in inputs.items()}
        short = size - len(
            contents[start : start + size]
        )  # filled up, so that all batches are one program
        batch = {
            name: np.concatenate([a, np.repeat(a[:1], short, axis=0)]) for name, a in batch.items()
        }
        chunks.append(
            np.asarray(run(bundle.params, jax.tree.map(jnp.asarray, batch)))[: size - short]
        )
    rows = []
    for name, probabilities, truncated in zip(
        options.input, np.concatenate(chunks), cut, strict=True
    ):
        order = np.argsort(-probabilities, kind="stable")[: options.top]
        best = [{"label": labels[i], "probability": float(probabilities[i])} for i in order]
        rows.append({"file": name, **best[0], "truncated": truncated, "top": best})
    reads = "text" if names == ["tokens"] else "images"
    return {
        "model": options.model,
        "reads": reads,
        "classes": len(labels),
        "says": kind,
        "rows": rows,
    }


def _texts(
    bundle: Any, names: tuple[str, ...], contents: list[bytes]
) -> tuple[dict[str, Any], list[bool]]:
    """Return tokens and mask, padded on the right, and which texts were cut to the context."""
    import numpy as np

    from jaxmodel import hub

    tokenizer = hub.need_processor(bundle)
    texts = []
    for name, content in zip(names, contents, strict=True):
        try:
            texts.append(content.decode("utf-8").strip())
        except UnicodeDecodeError:
            raise InputError(
                f"--input: {name!r} is no UTF-8 text; allowed: text, which is what this model reads"
            ) from None
        if not texts[-1]:
            raise InputError(f"--input: {name!r} is empty; allowed: a file with text")
    limit = bundle.model.config.context
    rows = tokenizer.encode_batch(texts, True)
    kept = [
        ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows
    ]  # the last is what ends a text
    tokens = np.zeros((len(kept), max(map(len, kept))), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, ids in enumerate(kept):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return {"tokens": tokens, "mask": mask}, [len(ids) > limit for ids in rows]


def _images(
    bundle: Any, names: tuple[str, ...], contents: list[bytes]
) -> tuple[dict[str, Any], list[bool]]:
    """Return the pixels that the image processor makes; no image is cut.

    A model of one channel gets grey images.
    """
    import io

    from jaxmodel.hub.decode import decode

    processor = getattr(bundle.processor, "images", bundle.processor)
    called = bundle.card.get("name", "the bundle")
    if processor is None:
        size = bundle.model.inputs(1, 1)["pixels"].shape[1:3]
        raise InputError(
            f"model: {called!r} has no image processor, which makes of an image what the model "
            f"was trained on; save it with one: "
            f"hub.Bundle(..., processor=hub.ImageProcessor(size={size}, mean=..., std=...)), or "
            f"data.ImageFolder(...).processor"
        )
    channels = len(processor.mean)
    decoded = [
        decode(io.BytesIO(content), channels, f"--input: {name!r}")
        for name, content in zip(names, contents, strict=True)
    ]
    pixels = processor(decoded)
    wanted = bundle.model.inputs(1, 1)["pixels"].shape
    if pixels.shape[1:] != wanted[1:] and not getattr(bundle.model.config, "any_size", False):
        made, needed = (" x ".join(map(str, shape[1:])) for shape in (pixels.shape, wanted))
        raise InputError(
            f"model: the image processor of {called!r} makes {made} pixels; the model reads "
            f"{needed}"
        )
    return {"pixels": pixels}, [False] * len(decoded)


def show_predict(result: dict[str, Any], console: Any) -> None:
    """Print a line for each file: its label, and the next likely ones."""
    from jaxmodel import report
    from jaxmodel.report.table import number, percent

    share = number if result["says"] == "number" else percent
    others = lambda best: ", ".join(
        f"{one['label']} {share(one['probability'])}" for one in best[1:]
    )
    columns = [
        report.Column("file"),
        report.Column("label"),
        report.Column(
            "probability", "number" if result["says"] == "number" else "probability", share
        ),
        report.Column("top", "else", others, "left"),
    ]
    report.print_table(
        result["rows"], columns, f"{result['model']}, {result['classes']} classes", console
    )
    if cut := [row["file"] for row in result["rows"] if row["truncated"]]:
        console.print(f"only the beginning was read of: {', '.join(cut)}", markup=False)
