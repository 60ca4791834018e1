"""`jaxmodel compress`, `sensitivity` and `compare`: make a model smaller, and what that costs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmodel import compress, data, evaluate, generation, hub, report
from jaxmodel.cli import resolved
from jaxmodel.cli.options import Compare, Compress, Sensitivity
from jaxmodel.compress.recipe_file import SUFFIXES
from jaxmodel.compress.report import columns, said, sizes, speeds
from jaxmodel.compress.sensitivity import COLUMNS, draw
from jaxmodel.compress.texts import BY_DEFAULT
from jaxmodel.data.text import Text
from jaxmodel.errors import InputError, unknown
from jaxmodel.evaluate.compare import COLUMNS as VERSIONS
from jaxmodel.hub.bundle import check_target
from jaxmodel.hub.pretrained import KNOWN
from jaxmodel.hub.published import where
from jaxmodel.progress import step
from jaxmodel.report import plot
from jaxmodel.report.table import text

# ----------------------------------------------------------------------------------------- compress


def run_compress(options: Compress, folder: Any) -> dict[str, Any]:
    """Compress a model, on a text if that is asked for or needed, and save it."""
    recipe = _recipe(options.recipe, options.rule)
    check_target(options.out)
    source = options.calibration
    needed = bool(recipe.needs) or options.order == "sequential" or options.cap is not None
    source = BY_DEFAULT if source is None and needed else source
    given = None if source is None else data.load_text(source)
    bundle = hub.from_pretrained(options.model, adapters=options.adapter)
    if options.latency and not bundle.model.continues:
        raise InputError("--latency: given for a model that does not continue texts; leave it out")
    batches = None if given is None else _batches(bundle, given, options)
    if given is not None:
        folder.resolve(calibration=resolved.of_text(given))
    smaller, done = compress.compress_bundle(
        bundle,
        recipe,
        batches=batches,
        order=options.order,
        held_out=options.held_out,
        cap=options.cap,
        key=_key(options.seed),
        on_row=lambda row: folder.log(**row),
    )
    folder.resolve(model=resolved.of_model(smaller.model), recipe=recipe.texts())
    with step("save"):
        done = done.on_disk(smaller.save_pretrained(options.out))
    if options.latency:
        with step("latency"):
            done = dataclasses.replace(
                done, latency=generation.compare_speed(bundle, smaller, turns=3)
            )
    _save_plot(folder, "errors", done.plot)
    result = dataclasses.asdict(done)
    if given is not None:
        told = {"text": resolved.of_text(given), "seed": options.seed}
        result["protocol"] = {**result["protocol"], **told}
    return {
        **result,
        "recipe": options.recipe,
        "out": options.out,
    }


def show_compress(result: dict[str, Any], console: Any) -> None:
    """Print the leaves, and what became of the whole."""
    title = f"{result['recipe']} -> {text(result['out'])}"
    report.print_table(result["leaves"], columns(result["leaves"]), title, console)
    done = compress.Report(
        **{one.name: result[one.name] for one in dataclasses.fields(compress.Report)}
    )
    console.print(sizes(done), markup=False)
    if done.latency:
        told = done.latency
        console.print(f"tokens/s: {speeds(told)}", markup=False)
        where = (
            f"prompt of {told['prompt']}, cache of {told['cache']}, median of {told['turns']} turns"
        )
        console.print(f"({where})")
    if result["protocol"]:
        told = result["protocol"]
        console.print(
            f"measured on {told['tokens']:,} tokens of {told['text']['origin']}, {told['order']}; "
            f"judged on {told['held_out_tokens']:,} others",
            markup=False,
        )
    if result["loss"]:
        console.print(f"loss on those: {said(result['loss'])}", markup=False)


def _batches(bundle: hub.Bundle, given: Text, options: Any) -> list[dict[str, Any]]:
    """Cut a text into batches of windows, as inputs of a model."""
    try:
        return compress.text_batches(bundle, given, windows=options.windows, window=options.window)
    except InputError as error:
        said = str(error)
        option = "--calibration: " if said.startswith("text: ") else "--"
        raise InputError(option + said.removeprefix("text: ")) from None


def _key(seed: int) -> Any:
    import jax

    return jax.random.key(seed)


def _save_plot(folder: Any, name: str, draw: Callable[[str], bytes]) -> None:
    """Save a plot where matplotlib is installed and there is something to draw."""
    with contextlib.suppress(InputError):
        folder.save_bytes(f"plots/{name}.png", draw("png"))


def _recipe(given: str, rules: tuple[str, ...] = ()) -> compress.Recipe:
    """Return the recipe that is named or read, behind the exceptions from it.

    Raises:
      InputError: an exception that is not of the form PATTERN=CHAIN, or what is wrong with the
        recipe.
    """
    in_file = (
        given.lower().endswith(SUFFIXES) or Path(given, "jaxmodel.json").expanduser().is_file()
    )
    recipe = (
        compress.read_recipe(given)
        if given not in compress.RECIPES and in_file
        else compress.get_recipe(given)
    )
    try:
        exceptions = [_exception(rule) for rule in rules]
        return dataclasses.replace(recipe, rules=(*exceptions, *recipe.rules))
    except InputError as error:
        raise InputError(f"--rule: {str(error).removeprefix('recipe: ')}") from None


def _exception(rule: str) -> tuple[str, str]:
    """Return pattern and chain, split at the first `=` that follows a regular expression."""
    for sign in re.finditer("=", rule):
        with contextlib.suppress(re.error):
            re.compile(rule[: sign.start()])
            if sign.start():
                return rule[: sign.start()], rule[sign.end() :]
    raise InputError(f"{rule!r} given; allowed: PATTERN=CHAIN, such as 'head=rtn(bits=8)'")


# -------------------------------------------------------------------------------------- sensitivity


def _scored(options: Sensitivity | Compare) -> tuple[Any, hub.Bundle, Any]:
    """Return the text to score, the model, and the windows of the text."""
    scored = data.load_text(options.data)
    bundle = hub.from_pretrained(options.model)
    if not bundle.model.continues:
        raise InputError(f"MODEL: {options.model!r} does not continue texts; allowed: a decoder")
    windows, _ = resolved.windows(
        scored,
        hub.need_processor(bundle),
        options.window,
        options="--data, --window",
        limit=options.max_windows,
    )
    return scored, bundle, windows


def run_sensitivity(options: Sensitivity, folder: Any) -> dict[str, Any]:
    """Measure what each layer costs at each width."""
    if "{}" not in options.method:
        raise InputError(
            f"--method: {options.method!r} given; allowed: a chain with {{}} where the width "
            "stands, such as 'rtn({}, group=64)'"
        )
    recipes = {
        f"{bits} bits": compress.get_recipe(options.method.replace("{}", str(bits)))
        for bits in options.widths
    }
    scored, bundle, windows = _scored(options)
    folder.resolve(model=resolved.of_model(bundle.model), data=resolved.of_text(scored))

    def make(recipe: compress.Recipe) -> Callable[[], Any]:
        def made() -> Any:
            batches = None
            if recipe.needs:
                batches = _batches(bundle, data.load_text(options.calibration), options)
            return compress.compress_bundle(bundle, recipe, batches=batches)[0].params

        return made

    rows = compress.sensitivity(
        bundle.model,
        bundle.params,
        {name: make(recipe) for name, recipe in recipes.items()},
        windows,
        seed=options.seed,
        on_row=lambda row: folder.log(**row),
    )
    _save_plot(folder, "sensitivity", lambda fmt: draw(rows, fmt))
    return {
        "rows": list(rows),
        "model": options.model,
        "method": options.method,
        "data": resolved.of_text(scored),
        "predictions": int(windows.shape[0] * (windows.shape[1] - 1)),
    }


def show_sensitivity(result: dict[str, Any], console: Any) -> None:
    """Print a line for each layer and width."""
    title = (
        f"{result['model']} on {result['data']['origin']}, {result['predictions']:,} predictions"
    )
    report.print_table(result["rows"], COLUMNS, title, console)


# ------------------------------------------------------------------------------------------ compare


def run_compare(options: Compare, folder: Any) -> dict[str, Any]:
    """Score a model beside others: bundles, and what recipes make of it."""
    if options.model in options.versions:
        raise InputError(f"--versions: {options.model!r} is the model itself; allowed: others")
    recipes = {name: _recipe_or_model(name) for name in options.versions}
    scored, bundle, windows = _scored(options)
    made = {name: _version(bundle, name, recipe, options) for name, recipe in recipes.items()}
    folder.resolve(model=resolved.of_model(bundle.model), data=resolved.of_text(scored))
    rows = evaluate.compare(
        {options.model: lambda: dataclasses.replace(bundle), **made},
        windows,
        speed=options.speed,
        seed=options.seed,
        on_row=lambda row: folder.log(**row),
    )
    sizes = {row["name"]: (row["file_bytes"] / 1e6, row["perplexity"]) for row in rows}
    _save_plot(
        folder,
        "size",
        lambda fmt: plot.scatter(
            sizes, "weights on disk, MB", "perplexity", "Size and quality", fmt, True, True
        ),
    )
    return {
        "rows": list(rows),
        "data": resolved.of_text(scored),
        "predictions": int(windows.shape[0] * (windows.shape[1] - 1)),
    }


def show_compare(result: dict[str, Any], console: Any) -> None:
    """Print a line for each version."""
    rows = result["rows"]
    there = [column for column in VERSIONS if any(column.key in row for row in rows)]
    title = f"{result['data']['origin']}, {result['predictions']:,} predictions"
    report.print_table(rows, there, title, console)


def _recipe_or_model(name: str) -> compress.Recipe | None:
    """Return the recipe that a name stands for; None for a model, which is loaded in its turn.

    Raises:
      InputError: a recipe that is not one, or a name of neither.
    """
    if name in compress.RECIPES or "(" in name or name.lower().endswith(SUFFIXES):
        return _recipe(name)
    if name in KNOWN or "/" in name or Path(name).exists() or where(name) is not None:
        return None
    raise unknown("--versions", name, (*compress.RECIPES, *KNOWN))


def _version(
    bundle: hub.Bundle, name: str, recipe: compress.Recipe | None, options: Compare
) -> Callable[[], hub.Bundle]:
    """Return a function that makes a recipe's result, or loads a model."""
    if recipe is None:
        return lambda: hub.from_pretrained(name)

    def made() -> hub.Bundle:
        batches = None
        if recipe.needs:
            batches = _batches(bundle, data.load_text(options.calibration), options)
        return compress.compress_bundle(bundle, recipe, batches=batches)[0]

    return made
