"""`Bundle`: a model with its weights, processor and card; and its form on disk, a folder in HF layout.

    config.json         the config under HF names
    model.safetensors   a tensor a layer and leaf under HF names; a compressed leaf is several (weight_scale, ...)
    jaxmodel.json       versioned: family, config, policy, card, and the static fields of the compressed leaves
    tokenizer.json ...  the processor

A folder with plain leaves is one that transformers loads. Saving is atomic: the new folder is written beside the old
one, synced, and takes its place at the end, so a full disk or a kill leaves the old bundle whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmodel import layers, tree
from jaxmodel.errors import InputError, nearest, unknown
from jaxmodel.hub import tokenizer as tokenizers
from jaxmodel.hub.names import FAMILIES, Family, Name, file_shape, find, heads_of, to_leaf
from jaxmodel.leaves import expand, from_tensors, to_tensors
from jaxmodel.leaves.leaf import tensor_names
from jaxmodel.models import Model
from jaxmodel.ops import Policy

FORMAT = 1
WEIGHTS, OURS, HEAD = "model.safetensors", "jaxmodel.json", "lm_head.weight"

# What a folder may hold that a save takes the place of: the files of a bundle, as we or transformers write them.
_REPLACED = re.compile(
    r"(config|jaxmodel|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|merges\.txt|chat_template\.jinja|\.DS_Store"
)


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


def need_processor(bundle: Bundle) -> tokenizers.Tokenizer:
    """The bundle's tokenizer.

    Raises:
      InputError: it has none.
    """
    if bundle.processor is None:
        raise InputError(f"model: {bundle.card.get('name', 'the bundle')!r} has no tokenizer; text cannot be read")
    return bundle.processor


def save(bundle: Bundle, folder: str | Path) -> Path:
    """Write a bundle; the files are those of the module's docstring.

    Raises:
      InputError: params that are not those of the config, or a folder that cannot be written; its content is untouched.
    """
    kind, family = _family_of(bundle.model)
    tensors: dict[str, np.ndarray] = {}
    fields: dict[str, Any] = {}
    parts: dict[str, list[tuple[Name, str, np.ndarray]]] = {}
    leaves = tree.flatten(bundle.params)
    shapes = {layer: tree.layer_shape(path, leaf) for path, leaf in leaves.items() for layer in tree.layer_paths(path)}
    for path, want in tree.flatten(layer_shapes(bundle.model)).items():
        if path not in shapes:
            raise InputError(f"params: the leaf {path!r} is missing; a fused tree is for running, not for saving")
        if shapes[path] != want.shape:
            raise InputError(f"params: {path!r} has shape {list(shapes[path])}; the config needs {list(want.shape)}")
    for path, leaf in leaves.items():
        arrays, static = to_tensors(leaf)
        arrays = {suffix: np.asarray(array) for suffix, array in arrays.items()}
        for i, layer_path in enumerate(tree.layer_paths(path)):
            name, layer = find(family.hf, layer_path)
            one = {suffix: array[i] if tree.is_stacked(path) else array for suffix, array in arrays.items()}
            if static is None:
                plain = one[""].T if name.transposed else one[""]
                parts.setdefault(name.tensor.format(layer), []).append((name, layer, plain))
            else:
                base = name.packed.format(layer)
                fields[base] = static
                tensors |= {f"{base}_{suffix}": np.ascontiguousarray(array) for suffix, array in one.items()}
    for tensor, found in parts.items():
        tensors |= _join(tensor, found)
    policy = dataclasses.asdict(bundle.model.policy)
    del policy["axes"]  # they belong to a mesh
    ours = {
        "format": FORMAT,
        "family": kind,
        "config": dataclasses.asdict(bundle.model.config),
        "policy": policy,
        "card": dict(bundle.card),
        "leaves": fields,
        "leaves_sha256": _digest(fields),
    }
    with _replacing(Path(folder)) as beside:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        config = {**family.config_to_hf(bundle.model.config), **_special_ids(bundle.processor)}
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
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
    kind = str(config_json.get("model_type"))
    if kind not in FAMILIES:
        raise unknown(f"{folder}/config.json: model_type", kind, FAMILIES)
    family = FAMILIES[kind]
    config = _config(family, config_json, folder)
    ours = _read_ours(folder / OURS, kind, config) if (folder / OURS).exists() else {}
    stored = Policy(**ours["policy"]) if ours else Policy()
    policy = policy or (stored if dtype is None else dataclasses.replace(stored, compute=dtype))
    model = family.model(config, policy)
    with _open(folder) as files:
        params = _read_params(model, family, ours.get("leaves", {}), files, str(folder))
    if dtype is not None or not ours:
        params = tree.cast(params, dtype or "float32")
    has_tokenizer = (folder / "tokenizer.json").exists()
    return Bundle(model, params, tokenizers.from_folder(folder) if has_tokenizer else None, ours.get("card", {}))


def _config(family: Family, hf: Mapping[str, Any], folder: Path) -> Any:
    """The config in config.json, with the types of its fields checked."""
    try:
        config = family.config_from_hf(hf)
    except InputError as error:
        raise InputError(f"{folder}/config.json: {str(error).removeprefix('config.json: ')}") from None
    except KeyError as error:
        raise InputError(f"{folder}/config.json: the key {error} is missing") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{folder}/config.json: a value is of the wrong kind: {_line(error)}") from None
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) not in kinds.get(str(field.type), (type(value),)) or (field.type == "int" and value < 1):
            raise InputError(f"{folder}/config.json: {field.name} is {value!r}; allowed: a positive {field.type}")
    return config


def _read_ours(path: Path, kind: str, config: Any) -> dict[str, Any]:
    """jaxmodel.json, which must agree with itself and with config.json."""
    ours = _read_json(path)
    if ours.get("format") != FORMAT:
        raise InputError(f"{path}: format {ours.get('format')!r} is not read; allowed: {FORMAT}")
    for key in ("family", "config", "policy", "card", "leaves", "leaves_sha256"):
        if key not in ours:
            raise InputError(f"{path}: the key {key!r} is missing")
    theirs = {"family": kind, **dataclasses.asdict(config)}
    for key, value in {"family": ours["family"], **ours["config"]}.items():
        if theirs.get(key) != value:
            raise InputError(f"{path}: {key} is {value!r}, but config.json says {theirs.get(key)!r}")
    fields = [field.name for field in dataclasses.fields(Policy)]
    for key in ours["policy"]:
        if key not in fields:
            raise unknown(f"{path}: policy", key, fields)
    if _digest(ours["leaves"]) != ours["leaves_sha256"]:  # some wrong fields fit the arrays and give other weights
        raise InputError(f"{path}: the static fields of the leaves are not those that were written (leaves_sha256)")
    return ours


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_params(model: Model, family: Family, fields: Mapping[str, Any], files: Mapping[str, Any], where: str) -> tree.Params:
    shapes = tree.flatten(layer_shapes(model))
    used: set[str] = set()

    def place(tensor: str) -> str | None:
        return next((name for name in (tensor, tensor.removeprefix(family.prefix)) if name in files), None)

    def read(tensor: str) -> np.ndarray:
        name = place(tensor)
        if name is None:
            close = ", ".join(nearest(tensor, files)) or "nothing like it"
            raise InputError(f"{where}: the tensor {tensor!r} is missing; there is {close}")
        used.add(name)
        return files[name].get_tensor(name)

    def fits(tensor: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
        if tuple(found) != tuple(needed):
            raise InputError(f"{where}: the tensor {tensor!r} has shape {list(found)}; the config needs {list(needed)}")

    leaves: dict[str, Any] = {}
    for path, want in shapes.items():
        name, layer = find(family.hf, path)
        base = name.packed.format(layer)
        if base in fields:
            try:
                there = [suffix for suffix in tensor_names(fields[base]) if place(f"{base}_{suffix}")]
                leaves[path] = from_tensors({suffix: read(f"{base}_{suffix}") for suffix in there}, fields[base])
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}: the tensor {base!r} does not fit its fields: {_line(error)}") from None
            fits(base, leaves[path].shape, want.shape)
            continue
        name = name.alone if name.part is not None and place(base) else name
        tensor = name.tensor.format(layer)
        raw = read(tensor)
        if not jnp.issubdtype(raw.dtype, jnp.floating):
            raise InputError(f"{where}: the tensor {tensor!r} is {raw.dtype}; floating-point numbers are needed")
        fits(tensor, raw.shape, file_shape(name, want.shape))
        leaves[path] = to_leaf(name, raw, heads_of(model.config, path))
    extra = [n for n in files if n not in used and not re.fullmatch(f"({family.prefix})?({family.ignored})", n)]
    if extra:
        raise InputError(f"{where}: {len(extra)} tensors have no place in the model, the first is {min(extra)!r}")
    if HEAD in files and HEAD not in used and not np.array_equal(files[HEAD].get_tensor(HEAD), leaves["embed"]):
        raise InputError(f"{where}: the tensor {HEAD!r} is not the embedding, to which this config ties the head")
    return jax.device_put(tree.stack(tree.unflatten(leaves)))  # not NumPy: that would travel at every call


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
    index, shards = folder / f"{WEIGHTS}.index.json", [WEIGHTS]
    if index.exists() and not (folder / WEIGHTS).exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: the key 'weight_map' (tensor -> file) is missing")
        shards = sorted(set(weight_map.values()))
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


def check_target(folder: str | Path) -> Path:
    """Where a bundle saved to `folder` will stand; to be asked before the work whose result is saved there.

    Raises:
      InputError: it is a file, or a folder that holds something else than a bundle.
    """
    target = Path(os.path.realpath(folder))  # a link stays one
    if target.exists() and not target.is_dir():
        raise InputError(f"out: {str(folder)!r} is a file; a folder is needed")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    other = [name for name in there if not _REPLACED.fullmatch(name)]
    if other or (there and "config.json" not in there):
        what = f"{(other or there)[0]!r}, which is no file of a bundle" if other else "no config.json, so no bundle"
        raise InputError(f"out: {str(folder)!r} holds {what}; choose an empty or new folder")
    return target


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder`, which takes its place when the block ends well and vanishes when it does not."""
    beside = None
    try:
        target = check_target(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        beside.chmod(0o755)
        yield beside
        for path in [*beside.iterdir(), beside]:
            _sync(path)
        if target.is_dir():
            _exchange(beside, target)  # what is beside now is the old one
        else:
            beside.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"out: {str(folder)!r} cannot be written: {error}; what stood there is unchanged") from error
    finally:
        if beside is not None and beside.exists():
            shutil.rmtree(beside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: where the system can (Linux) at once, so that a crash leaves one or the other."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(AttributeError, TypeError):
        if ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
            return
    aside = one.with_name(f"{one.name}-old")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system syncs folders
            raise
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _family_of(model: Model) -> tuple[str, Family]:
    for kind, family in FAMILIES.items():
        if type(model.config).__module__ == family.model.__module__:
            return kind, family
    raise InputError(f"hub: no file layout is known for {type(model.config).__module__}")


def _special_ids(processor: tokenizers.Tokenizer | None) -> dict[str, int | None]:
    """Where a text begins and ends: what transformers would otherwise take from GPT-2's or Llama's own vocabulary."""
    if processor is None:
        return {"bos_token_id": None, "eos_token_id": None}
    end = next(iter(processor.eos_ids), None)
    return {"bos_token_id": processor.bos_id, "eos_token_id": end, "pad_token_id": processor.pad_id}


def _join(tensor: str, found: list[tuple[Name, str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Plain leaves in the file's form: parts of a tensor joined, or apart where they differ or some are compressed."""
    name, _, first = found[0]
    alike = len({(array.shape, array.dtype) for _, _, array in found}) == 1
    if name.part is None:
        return {tensor: np.ascontiguousarray(first)}
    if len(found) < name.part[1] or not alike:
        return {name.packed.format(layer): np.ascontiguousarray(array) for name, layer, array in found}
    arrays = [array for _, _, array in sorted(found, key=lambda item: item[0].part or (0, 0))]
    return {tensor: np.ascontiguousarray(np.concatenate(arrays, axis=-1))}  # of transposed arrays it is not yet
