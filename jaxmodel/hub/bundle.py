"""`Bundle`: a model with its weights, processor and card; and its form on disk, a folder in HF layout.

    config.json         the config under HF names
    model.safetensors   one tensor per layer and leaf under HF names; a compressed leaf is several (weight_packed, weight_scale)
    jaxmodel.json       versioned: family, config, policy, card, and the static fields of the compressed leaves
    tokenizer.json ...  the processor

A folder with plain leaves is one that transformers loads. Saving is atomic: the new folder is written beside the old one,
synced, and takes its place at the end, so a full disk leaves the old bundle whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmodel import layers, tree
from jaxmodel.errors import InputError, nearest, unknown
from jaxmodel.hub import tokenizer as tokenizers
from jaxmodel.hub.names import FAMILIES, Family, Name, find, heads_of, to_leaf
from jaxmodel.leaves import expand, from_tensors, to_tensors
from jaxmodel.leaves.leaf import tensor_names
from jaxmodel.models import Model
from jaxmodel.ops import Policy

FORMAT = 1
WEIGHTS, OURS = "model.safetensors", "jaxmodel.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """What `from_pretrained` returns and every verb takes.

    Attributes:
      model: pure functions.
      params: the stored form: separate leaves, packed.
      processor: the tokenizer, or None.
      card: what is known about it: name, source, training data, compression report.
    """

    model: Model
    params: tree.Params = dataclasses.field(repr=False)
    processor: tokenizers.Tokenizer | None = None
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the bundle to a folder, atomically; `from_pretrained(folder)` reads it back bit for bit."""
        return save(self, folder)

    def running(self) -> tree.Params:
        """The params in the form that runs fastest: sparse leaves expanded, maps of one input fused."""
        return layers.fuse(expand(self.params))


def save(bundle: Bundle, folder: str | Path) -> Path:
    """Write a bundle; the files are those of the module's docstring.

    Raises:
      InputError: the folder cannot be written. What stood there before is untouched.
    """
    kind, family = _family_of(bundle.model)
    tensors: dict[str, np.ndarray] = {}
    fields: dict[str, Any] = {}
    for path, leaf in tree.flatten(tree.unstack(jax.device_get(bundle.params))).items():
        name, layer = find(family.hf, path)
        arrays, static = to_tensors(leaf)
        if static is None:
            _put(tensors, name, layer, np.asarray(arrays[""]))
        else:
            base = name.packed.format(layer)
            fields[base] = static
            tensors |= {f"{base}_{suffix}": np.asarray(array) for suffix, array in arrays.items()}
    ours = {
        "format": FORMAT,
        "family": kind,
        "config": dataclasses.asdict(bundle.model.config),
        "policy": {k: v for k, v in dataclasses.asdict(bundle.model.policy).items() if k != "axes"},  # axes belong to a mesh
        "card": dict(bundle.card),
        "leaves": fields,
    }
    with _replacing(Path(folder)) as beside:
        whole = {name: _whole(part) for name, part in tensors.items()}
        save_file(whole, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / "config.json").write_text(json.dumps(family.config_to_hf(bundle.model.config), indent=2) + "\n")
        (beside / OURS).write_text(json.dumps(ours, indent=1) + "\n")
        if bundle.processor is not None:
            bundle.processor.save(beside)
    return Path(folder)


def load(folder: Path, policy: Policy | None = None, dtype: str | None = None) -> Bundle:
    """Read a bundle, ours or HF's.

    Raises:
      InputError: a file, tensor or key is missing, of an unknown family, or does not fit; nothing is half loaded.
    """
    config_json = _read_json(folder / "config.json")
    kind = config_json.get("model_type")
    if kind not in FAMILIES:
        raise unknown(f"{folder}/config.json: model_type", kind, FAMILIES)
    family = FAMILIES[kind]
    ours = _read_json(folder / OURS) if (folder / OURS).exists() else {}
    if ours and ours.get("format") != FORMAT:
        raise InputError(f"{folder}/{OURS}: format {ours.get('format')!r} is not read; allowed: {FORMAT}")
    try:
        config = family.config_from_hf(config_json)
    except KeyError as error:
        raise InputError(f"{folder}/config.json: the key {error} is missing") from None
    stored = Policy(**ours["policy"]) if ours else Policy()
    policy = policy or (stored if dtype is None else dataclasses.replace(stored, compute=dtype))
    model = family.model(config, policy)
    with _open(folder) as files:
        params = _read_params(model, family, ours.get("leaves", {}), files, str(folder))
    if dtype is not None or not ours:
        params = tree.cast(params, dtype or "float32")
    has_tokenizer = (folder / "tokenizer.json").exists()
    return Bundle(model, params, tokenizers.from_folder(folder) if has_tokenizer else None, ours.get("card", {}))


def _read_params(
    model: Model, family: Family, fields: Mapping[str, Any], files: Mapping[str, Any], where: str
) -> tree.Params:
    shapes = tree.flatten(tree.unstack(layer_shapes(model)))
    used: set[str] = set()

    def read(tensor: str) -> np.ndarray:
        for name in (tensor, tensor.removeprefix(family.prefix)):
            if name in files:
                used.add(name)
                return files[name].get_tensor(name)
        close = ", ".join(nearest(tensor, files)) or "nothing like it"
        raise InputError(f"{where}: the tensor {tensor!r} is missing; there is {close}")

    leaves: dict[str, Any] = {}
    for path, want in shapes.items():
        name, layer = find(family.hf, path)
        tensor, base = name.tensor.format(layer), name.packed.format(layer)
        if base in fields:
            static = fields[base]
            there = [s for s in tensor_names(static) if f"{base}_{s}" in files]
            leaves[path] = from_tensors({suffix: read(f"{base}_{suffix}") for suffix in there}, static)
        else:
            raw = read(tensor)
            try:
                leaves[path] = to_leaf(name, raw, heads_of(model.config, path))
            except ValueError:
                leaves[path] = raw
        if tuple(leaves[path].shape) != tuple(want.shape):
            found, needed = list(leaves[path].shape), list(want.shape)
            raise InputError(f"{where}: the tensor {tensor!r} has shape {found}; the config needs {needed}")
    extra = [n for n in files if n not in used and not re.fullmatch(f"({family.prefix})?({family.ignored})", n)]
    if extra:
        raise InputError(f"{where}: {len(extra)} tensors have no place in the model, the first is {sorted(extra)[0]!r}")
    return tree.stack(tree.unflatten(leaves))


def layer_shapes(model: Model) -> tree.Params:
    """The shapes of all leaves, a layer each."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves: dict[str, Any] = {}
    for path, leaf in tree.flatten(shapes).items():
        for layer in tree.layer_paths(path):
            leaves[layer] = jax.ShapeDtypeStruct(tree.layer_shape(path, leaf), leaf.dtype)
    return tree.unflatten(leaves)


# ------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> the open safetensors file that has it; all shards of an index."""
    index = folder / f"{WEIGHTS}.index.json"
    shards = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else [WEIGHTS]
    files: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for shard in shards:
            if not (folder / shard).exists():
                raise InputError(f"{folder}: the file {shard!r} is missing")
            try:
                file = stack.enter_context(safe_open(folder / shard, framework="numpy"))
            except SafetensorError as error:
                raise InputError(f"{folder / shard}: not a whole safetensors file: {error}") from None
            files |= dict.fromkeys(file.keys(), file)
        yield files


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder`, which takes its place when the block ends well and vanishes when it does not."""
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"out: {str(folder)!r} is a file; a folder is needed")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise InputError(f"out: {str(folder)!r} holds something else than a bundle; choose an empty or new folder")
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        beside.chmod(0o755)
        yield beside
        for path in [*beside.iterdir(), beside]:
            _sync(path)
        if folder.exists():
            old = beside.with_name(beside.name.replace(".new-", ".old-"))
            folder.rename(old)
            beside.rename(folder)
            shutil.rmtree(old)
        else:
            beside.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"out: {str(folder)!r} cannot be written: {error}; what stood there is unchanged") from error
    finally:
        if beside is not None and beside.exists():
            shutil.rmtree(beside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path.parent}: the file {path.name!r} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: an object is needed, found {type(value).__name__}")
    return value


def _family_of(model: Model) -> tuple[str, Family]:
    for kind, family in FAMILIES.items():
        if type(model.config).__module__ == family.model.__module__:
            return kind, family
    raise InputError(f"hub: no file layout is known for {type(model.config).__module__}")


def _put(tensors: dict[str, Any], name: Name, layer: str, array: np.ndarray) -> None:
    """Add a plain leaf in the file's form; equal parts of one tensor wait until all are there (see `_whole`)."""
    tensor = name.tensor.format(layer)
    array = array.T if name.transposed else array
    if name.part is None:
        tensors[tensor] = array
    else:
        tensors.setdefault(tensor, [None] * name.part[1])[name.part[0]] = array


def _whole(value: np.ndarray | list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate(value, axis=-1) if isinstance(value, list) else value)
