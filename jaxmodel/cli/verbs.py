"""What each verb does: `run(options, folder) -> result` and `show(result, console)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxmodel.cli.options import Eval, Generate, Merge
from jaxmodel.errors import InputError
from jaxmodel.limits import limits
from jaxmodel.progress import step
from jaxmodel.report.table import console_for


class Verb(NamedTuple):
    """A verb's functions.

    run(options, folder) -> result: does the work; the result is plain data.
    show(result, console): prints it for people.
    prepare(options): what must happen before JAX starts its devices.
    code(result): the exit code, or what the work raises once its results are kept.
    keeps: whether a run folder keeps what came out; of a verb that only reads nothing stays.
    """

    run: Callable[..., Any]
    show: Callable[..., None]
    prepare: Callable[..., None] = lambda options: None
    code: Callable[[Any], int] = lambda result: 0
    keeps: bool = True


def find(name: str) -> Verb:
    """Return the functions of a verb; those of the large ones are imported only now."""
    if name == "demo":
        from jaxmodel.cli import demo

        return Verb(demo.run, demo.show)
    if name in ("train", "replay"):
        from jaxmodel.cli import training

        if name == "train":
            return Verb(training.run, training.show, training.prepare, training.code)
        return Verb(training.replay, training.show_replay, training.prepare_replay)
    if name in ("models", "predict", "summary"):
        from jaxmodel.cli import inspect

        return Verb(
            getattr(inspect, name), getattr(inspect, f"show_{name}"), keeps=name == "predict"
        )
    if name == "methods":
        from jaxmodel.cli import methods

        return Verb(methods.run, methods.show, keeps=False)
    if name in ("compress", "sensitivity", "compare"):
        from jaxmodel.cli import compression

        return Verb(getattr(compression, f"run_{name}"), getattr(compression, f"show_{name}"))
    return {
        "eval": Verb(_eval, _show_eval),
        "generate": Verb(_generate, _show_generate),
        "merge": Verb(_merge, _show_merge),
    }[name]


# --------------------------------------------------------------------------------------------- eval


def _eval(options: Eval, folder: Any) -> dict[str, Any]:
    from jaxmodel import data, evaluate, generation, hub
    from jaxmodel.cli import resolved

    text = data.load_text(options.data)
    bundle = generation.for_inference(
        hub.from_pretrained(options.model, dtype=options.dtype, adapters=options.adapter)
    )
    if not bundle.model.continues:
        raise InputError(
            f"model: {options.model!r} does not continue texts; allowed: a decoder, such as "
            f"smollm2-135m"
        )
    folder.resolve(model=resolved.of_model(bundle.model), data=resolved.of_text(text))
    windows, tokens = resolved.windows(
        text,
        hub.need_processor(bundle),
        options.window,
        options="--data, --window",
        limit=options.max_windows,
    )
    score = evaluate.perplexity(bundle.model, bundle.params, windows, seed=options.seed)
    return {
        **dataclasses.asdict(score),
        "tokens": tokens,
        "windows": len(windows),
        "model": options.model,
        "data": resolved.of_text(text),
    }


def _show_eval(result: dict[str, Any], console: Any) -> None:
    low, high = result["interval"]
    console.print(
        f"{result['data']['origin']}: {result['tokens']} tokens, {result['predictions']} "
        f"predictions"
    )
    console.print(
        f"NLL {result['nll']:.5f} [{low:.3f}, {high:.3f}], perplexity {result['perplexity']:.3f}"
    )


# ----------------------------------------------------------------------------------------- generate


def _generate(options: Generate, folder: Any) -> dict[str, Any]:
    from rich.text import Text

    from jaxmodel import generation, hub, report
    from jaxmodel.cli import resolved

    messages, tools, documents = _talk(options)
    request = generation.GenerationRequest(  # refuses values out of range before anything is loaded
        generation.SamplingParams(
            options.temperature,
            options.top_k,
            options.top_p,
            options.min_p,
            options.repetition_penalty,
        ),
        options.max_new_tokens,
        options.stop,
        options.seed,
        special=not options.chat,  # a chat template writes what begins a text itself
    )
    bundle = generation.for_inference(
        hub.from_pretrained(options.model, dtype=options.dtype, adapters=options.adapter)
    )
    prompt = options.prompt
    if options.chat:
        prompt = hub.need_processor(bundle).apply_chat(messages, tools=tools, documents=documents)
    folder.resolve(model=resolved.of_model(bundle.model), request=request)
    console = console_for(options.json)
    if console.is_terminal:  # the text as it comes
        show = lambda piece: console.print(Text(piece), end="", soft_wrap=True)
        if not options.chat:
            console.print(Text(prompt, style="dim"), end="", soft_wrap=True)
        (done,) = generation.generate_ids(bundle, [prompt], request, show=show)
        console.print()
    else:
        (done,) = generation.generate_ids(bundle, [prompt], request)
    said = {"prompt": prompt, "chat": options.chat, "model": options.model}
    return {**dataclasses.asdict(done), **said, "processor": report.processor(folder.versions)}


def _talk(options: Generate) -> tuple[list[dict[str, Any]], Any, Any]:
    """Return the messages of a chat, its tools and its documents.

    Raises:
      InputError: a file that cannot be read, or options of a chat without --chat.
    """
    from pathlib import Path

    from jaxmodel import schema
    from jaxmodel.files import read_bytes

    given = {name: getattr(options, name) for name in ("system", "tools", "documents")}
    if not options.chat and any(value is not None for value in given.values()):
        name = next(name for name, value in given.items() if value is not None)
        raise InputError(f"--{name}: a chat is needed for it; give --chat too")
    messages: list[dict[str, Any]] = [{"role": "user", "content": options.prompt}]
    if options.system is not None:
        is_file = (
            len(options.system) < 4096
            and "\n" not in options.system
            and Path(options.system).is_file()
        )
        try:
            said = (
                read_bytes(options.system, limits().json_bytes).decode().strip()
                if is_file
                else options.system
            )
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--system: {options.system!r} cannot be read as UTF-8 text: {error}"
            ) from None
        messages.insert(0, {"role": "system", "content": said})
    read = lambda path: None if path is None else schema.read(Path(path), list[dict[str, Any]])
    return messages, read(options.tools), read(options.documents)


def _show_generate(result: dict[str, Any], console: Any) -> None:
    from rich.text import Text

    if not console.is_terminal:  # where it stands already
        console.print(
            Text("" if result.get("chat") else result["prompt"], style="dim") + Text(result["text"])
        )
    speed = f"{result['tokens_per_second']:.1f} tokens/s on {result['processor']}"
    console.print(
        Text(
            f"{len(result['ids'])} tokens, {speed}, ended by {result['finish_reason']}", style="dim"
        )
    )


# -------------------------------------------------------------------------------------------- merge


def _merge(options: Merge, folder: Any) -> dict[str, Any]:
    from jaxmodel import adapt, hub
    from jaxmodel.cli import resolved
    from jaxmodel.hub.bundle import check_target

    check_target(options.out)
    bundle = hub.from_pretrained(options.model, adapters=options.adapter)
    params, how = adapt.merge_adapters(bundle.params)
    if not how:
        raise InputError(
            f"--adapter: none given, and {options.model!r} has none; allowed: a folder of adapters"
        )
    folder.resolve(model=resolved.of_model(bundle.model))
    with step("save"):
        dataclasses.replace(bundle, params=params).save_pretrained(options.out)
    return {"merged": how, "out": options.out}


def _show_merge(result: dict[str, Any], console: Any) -> None:
    decoded = sum(how == "decoded" for how in result["merged"].values())
    plain = f" ({decoded} of them were compressed and are plain arrays now)" if decoded else ""
    console.print(
        f"{len(result['merged'])} adapters added to their weights{plain}, saved in {result['out']}",
        markup=False,
    )
