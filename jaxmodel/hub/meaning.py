"""The meaning of a model's outputs, which other people's files state apart from the sizes.

These are `problem_type` of classifiers, and the files of sentence-transformers: modules.json,
1_Pooling/config.json, sentence_bert_config.json and config_sentence_transformers.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodel import schema
from jaxmodel.errors import InputError, one_of, unknown
from jaxmodel.hub.schemas import Config, Generation, Modules, Pooling, Prompts, Sentences
from jaxmodel.models.sentences import POOLINGS

_OLD = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def with_meaning(config: Any, hf: Mapping[str, Any], folder: Path) -> Any:
    """Return a config that includes the meaning of its outputs.

    Args:
      config: as its family reads it.
      hf: config.json.
      folder: that holds the other files.

    Raises:
      InputError: a setting that is not supported; the message names it.
    """
    more: dict[str, Any] = {}
    if hasattr(config, "problem") and (problem := hf.get("problem_type")) is not None:
        one_of(f"{folder}/config.json: problem_type", problem, PROBLEMS)
        more["problem"] = problem
    if getattr(config, "head", "") == "embed" and (pooling := _pooling(folder)) is not None:
        more["pooling"] = pooling
    return dataclasses.replace(config, **more) if more else config


def without_meaning(config: Any) -> tuple[Any, dict[str, Any]]:
    """Return the config that its family writes, and the keys of config.json that state the rest.

    The pooling is stated by files of its own (`save`).
    """
    usual = {
        f.name: f.default for f in dataclasses.fields(config) if f.name in ("problem", "pooling")
    }
    problem = getattr(config, "problem", "")
    return dataclasses.replace(config, **usual), {"problem_type": problem} if problem else {}


def special_ids(folder: Path) -> dict[str, Any]:
    """Return the ids that begin, end and pad a text, by their key.

    They come from generation_config.json, else from config.json; {} if there are none.
    """
    hf = schema.read(folder / "config.json", Config)
    said = schema.read(folder / "generation_config.json", Generation, missing=True)
    found = {}
    for part in (hf.get("text_config") or {}, hf, said):
        found |= {key: part[key] for key in Generation.__annotations__ if part.get(key) is not None}
    return found


def _pooling(folder: Path) -> tuple[str, ...] | None:
    """Return how sentence-transformers pools the vectors of a text; None if no file says it.

    Raises:
      InputError: a module, or a way of pooling, that is not supported.
    """
    path = folder / "modules.json"
    where = "1_Pooling"
    for module in schema.read(path, Modules) if path.exists() else []:
        kind = module["type"].rsplit(".", 1)[-1]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise InputError(
                f"{path}: the module {kind!r} is not supported, and without it the vectors would "
                "differ; allowed: Transformer, Pooling, Normalize"
            )
        where = module["path"] if kind == "Pooling" else where
    path = folder / where / "config.json"
    if ".." in Path(where).parts or Path(where).is_absolute():
        raise InputError(f"{folder}/modules.json: the path {where!r} leads out of the folder")
    if not path.exists():
        return None
    said = schema.read(path, Pooling)
    if said.get("include_prompt") is False and read_card(folder).get("prompt"):
        raise InputError(
            f"{path}: include_prompt is false, with a prompt before every text; that is not "
            "supported"
        )
    for key in said:
        if key.startswith("pooling_mode_") and said[key] and key not in _OLD:
            raise unknown(f"{path}: a key", key, _OLD)
    modes = said.get("pooling_mode") or [_OLD[key] for key in _OLD if said.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        one_of(f"{path}: pooling_mode", mode, POOLINGS)
    return modes


def read_card(folder: Path) -> dict[str, Any]:
    """Return how sentence-transformers treats a text: `max_tokens`, `lower_case`, `prompt`.

    Raises:
      InputError: the default prompt is not among the prompts.
    """
    said = schema.read(folder / "sentence_bert_config.json", Sentences, missing=True)
    card: dict[str, Any] = {}
    if said.get("max_seq_length") is not None:
        card["max_tokens"] = said["max_seq_length"]
    if said.get("do_lower_case"):
        card["lower_case"] = True
    path = folder / "config_sentence_transformers.json"
    told = schema.read(path, Prompts, missing=True)
    if (name := told.get("default_prompt_name")) is not None:
        prompts = told.get("prompts") or {}
        one_of(f"{path}: default_prompt_name", name, prompts)
        card["prompt"] = prompts[name]
    return card


def save(config: Any, card: Mapping[str, Any], folder: Path) -> None:
    """Write the files of sentence-transformers, if the model embeds texts."""
    if getattr(config, "head", "") != "embed":
        return
    kinds = (
        ("0", "", "Transformer"),
        ("1", "1_Pooling", "Pooling"),
        ("2", "2_Normalize", "Normalize"),
    )
    modules = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{k}"}
        for i, path, k in kinds
    ]
    modes = config.pooling
    pooling = {
        "word_embedding_dimension": config.width,
        **{key: mode in modes for key, mode in _OLD.items()},
    }
    if len(modes) > 1:  # only the new form states their order
        pooling = {"embedding_dimension": config.width, "pooling_mode": list(modes)}
    read = {
        "max_seq_length": card.get("max_tokens", config.context),
        "do_lower_case": bool(card.get("lower_case", False)),
    }
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": read,
    }
    if card.get("prompt"):
        told = {"prompts": {"default": card["prompt"]}, "default_prompt_name": "default"}
        files["config_sentence_transformers.json"] = told
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
