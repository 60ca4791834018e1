"""What `jaxmodel train` learns: the task, and the data and the loss that belong to it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodel.cli.options import Train
from jaxmodel.errors import InputError

TASKS = ("language", "masked", "classify", "embed", "seq2seq")
HEADS = {"masked": "mlm", "classify": "classify", "embed": "embed"}
"""Task -> the head of an encoder of texts that it needs."""
WORDS = {
    "language": "a decoder, such as gpt2 or llama",
    "masked": "an encoder of texts, such as bert or modernbert",
    "classify": "a model with classes, such as bert, vit, resnet or lenet",
    "embed": "an encoder of texts, such as bert or modernbert",
    "seq2seq": "an encoder with a decoder, such as t5, transformer or rnn",
}
MASK = "<mask>"


def images(source: str) -> bool:
    """Return whether a source is a folder with images in a sub-folder for each class."""
    from jaxmodel.hub.decode import ENDINGS

    if not os.path.isdir(source):
        return False
    return any(
        path.name.lower().endswith(ENDINGS)
        for place in Path(source).iterdir()
        if place.is_dir()
        for path in place.rglob("*")
    )


def chosen(options: Train, model: Any, kind: str | None) -> str:
    """Return the task of a run: the one that is given, or what the model and the data suggest.

    Args:
      options: of the run.
      model: what is trained.
      kind: of the data: "images", "label", "answers", "pair", or None for texts.

    Raises:
      InputError: a task that the model or the data do not allow.
    """
    reads = list(model.inputs(1, 1))
    name = options.init or options.model or "the new GPT"
    fields = {field.name for field in dataclasses.fields(model.config)}
    able = {
        "language": model.continues,
        "masked": reads == ["tokens"] and not model.continues and "head" in fields,
        "classify": bool(fields & {"classes", "labels"})
        and reads == (["pixels"] if kind == "images" else ["tokens"]),
        "embed": reads == ["tokens"] and not model.continues and "head" in fields,
        "seq2seq": "source" in reads,
    }
    suits = {
        "images": ["classify"],
        "label": ["classify", "language", "masked"],
        "answers": ["language", "seq2seq"],
        "pair": ["embed", "seq2seq"],
        None: ["language", "masked"],
    }[kind]
    if options.task is not None:
        if options.task not in suits:
            raise InputError(
                f"--task: {options.task} given for data that are {_what(kind)}; allowed: "
                f"{', '.join(suits)}"
            )
        if not able[options.task]:
            raise InputError(
                f"--task: {options.task} given for {name!r}; allowed: {WORDS[options.task]}"
            )
        return options.task
    task = next((task for task in suits if able[task]), None)
    if task is None:
        wanted = "; or ".join(WORDS[task] for task in suits)
        raise InputError(
            f"--{'init' if options.init else 'model'}: {name!r} does not fit data that are "
            f"{_what(kind)}; allowed: {wanted}"
        )
    if kind is None and getattr(model.config, "head", "mlm") == "classify" and options.init:
        raise InputError(
            f"--init: {name!r} classifies, and the data have no labels; allowed: rows with 'text' "
            f"and 'label', or --task masked"
        )
    return task


def _what(kind: str | None) -> str:
    return {
        "images": "images by class",
        "label": "texts with labels",
        "answers": "chats or prompts with completions",
        "pair": "pairs of texts",
        None: "texts",
    }[kind]


def new_config(options: Train, task: str | None = None, **more: Any) -> Any:
    """Return the config of a new model: that of the size, with what the options and the data say.

    Raises:
      InputError: an option of a size that the family has not.
    """
    from jaxmodel.models import gpt2

    if options.model is None:
        return gpt2.Config(
            more.get("vocab", options.vocab),
            options.width,
            options.depth,
            options.heads,
            options.context,
        )
    config = size(options)[1]
    fields = {field.name for field in dataclasses.fields(config)}
    given: dict[str, Any] = {"vocab": options.vocab, "context": options.context, **more}
    changed: dict[str, Any] = {name: value for name, value in given.items() if name in fields}
    if "head" in fields and task in HEADS:
        changed |= {"head": HEADS[task], **({} if task == "classify" else {"labels": ()})}
    return dataclasses.replace(config, **changed)


def size(options: Train) -> tuple[Any, Any]:
    """Return the family and the config of `--model FAMILY/SIZE`.

    Raises:
      InputError: there is none of that name; the line has the nearest.
    """
    from jaxmodel.errors import unknown
    from jaxmodel.models import sizes

    known = sizes()
    if options.model not in known:
        raise unknown("--model", options.model, known)
    return known[options.model]


def with_head(model: Any, params: Any, task: str, key: Any) -> tuple[Any, Any]:
    """Return an encoder with the head of a task; a new one where it had another."""
    import jax

    from jaxmodel import adapt
    from jaxmodel.models.family import build_of

    config = model.config
    if task not in HEADS or getattr(config, "head", HEADS[task]) == HEADS[task]:
        return model, params
    build = build_of(model)
    assert build is not None
    other = build(dataclasses.replace(config, head=HEADS[task], labels=()), model.policy)
    whole, _ = adapt.load_matching(jax.jit(other.init)(key), params)
    return other, whole


def check_known(params: Any, begun: Any, task: str) -> None:
    """Refuse adapters for a model with new leaves: they would neither train nor be saved.

    Raises:
      InputError: a leaf that `begun` does not have.
    """
    from jaxmodel import tree

    new = set(tree.flatten(params)) - set(tree.flatten(begun))
    if new:
        raise InputError(
            f"--task: {task} with --lora given, and {', '.join(sorted(new))} would be new and not "
            "train; allowed: without --lora, or a model that has them"
        )


def loss_of(task: str, model: Any, tokenizer: Any) -> Any:
    """Return the loss of a task; None for what the batch itself asks for."""
    from jaxmodel import contrib, losses
    from jaxmodel.data import augment
    from jaxmodel.losses.views import info_nce

    if task == "classify":
        return losses.classification
    if task == "embed":
        return losses.contrastive(functools.partial(info_nce, temperature=0.05))
    if task == "masked":
        special = max(tokenizer.special_ids, default=-1) + 1
        lowest = special if special < tokenizer.vocab_size // 2 else 0
        hide = augment.SpanMasking(mask_id(tokenizer), tokenizer.vocab_size, lowest=lowest)
        return contrib.pretext(losses.next_token, hide)
    return losses.next_token


def mask_id(tokenizer: Any) -> int:
    """Return the token that stands for a hidden one.

    Raises:
      InputError: the tokenizer has none.
    """
    names = [tokenizer.named_tokens.get("mask_token"), MASK, "[MASK]"]
    found = (tokenizer.backend.token_to_id(name) for name in names if name)
    token = next((i for i in found if i is not None), None)
    if token is None:
        raise InputError(
            f"--task: masked given, and the tokenizer has no mask token; allowed: one with {MASK} "
            f"or [MASK]"
        )
    return token


def learnt(texts: Any, options: Train, task: str) -> Any:
    """Return a tokenizer that is learnt from texts, with a mask token where the task hides some."""
    from jaxmodel import hub

    masked = task == "masked"
    tokenizer = hub.train_bpe(texts, options.vocab - masked)
    if not masked:
        return tokenizer
    tokenizer.backend.add_special_tokens([MASK])
    return dataclasses.replace(tokenizer, special={**tokenizer.named_tokens, "mask_token": MASK})


def image_folders(options: Train, config: Any, processor: Any, names: Sequence[str]) -> Any:
    """Return the training and the held-out images; None for the latter without --heldout."""
    from jaxmodel import data

    if len(options.data) != 1:
        raise InputError(
            f"--data: {len(options.data)} folders of images given; allowed: one, with a folder for "
            f"each class"
        )
    side = getattr(config, "size", None) or config.image
    make = functools.partial(
        data.ImageFolder, resize=(side, side), channels=config.channels, reads=processor
    )
    folder = make(options.data[0], classes=names or None)
    judged = None
    if options.heldout is not None:
        judged = make(options.heldout, classes=folder.names)
    return folder, judged


def trainable(patterns: Sequence[str], params: Any) -> Any:
    """Return the rules of `--trainable`, by which leaves that match a pattern train.

    Raises:
      InputError: a pattern that is no regular expression or matches no leaf.
    """
    import re

    from jaxmodel import tree

    paths = sorted({one for path in tree.flatten(params) for one in tree.layer_paths(path)})
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise InputError(
                f"--trainable: {pattern!r} given, which is no regular expression ({error})"
            ) from None
        if not found:
            from jaxmodel.errors import nearest

            close = nearest(pattern, paths, 3) or paths[:3]
            raise InputError(
                f"--trainable: {pattern!r} matches no leaf of the model; there are "
                f"{', '.join(close)}, ... (`jaxmodel summary` lists them)"
            )
    return (*((tree.optional(pattern), True) for pattern in patterns), (".*", False))
