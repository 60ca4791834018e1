"""`from_pretrained`: a folder, a GGUF file, a known name or a hub id becomes a `Bundle`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError, require, unknown
from jaxmodel.hub import tokenizer as tokenizers
from jaxmodel.hub.bundle import Bundle, layer_shapes, load
from jaxmodel.hub.gguf import find_smollm2, read_gguf
from jaxmodel.hub.names import FAMILIES, find, heads_of, to_leaf
from jaxmodel.ops import Policy

KNOWN: dict[str, Callable[[], Path]] = {"smollm2-135m": find_smollm2}
"""Models that installed packages carry, by name."""


def from_pretrained(source: str | Path, *, policy: Policy | None = None, dtype: str | None = None) -> Bundle:
    """Load a model with its weights and processor.

    Args:
      source: a folder in HF layout (ours or another's), a `.gguf` file, a known name (`smollm2-135m`), or a hub id
        (`org/name`).
      policy: how to compute; default the stored policy of our own folders, else float32.
      dtype: of the plain floating leaves, and of the computation unless a policy is given; default as stored in our own
        folders, else float32.

    Raises:
      InputError: nothing of that name, or a file that is damaged, of an unknown kind or incomplete.
    """
    if dtype is not None:
        Policy(compute=dtype)  # names what is allowed
    path, name = Path(source), str(source)
    if name in KNOWN:
        return _from_gguf(KNOWN[name](), policy, dtype, name)
    if path.is_dir():
        return load(path, policy, dtype)
    if path.suffix == ".gguf" or path.is_file():
        return _from_gguf(path, policy, dtype, path.stem)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        return load(_download(name), policy, dtype)
    error = unknown("model", name, KNOWN)
    raise InputError(f"{error}; or give an existing folder, a .gguf file, or a hub id 'org/name'")


def _from_gguf(path: Path, policy: Policy | None, dtype: str | None, name: str) -> Bundle:
    file = read_gguf(path)
    kind = file.metadata.get("general.architecture")
    readable = {k: f for k, f in FAMILIES.items() if f.config_from_gguf}
    if kind not in readable:
        raise unknown(f"{path.name}: general.architecture", kind, readable)
    family = readable[kind]
    assert family.config_from_gguf is not None
    config = family.config_from_gguf(file.metadata)
    if "output.weight" in file.tensors:
        config = dataclasses.replace(config, tied=False)
    model = family.model(config, policy or Policy(compute=dtype or "float32"))
    leaves, extra = {}, set(file.tensors)
    for leaf_path, want in tree.flatten(layer_shapes(model)).items():
        entry, layer = find(family.gguf, leaf_path)
        tensor = entry.tensor.format(layer)
        if tensor not in file.tensors:
            raise InputError(f"{path.name}: the tensor {tensor!r} is missing")
        found = file.tensors[tensor].shape
        if found != want.shape:
            needed = f"the metadata needs {list(want.shape)}"
            raise InputError(f"{path.name}: the tensor {tensor!r} has shape {list(found)}; {needed}")
        extra.discard(tensor)
        leaf = to_leaf(entry, file.read(tensor), heads_of(config, leaf_path))
        leaves[leaf_path] = jnp.asarray(leaf, dtype or "float32")
    if extra:  # a bias or a table of rotary factors left out would be another model
        raise InputError(f"{path.name}: {len(extra)} tensors have no place in the model, the first is {min(extra)!r}")
    processor = tokenizers.from_gguf(file.metadata)
    card = {"name": name, "source": path.name, "license": file.metadata.get("general.license")}
    return Bundle(model, tree.stack(tree.unflatten(leaves)), processor, card)


def _download(name: str) -> Path:
    hub = require("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the hub raises its own errors and those of its transport
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model: {name!r} is no folder here and cannot be had from the hub: {first}") from error
