"""`Bundle`: a model with its weights, processor and card; on disk, a folder in HF layout.

    config.json         the config under HF names
    model.safetensors   one tensor per layer and leaf under HF names; several per compressed leaf
                        (weight_scale, ...)
    jaxmodel.json       versioned: family, config, policy, card, and the static fields of the
                        compressed leaves
    tokenizer.json, preprocessor_config.json ...  the processor
    adapter_config.json, adapter_model.safetensors  adapters, if any (see `adapters`)

transformers can load a folder with plain leaves. Saving is atomic: the new folder is written beside
the old one, synced, and finally takes its place, so the old bundle survives a full disk or a kill.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxmodel import axes, moved, report, schema, tree
from jaxmodel.adapt.adapters import split_adapters
from jaxmodel.errors import InputError, require
from jaxmodel.hub import (
    adapters,
    foreign,
    images,
    keys,
    meaning,
    schemas,
    tokenizer as tokenizers,
    vocabularies,
)
from jaxmodel.hub.assemble import assemble, settle
from jaxmodel.hub.families import OWN, family_of, family_of_kind
from jaxmodel.hub.names import Family, Name, check_fields, find, layer_shapes, to_file
from jaxmodel.hub.running import running
from jaxmodel.hub.saving import check_target, replacing
from jaxmodel.hub.weights import WEIGHTS, check_depth, count_tensors, open_folder
from jaxmodel.leaves.fields import digest
from jaxmodel.leaves.leaf import to_tensors
from jaxmodel.models import Model
from jaxmodel.models.contents import columns, outline, summary
from jaxmodel.models.foreign import Foreign
from jaxmodel.ops import Policy, kernels

__all__ = ["Bundle", "check_target", "load", "need_processor", "save"]

FORMAT = 1
OURS = "jaxmodel.json"
DECODED = "mxfp4", "gpt_oss"  # the only method, and its only kind, that is decoded to floats
SHARD_BYTES = 5_000_000_000  # maximum size of one file of weights


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A model with its weights, as `from_pretrained` returns it and every command takes it.

    Attributes:
      model: pure functions.
      params: the stored form: separate leaves, packed.
      processor: the tokenizer (which includes the image processor of a model of text and images),
        the image processor, or None.
      card: metadata: name, source, training data, compression report; names of classes that are not
        in the config; `special_ids` of a folder without a tokenizer.
      memory: how `for_inference` holds the weights, and so how the bundle generates and is
        measured: "fast", or "packed" in no more bytes than `params`.
    """

    model: Model
    params: tree.Params = dataclasses.field(repr=False)
    processor: tokenizers.Tokenizer | images.ImageProcessor | None = None
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    memory: str = "fast"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes in the order of the logits, or () if they have none.

        They come from the config, else from `labels` on the card.

        Raises:
          InputError: the number of names on the card is not the config's number of classes.
        """
        config = self.model.config
        if hasattr(config, "labels"):
            return tuple(config.labels)
        named = tuple(map(str, self.card.get("labels", ())))
        classes = getattr(config, "classes", 0)
        if isinstance(config, Foreign):  # its config does not state the number of classes
            return named
        if named and len(named) != classes:
            raise InputError(f"card: labels names {len(named)} classes; the model has {classes}")
        return named

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the bundle to a folder, atomically.

        `from_pretrained(folder)` reads it back bit for bit.
        """
        return save(self, folder)

    def for_inference(self, memory: str | None = None) -> tree.Params:
        """Return the params in the form that runs fastest on this machine.

        Sparse leaves are expanded, maps of the same input are fused, and on a CPU codes of few bits
        get a layout that unpacks fast (`jaxmodel.hub.running` has the table, with measurements);
        `summary` shows the form of each leaf. The result is made once for each bundle and kept as
        long as the bundle, beside `params`. Params that are in this form already are not copied, so
        `dataclasses.replace(bundle, params=bundle.for_inference())` is a bundle that holds only
        what runs.

        Args:
          memory: "fast", or "packed" for the fastest form that takes no more bytes than the stored
            one; None for the bundle's own `memory`.

        Raises:
          InputError: `memory` is another word.
        """
        return self._running(self.memory if memory is None else memory)

    def summary(self, memory: str | None = None) -> list[dict[str, Any]]:
        """Return a row for each leaf of `for_inference`: its form, and how its products run here.

        Args:
          memory: as in `for_inference`.

        Returns:
          The rows of `models.summary`, with `runs`: words such as "kernel in C++ up to 32
          rows, then unpacked for products in float", with the reason where a kernel is missing.

        Raises:
          InputError: as in `for_inference`.
        """
        params = self.for_inference(memory)
        leaves = tree.flatten(params)
        rows = [
            row | {"runs": kernels.says(leaves[row["path"]])} for row in summary(self.model, params)
        ]
        return report.Rows(rows, [*columns(), report.Column("runs")])

    @functools.cached_property
    def _running(self) -> Callable[[str], tree.Params]:
        return functools.cache(lambda memory: running(self.params, self.model.axes.fused, memory))

    def _repr_html_(self) -> str | None:
        """Return a foldable view for notebooks: card, config, and the tree by path.

        None, which makes the notebook show plain text, where treescope is not installed.
        """
        try:
            treescope = require("treescope", "notebook")
        except InputError:
            return None
        shown = {
            "card": dict(self.card),
            "config": self.model.config,
            "params": outline(self.model, self.params),
        }
        with warnings.catch_warnings():  # treescope touches deprecated names of numpy
            warnings.simplefilter("ignore", DeprecationWarning)
            # plain text can be searched and compared
            return treescope.render_to_html(shown, compressed=False)


def need_processor(bundle: Bundle) -> tokenizers.Tokenizer:
    """Return the bundle's tokenizer.

    Raises:
      InputError: the bundle has none.
    """
    if not isinstance(bundle.processor, tokenizers.Tokenizer):
        raise InputError(
            f"model: {bundle.card.get('name', 'the bundle')!r} has no tokenizer, so text cannot "
            f"be read; allowed: a folder with "
            f"one of {', '.join(vocabularies.FILES)}"
        )
    return bundle.processor


def check_vocabulary(config: Any, processor: Any, where: str) -> None:
    """Refuse a tokenizer with tokens for which the embedding has no row.

    A special token without a role may lie behind the last row, like the image token in Gemma's
    models for text alone; a text that contains it is refused when it is read.

    Raises:
      InputError: such a token.
    """
    rows = getattr(config, "vocab", None)
    if rows is None or not isinstance(processor, tokenizers.Tokenizer):
        return
    if (found := processor.beyond(rows)) is not None:
        token, i = found
        raise InputError(
            f"{where}: the tokenizer's token {token!r} has id {i}, but the embedding has the ids 0 "
            f"to {rows - 1}"
        )


def save(bundle: Bundle, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a bundle; the module's docstring lists the files.

    Args:
      bundle: to be saved.
      folder: where.
      shard_bytes: weights beyond this size are split into several files with an index; the tensors
        of only one file are in memory at a time.

    Raises:
      InputError: params that do not fit the config, or a folder that cannot be written; the
        folder's content is untouched.
    """
    family, config = family_of(bundle.model)
    given, (params, added) = bundle, split_adapters(bundle.params)
    bundle = dataclasses.replace(bundle, params=params)
    fewer = _check_params(bundle)
    check_vocabulary(bundle.model.config, bundle.processor, "processor")
    names = tuple(family.names(bundle.model.config))
    fields = _static_fields(bundle, names)
    policy = dataclasses.asdict(bundle.model.policy)
    del policy["axes"]  # they belong to a mesh
    config |= _special_ids(bundle.processor, bundle.card)
    ours = {
        "format": FORMAT,
        "family": family.architecture,
        "config": _plain(bundle.model.config),
        "policy": policy,
        "card": dict(bundle.card),
        "leaves": fields,
        "leaves_sha256": digest(fields),
        "adapters": bool(added),
        "narrow": fewer,
    }
    with replacing(Path(folder)) as beside:
        _save_weights(_tensors(bundle, names), beside, shard_bytes)
        if added:
            adapters.write(given, beside)
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (beside / OURS).write_text(json.dumps(ours, indent=1) + "\n")
        if not family.kinds[0].startswith(OWN):
            meaning.save(bundle.model.config, bundle.card, beside)
        if bundle.processor is not None:
            bundle.processor.save(beside)
    return Path(folder)


def load(
    folder: Path,
    policy: Policy | None = None,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    module: Any = None,
    ignore: Collection[str] = (),
) -> Bundle:
    """Read a bundle, whether we or HF wrote it; see `from_pretrained`.

    Raises:
      InputError: a file, tensor or key is missing, does not fit, or belongs to an unknown family;
        nothing is loaded in part.
    """
    made = _foreign(folder, module)
    family, config, card = (
        read_config(folder, ignore) if made is None else (foreign.layout(made), made.config, {})
    )
    ours = (
        _read_ours(folder / OURS, family.architecture, config) if (folder / OURS).exists() else {}
    )
    stored = ours["policy"] if ours else Policy()
    how: Policy = policy or (
        stored if dtype is None else dataclasses.replace(stored, compute_dtype=dtype)
    )
    processor = (
        tokenizers.from_folder(folder)
        if tokenizers.is_there(folder)
        else images.from_folder(folder)
    )
    check_vocabulary(config, processor, str(folder))
    kind = dtype or (None if ours else "float32")
    with open_folder(folder) as opened:
        tensors = family.view(opened)
        fields = ours.get("leaves", {})
        config = config if ours else settle(config, family, tensors)
        model = family.model(config, how) if made is None else made.with_policy(how)
        how_stored: dict[str, Any] = {
            "fields": fields,
            "narrow": ours.get("narrow", {}),
            "dtype": kind,
        }
        params = assemble(model, family, family.names(config), tensors, **how_stored, mesh=mesh)
    if made is not None:
        params = tree.unstack(params)  # one layer at a time, as the module itself has them
    if (
        not ours
        and not isinstance(processor, tokenizers.Tokenizer)
        and hasattr(config, "vocab")
        and made is None
    ):
        card = card | {"special_ids": ids} if (ids := meaning.special_ids(folder)) else card
    bundle = Bundle(model, params, processor, ours.get("card", card))
    if (folder / adapters.FILE).exists() and not (folder / adapters.CONFIG).exists():
        raise InputError(
            f"{folder}: {adapters.CONFIG!r} is missing, which describes {adapters.FILE!r}; add the "
            "former or remove the latter"
        )
    if ours.get("adapters") or (folder / adapters.CONFIG).exists():
        return adapters.add_adapters(bundle, folder, mesh=mesh)
    return bundle


# ------------------------------------------------------------------------------------------ configs


def _foreign(folder: Path, module: Any) -> Model | None:
    """Return a foreign folder's model, made from the given module; None for other folders."""
    where = f"{folder}/config.json"
    hf = schema.read(folder / "config.json")
    if hf.get("model_type") == foreign.KIND:
        return foreign.model_of(folder, schema.make(hf, schemas.Foreign, where), module)
    if module is not None:
        raise InputError(
            f"module: given for {folder}, whose model_type is {hf.get('model_type')!r}; allowed: "
            "None"
        )
    return None


def _plain(config: Any) -> dict[str, Any]:
    """Return a config for JSON; the config of a foreign module is entirely in config.json."""
    return {} if isinstance(config, Foreign) else dataclasses.asdict(config)


def read_config(folder: Path, ignore: Collection[str] = ()) -> tuple[Family, Any, dict[str, Any]]:
    """Read config.json: its family, its config, and what the card should record besides.

    Args:
      folder: that contains the file.
      ignore: keys that are treated as absent.

    Raises:
      InputError: the file is missing; a key has the wrong type; a key that is not read may change
        what is computed; or no family has such a config.
    """
    where = f"{folder}/config.json"
    hf = keys.Keys(
        schema.make(
            keys.without(schema.read(folder / "config.json"), ignore), schemas.Config, where
        )
    )
    packed = hf.get("quantization_config")
    how = (
        None
        if packed is None
        else packed.get("quant_method") or packed.get("quant_algo") or "an unnamed method"
    )
    if how is not None and (how, hf.get("model_type")) != DECODED:
        raise InputError(
            f"{where}: the weights are quantised by {how}, which is not supported; load the "
            "original model or a GGUF file, and compress it here"
        )
    classes = hf.get("architectures") or ()
    family = family_of_kind(str(hf.get("model_type")), f"{where}: model_type", classes=classes)
    check_depth(hf, where, lambda: count_tensors(folder))
    try:
        config = family.config_from_hf(hf)
        if not family.kinds[0].startswith(OWN):
            config = meaning.with_meaning(config, hf, folder)
            family.card(hf)  # this reads more keys
            keys.check_asked(hf, hf["model_type"], family.unread)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('config.json: ')}") from None
    except KeyError as error:
        raise InputError(f"{where}: the key {error} is missing") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{where}: a value has the wrong type: {' '.join(str(error).split())}"
        ) from None
    return family, check_fields(config, where), family.card(hf)


def _agree(then: Any, now: Any) -> bool:
    """Return whether a value of jaxmodel.json is that of config.json.

    A part of a config may have more fields by now than when it was written.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        return all(key in now and _agree(value, now[key]) for key, value in then.items())
    return then == now


def _read_ours(path: Path, family: str, config: Any) -> dict[str, Any]:
    """Read jaxmodel.json, which must be consistent with itself and with config.json."""
    ours = schema.read(path)
    if ours.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {ours.get('format')!r} is not supported; allowed: {FORMAT}"
        )
    ours = schema.make(ours, schemas.Ours, str(path))
    theirs = {"family": family, **json.loads(json.dumps(_plain(config)))}
    for key, value in {"family": ours["family"], **ours["config"]}.items():
        if not _agree(value, theirs.get(key)):
            raise InputError(
                f"{path}: {key} is {value!r}, but config.json says {theirs.get(key)!r}"
            )
    # some wrong fields fit the arrays but decode to other weights
    if digest(ours["leaves"]) != ours["leaves_sha256"]:
        raise InputError(
            f"{path}: the static fields of the leaves have changed since they were written "
            "(leaves_sha256)"
        )
    policy = moved.current(ours["policy"], moved.POLICY)
    return {**ours, "policy": schema.make(policy, Policy, str(path), "policy")}


def _special_ids(processor: Any, card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids that begin, end and pad a text.

    Without them transformers would take the ids of GPT-2's or Llama's own vocabulary. Without a
    tokenizer these are the ids of the folder that was read, which the card keeps.
    """
    if not isinstance(processor, tokenizers.Tokenizer):
        return {"bos_token_id": None, "eos_token_id": None} | dict(card.get("special_ids", {}))
    ends = processor.eos_ids
    end = list(ends) if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": processor.bos_id, "eos_token_id": end, "pad_token_id": processor.pad_id}


# ------------------------------------------------------------------------------------------ weights


def _check_params(bundle: Bundle) -> dict[str, int]:
    """Return the groups with fewer units than the config says; refuse other differences."""
    leaves = tree.flatten(bundle.params)
    whole = layer_shapes(bundle.model)
    there = {
        layer: tree.layer_shape(path, leaf)
        for path, leaf in leaves.items()
        for layer in tree.layer_paths(path)
    }
    wanted = {path: leaf.shape for path, leaf in tree.flatten(whole).items()}
    for path in wanted:
        if path not in there:
            raise InputError(
                f"params: the leaf {path!r} is missing; a fused tree is for running, not for saving"
            )
    if all(there[path] == shape for path, shape in wanted.items()):
        return {}
    declared = bundle.model.axes
    reason = ""
    try:
        fewer = axes.narrower(declared, whole, bundle.params)
        wanted = {
            path: leaf.shape
            for path, leaf in tree.flatten(axes.shapes(declared, whole, fewer)).items()
        }
    except InputError as error:
        fewer = {}
        reason = f" ({str(error).removeprefix('axes: ').removeprefix('params: ')})"
    if unlike := next((path for path in wanted if there[path] != wanted[path]), None):
        raise InputError(
            f"params: {unlike!r} has shape {list(there[unlike])}; the config needs "
            f"{list(wanted[unlike])}{reason}"
        )
    return fewer


def _static_fields(bundle: Bundle, names: tuple[Name, ...]) -> dict[str, Any]:
    fields = {}
    for path, leaf in tree.flatten(bundle.params).items():
        _, static = to_tensors(leaf)
        for layer_path in tree.layer_paths(path) if static is not None else ():
            name, layer = find(names, layer_path)
            fields[name.packed.format(layer)] = static
    return fields


def _tensors(bundle: Bundle, names: tuple[Name, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the file, brought to the host one at a time.

    The parts of a joined tensor are held until all have arrived.
    """
    parts: dict[str, dict[int, tuple[Name, str, np.ndarray]]] = {}
    waiting = _parts_of_tensors(bundle, names)
    for path, leaf in tree.flatten(bundle.params).items():
        arrays, static = to_tensors(leaf)
        for i, layer_path in enumerate(tree.layer_paths(path)):
            name, layer = find(names, layer_path)
            one = {
                s: np.asarray(array[i] if tree.is_stacked(path) else array)
                for s, array in arrays.items()
            }
            if static is not None:
                for suffix, array in one.items():
                    yield f"{name.packed.format(layer)}_{suffix}", array
            elif name.part is None:
                experts = one[""] if name.experts else [one[""]]
                own = dataclasses.replace(name, experts=len(experts)) if name.experts else name
                for tensor, array in zip(own.tensors(layer), experts, strict=True):
                    yield tensor, to_file(name, array)
            else:
                tensor = name.at(layer)
                found = parts.setdefault(tensor, {})
                found[name.part[0]] = name, layer, to_file(name, one[""])
                if len(found) == waiting[tensor]:
                    yield from _join(tensor, [found[part] for part in sorted(found)])
                    del parts[tensor]


def _parts_of_tensors(bundle: Bundle, names: tuple[Name, ...]) -> dict[str, int]:
    """Count the plain leaves in each tensor; compressed leaves have their own tensors."""
    count: dict[str, int] = {}
    for path, leaf in tree.flatten(bundle.params).items():
        for layer_path in tree.layer_paths(path) if to_tensors(leaf)[1] is None else ():
            name, layer = find(names, layer_path)
            if name.part is not None:
                tensor = name.at(layer)
                count[tensor] = count.get(tensor, 0) + 1
    return count


def _join(
    tensor: str, found: list[tuple[Name, str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield plain leaves in the file's form.

    Parts of a tensor are joined, or kept separate where they differ or some are compressed.
    """
    whole = found[0][0].part
    alike = len({array.dtype for _, _, array in found}) == 1
    arrays = [array for _, _, array in found]
    name = found[0][0]
    if whole is not None and alike and len(found) == len(whole[1]) and _in_proportion(arrays, name):
        woven = np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1) if name.woven else None
        yield tensor, np.concatenate(arrays, axis=name.joined) if woven is None else woven
    else:
        for name, layer, array in found:
            yield name.packed.format(layer), array


def _in_proportion(arrays: list[np.ndarray], name: Name) -> bool:
    """Return whether the parts have the file's proportions, by which they are separated again."""
    assert name.part is not None
    lengths = [array.shape[name.joined] for array in arrays]
    return all(
        n * name.part[1][0] == lengths[0] * size
        for n, size in zip(lengths, name.part[1], strict=True)
    )


def _save_weights(
    tensors: Iterator[tuple[str, np.ndarray]], folder: Path, shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > shard_bytes:
            write()
        # unlike np.ascontiguousarray, this keeps a scalar a scalar
        held[name] = np.asarray(array, order="C")
        total += array.nbytes
    write()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    stem = WEIGHTS.removesuffix(".safetensors")
    where = {}
    for i, names in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
