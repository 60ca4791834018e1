"""Adapters (LoRA) on disk, in PEFT's layout: a folder of a few MB beside the base model.

    adapter_config.json         rank, alpha, target modules
    adapter_model.safetensors   `base_model.model.<module>.lora_A.weight` [r, in] and
                                `...lora_B.weight` [out, r], under HF names

`save_adapters` writes such a folder; `add_adapters` and `from_pretrained(model, adapters=folder)`
read one, whether we or PEFT wrote it. A bundle with adapters is saved as one folder: its weights
and these two files. Where a file joins several of our weights (GPT-2's q, k and v), their adapters
are joined too: `lora_B` is zero where a part does not use a rank.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxmodel import schema, tree
from jaxmodel.adapt.adapters import is_adapter, split_adapters, with_adapters
from jaxmodel.adapt.finetune import replace_head
from jaxmodel.axes import role_of
from jaxmodel.errors import InputError, border, nearest
from jaxmodel.hub import schemas
from jaxmodel.hub.families import family_of
from jaxmodel.hub.names import Name, find, layer_shapes, to_file
from jaxmodel.hub.saving import replacing
from jaxmodel.hub.weights import open_files
from jaxmodel.leaves import Compressed
from jaxmodel.leaves.adapted import SUFFIX
from jaxmodel.models import Model

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
STEM = "base_model.model."

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>(embedding_)?[AB])(\.[^.]+)??(\.weight)?")

# The allowed values of these keys of adapter_config.json; any other key must be empty or off.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # other methods change the base weights
    "init_lora_weights": (
        True,
        False,
        "gaussian",
        "orthogonal",
        "eva",
    ),
}
_ANY = {
    *(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_dropout",
        "inference_mode",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "task_type",
    ),
    *(
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "auto_mapping",
        "megatron_core",
        "megatron_config",
    ),
    *(
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
    ),
}
type Adapter = dict[str, np.ndarray]  # of one layer: down [r, in], up [out, r], scale
type Entry = tuple[Name, str, tuple[int, ...]]  # the leaf's name, path and shape

_TASKS = {"CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}
_TASKS |= {"ConditionalGeneration": "SEQ_2_SEQ_LM"}


def save_adapters(
    bundle: Any, folder: str | Path, *, base: str | None = None, also: str | None = None
) -> Path:
    """Write only the adapters of a bundle, atomically, in the layout that PEFT reads.

    Args:
      bundle: a `Bundle` with adapters (see `adapt.lora`).
      folder: a new or empty folder, or a folder of adapters, which is replaced.
      base: name of the base model: a hub id or a folder; None for the name on the bundle's card.
      also: pattern of whole leaves that were trained too and are saved with the adapters (PEFT's
        `modules_to_save`), such as `head|norm/.*`.

    Raises:
      InputError: no adapters; an adapter that PEFT's layout cannot hold; a folder with other
        content.
    """
    tree.check(bundle.params)
    _, adapters = split_adapters(bundle.params)
    if not adapters:
        raise InputError(
            "bundle: it has no adapters; allowed: a bundle with adapters, see adapt.lora"
        )
    _check_places(bundle)
    with replacing(Path(folder), CONFIG) as beside:
        write(bundle, beside, base, also)
    return Path(folder)


def add_adapters[B: Any](
    bundle: B,
    folder: str | Path,
    *,
    weight: float | int = 1.0,
    mesh: jax.sharding.Mesh | None = None,
) -> B:
    """Return the bundle with the adapters of a folder.

    If the bundle has adapters already, the new ones are added to them.

    Args:
      bundle: a `Bundle` of the base model; its weights may be compressed.
      folder: in PEFT's layout.
      weight: factor by which the adapters are multiplied.
      mesh: on which the bundle's parameters are placed.

    Raises:
      InputError: a missing or damaged file; an adapter other than LoRA, or an unsupported setting;
        a module that the model does not have.
    """
    folder = Path(folder)
    tree.check(bundle.params)
    file = folder / FILE
    config = _config(folder)
    if not isinstance(weight, int | float) or not 0 < abs(weight) < float("inf"):
        raise InputError(f"weight: {weight!r} given; allowed: a number that is not 0")
    arrays, ours = _read(file)
    bundle = _with_labels(bundle, file)
    layout = _Layout(bundle.model)
    found: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        if not key.startswith(STEM):
            raise InputError(
                f"{file}: the tensor {key!r} is not in PEFT's layout; allowed: names that begin "
                f"with {STEM!r}"
            )
        if match := _LORA.fullmatch(key.removeprefix(STEM)):
            found.setdefault(match["module"], {})[match["kind"]] = array
        else:
            whole[key.removeprefix(STEM).replace(".base_layer.", ".")] = (
                array  # PEFT also saves the tables that have adapters
            )
    if not found:
        raise InputError(f"{file}: it contains no adapters")
    adapters: dict[str, Adapter] = {}
    for module, pair in found.items():
        entries = layout.find(layout.modules, module, file)
        if ours is None and layout.tied(entries[0][1]):
            raise InputError(
                f"{file}: {module!r} has an adapter for the lookup alone, but the head shares this "
                "table; merge it with PEFT"
            )
        rank, scale = _scale(module, config)
        dtype = np.float32 if ours is None else None
        for path, one in _parts(
            f"{file}: {module}", entries, pair, (ours or {}).get(module), rank, dtype
        ).items():
            adapters[path] = {**one, "scale": np.asarray(scale * weight, np.float32)}
            # kept for further training of the adapters
            if rate := config.get("lora_dropout"):
                adapters[path]["dropout"] = np.asarray(rate, np.float32)
    params = _beside(_replaced(bundle.params, whole, layout, file), adapters, mesh)
    return dataclasses.replace(bundle, model=with_adapters(bundle.model), params=params)


# ------------------------------------------------------------------------------------------ writing


def write(bundle: Any, folder: Path, base: str | None = None, also: str | None = None) -> None:
    """Write the two files of a bundle's adapters into a folder that is being saved."""
    layout = _Layout(bundle.model)
    role = role_of(bundle.model.axes)
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, list[tuple[Name, str, Adapter]]] = {}
    for path, leaf in _layers(bundle.params).items():
        name, module = layout.adapted(path)
        modules.setdefault(module, []).append((name, path, leaf))
    ranks = {}
    alphas = {}
    parts = {}
    for module, adapters in modules.items():
        down, up, scale, where = _joined(adapters)
        ranks[module], alphas[module] = len(down), float(scale) * len(down)
        parts |= {module: where} if where else {}
        if (
            role(adapters[0][1], (1, 1)) == "table"
        ):  # PEFT has other names for tables that are looked up
            tensors |= {
                f"{STEM}{module}.lora_embedding_A": up.T,
                f"{STEM}{module}.lora_embedding_B": down.T,
            }
            continue
        trailing = adapters[0][0].trailing
        down = down.reshape(len(down), *(trailing or down.shape[1:]))
        up = up.reshape(*up.shape, *(1,) * (len(trailing) - 1))
        tensors |= {f"{STEM}{module}.lora_A.weight": down, f"{STEM}{module}.lora_B.weight": up}
    saved = _whole(bundle, layout.names, also)
    rates = [
        round(float(leaf["dropout"]), 7)
        for leaf in _layers(bundle.params).values()
        if "dropout" in leaf
    ]
    kind = layout.hf.get("architectures", [""])[0]
    rank, alpha = (
        collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas)
    )
    config = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if kind.endswith(end)), None),
        "base_model_name_or_path": base or bundle.card.get("name"),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(set(modules), layout.modules),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "modules_to_save": sorted({tensor.rpartition(".")[0] for tensor in saved}) or None,
        "fan_in_fan_out": any(adapters[0][0].transposed for adapters in modules.values()),
        "use_rslora": False,
        "lora_dropout": max(rates, default=0.0),
        "bias": "none",
        "inference_mode": True,
    }
    arrays = {key: np.ascontiguousarray(a) for key, a in tensors.items()} | {
        STEM + tensor: a for tensor, a in saved.items()
    }
    metadata = {"format": "pt", "jaxmodel": json.dumps(parts)}
    if saved and bundle.labels:
        metadata["labels"] = json.dumps(bundle.labels)
    save_file(arrays, folder / FILE, metadata=metadata)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _layers(params: tree.Params) -> dict[str, Adapter]:
    """Return the adapter of each layer's leaf, by the leaf's path."""
    out: dict[str, Adapter] = {}
    for path, leaf in tree.flatten(params).items():
        for i, layer in enumerate(tree.layer_paths(path) if is_adapter(path) else ()):
            head, _, part = layer.rpartition("/")
            out.setdefault(head.removesuffix(SUFFIX), {})[part] = np.asarray(
                leaf[i] if tree.is_stacked(path) else leaf
            )
    return out


def _joined(
    adapters: Sequence[tuple[Name, str, Adapter]],
) -> tuple[Any, Any, Any, dict[str, list[int]]]:
    """Return the adapter of one module, and the ranks that each of its leaves uses.

    The module is a single leaf, or the leaves that the file joins.
    """
    name, _, first = adapters[0]
    if name.part is None:
        return first["down"], first["up"], first["scale"], {}
    sizes = name.part[1]
    scale = first["scale"]
    same = all(np.array_equal(first["down"], a["down"]) for _, _, a in adapters) and len(
        adapters
    ) == len(sizes)
    downs = [first["down"]] if same else [a["down"] for _, _, a in adapters]
    up = np.zeros((_rows(name, len(first["up"]))[1], sum(map(len, downs))), first["up"].dtype)
    start = 0
    where = {}
    for name, path, a in adapters:
        stop = start + len(a["down"])
        up[_rows(name, len(a["up"]))[0], start:stop] = a["up"] * (a["scale"] / scale).astype(
            up.dtype
        )
        where[path.rpartition("/")[2]] = [start, stop]
        start = 0 if same else stop
    return np.concatenate(downs), up, scale, {} if same else where


def _rows(name: Name, count: int) -> tuple[slice, int]:
    """Return the slice of a leaf's `count` rows in its module, and the module's row count."""
    i, sizes = name.part or (0, (1,))
    unit = count // sizes[i]
    return slice(unit * sum(sizes[:i]), unit * sum(sizes[: i + 1])), unit * sum(sizes)


def _whole(bundle: Any, names: tuple[Name, ...], also: str | None) -> dict[str, np.ndarray]:
    """Return the tensors of the leaves that are saved in full."""
    if also is None:
        return {}
    if not _compiles(also):
        raise InputError(f"also: {also!r} is not a regular expression")
    out: dict[str, np.ndarray] = {}
    base, _ = split_adapters(bundle.params)
    for path, leaf in tree.flatten(base).items():
        for i, layer in enumerate(tree.layer_paths(path)):
            if not re.fullmatch(also, layer):
                continue
            name, number = find(names, layer)
            if isinstance(leaf, Compressed) or name.part or name.experts:
                raise InputError(
                    f"also: {layer!r} is compressed or a part of a tensor; allowed: plain leaves "
                    "that are a whole tensor"
                )
            array = np.asarray(leaf[i] if tree.is_stacked(path) else leaf)
            out[name.at(number)] = np.array(to_file(name, array), order="C")
    if not out:
        raise InputError(
            f"also: {also!r} matches no leaf; nearest: "
            f"{', '.join(nearest(also, tree.flatten(base)))}"
        )
    return out


def _targets(modules: set[str], known: Iterable[str]) -> list[str]:
    """Return the names of the modules.

    The last part alone names a module if every module with that last part has an adapter.
    """
    last = lambda module: module.rpartition(".")[2]
    ends = set(map(last, modules))
    short = {module for module in known if last(module) in ends} == modules and not any(
        end.isdigit() for end in ends
    )
    return sorted(ends if short else modules)


def _check_places(bundle: Any) -> None:
    """Refuse adapters that PEFT has no place for, or would read as something else."""
    layout = _Layout(bundle.model)
    for path in _layers(bundle.params):
        name, _ = layout.adapted(path)
        if layout.tied(path):  # PEFT would apply it to the lookup alone
            raise InputError(
                f"bundle: the adapter of {path!r} also applies to the head, which shares the "
                "table; PEFT cannot store that"
            )
        if name.experts or name.lead:
            raise InputError(
                f"bundle: PEFT has no place for an adapter of {path!r}; merge it "
                f"(adapt.merge_adapters)"
            )


# ------------------------------------------------------------------------------------------ reading


def _config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json and refuse any setting that is not supported."""
    config = schema.read(folder / CONFIG, schemas.Adapter)
    given = {"r": 8, "lora_alpha": 8, **config}
    config = {**given, **{key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}}
    if not (folder / FILE).exists():
        pickled = (folder / "adapter_model.bin").exists()
        why = (
            "; adapter_model.bin is pickled, which is never read: save it with "
            "safe_serialization=True"
            if pickled
            else ""
        )
        raise InputError(f"{folder}: the file {FILE!r} is missing{why}")
    merge = "merge it into its model with PEFT (merge_and_unload), and load that"
    for key, value in config.items():
        allowed = _ALLOWED.get(key)
        known = (
            value in allowed
            if allowed is not None and isinstance(value, str | bool)
            else key in _ANY
        )
        if not known and (allowed is not None or value not in (None, False, 0, "", [], {})):
            what = (
                f"allowed: {' or '.join(map(repr, allowed))}"
                if allowed
                else "this is not supported"
            )
            raise InputError(f"{folder / CONFIG}: {key} is {value!r}; {what}; {merge}")
    if not all([config["lora_alpha"], *config["alpha_pattern"].values()]):
        raise InputError(f"{folder / CONFIG}: an alpha is 0; allowed: any other number")
    for pattern in (*config["rank_pattern"], *config["alpha_pattern"]):
        # A foreign pattern may take no more than a few steps per character.
        simple = (
            re.fullmatch(r"[\w.\\^$|()*-]+", pattern)
            and pattern.count("*") <= 3
            and ")*" not in pattern
        )
        if not simple or not _compiles(pattern):
            raise InputError(
                f"{folder / CONFIG}: the pattern {pattern!r} is not supported; allowed: names of "
                f"modules, with * and |"
            )
    return config


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return the rank of a module and the factor of its product."""

    def of(pattern: str, default: str) -> Any:
        for key, value in config[pattern].items():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        return config[default]

    rank = of("rank_pattern", "r")
    alpha = of("alpha_pattern", "lora_alpha")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Read the arrays and, in a file that we wrote, the ranks of the parts of joined modules."""
    with open_files(str(file), [file]) as opened:
        arrays = {key: opened.read(key) for key in opened.names()}
        text = opened.metadata.get("jaxmodel")
    if text is None:
        return arrays, None
    with border(f"{file}: its ranks of joined modules (jaxmodel) cannot be read"):
        return arrays, {
            module: {part: (int(a), int(b)) for part, (a, b) in parts.items()}
            for module, parts in json.loads(text).items()
        }


def _with_labels[B: Any](bundle: B, file: Path) -> B:
    """Return the bundle with a head for the classes that adapters of a classifier were trained for.

    The file holds the head that takes its place.
    """
    with open_files(str(file), [file]) as opened:
        text = opened.metadata.get("labels", "[]")
    with border(f"{file}: its labels cannot be read"):
        names = tuple(map(str, list(json.loads(text))))
    if not names or names == bundle.labels:
        return bundle
    model, params = replace_head(bundle.model, bundle.params, names, jax.random.key(0))
    card = bundle.card if hasattr(model.config, "labels") else {**bundle.card, "labels": names}
    return dataclasses.replace(bundle, model=model, params=params, card=card)


class _Layout:
    """The correspondence between the modules and tensors of the HF model and ours."""

    def __init__(self, model: Model):
        self.family, self.hf = family_of(model)
        self.names = tuple(self.family.names(model.config))
        self.modules: dict[str, list[Entry]] = {}
        self.tensors: dict[str, Entry] = {}
        for path, want in tree.flatten(layer_shapes(model)).items():
            name, layer = find(self.names, path)
            for tensor in name.tensors(layer):
                self.tensors[tensor] = (name, path, want.shape)
                if not tensor.endswith(".bias"):
                    self.modules.setdefault(tensor.removesuffix(".weight"), []).append(
                        (name, path, want.shape)
                    )

    def find[T](self, known: Mapping[str, T], name: str, where: Path) -> T:
        """Look up a name, which may lack the prefix that some files omit."""
        for full in (name, self.family.prefix + name):
            if full in known:
                return known[full]
        close = ", ".join(nearest(name, known)) or "none"
        raise InputError(f"{where}: {name!r} has no place in this model; nearest: {close}")

    def tied(self, path: str) -> bool:
        """Return whether the head shares this table."""
        return any(
            path == of and tensor not in self.tensors for tensor, of in self.family.copies.items()
        )

    def adapted(self, path: str) -> tuple[Name, str]:
        """Return the entry of a leaf with an adapter, and the name of its module."""
        name, layer = find(self.names, path)
        return name, name.at(layer).removesuffix(".weight")


def _parts(
    where: str,
    entries: Sequence[Entry],
    arrays: Mapping[str, np.ndarray],
    ranks: Any,
    rank: int,
    dtype: Any,
) -> dict[str, Adapter]:
    """Return `down` and `up` of each leaf of a module."""
    table = "embedding_A" in arrays
    if set(arrays) != ({"embedding_A", "embedding_B"} if table else {"A", "B"}):
        raise InputError(
            f"{where} has {', '.join(f'lora_{kind}' for kind in sorted(arrays))}; allowed: a pair "
            "lora_A, lora_B"
        )
    down, up = (
        (arrays["embedding_B"].T, arrays["embedding_A"].T) if table else (arrays["A"], arrays["B"])
    )
    name, _, shape = entries[0]
    if len(shape) != 2 or name.experts or name.lead:
        raise InputError(f"{where} is not a matrix; allowed: adapters of matrices")
    rows = _rows(name, shape[0])[1]
    wanted = (rank, *(name.trailing or shape[1:])), (rows, rank, *(1,) * (len(name.trailing) - 1))
    if (down.shape, up.shape) != wanted:
        found, needed = (
            " and ".join(str(list(shape)) for shape in shapes)
            for shapes in ((down.shape, up.shape), wanted)
        )
        raise InputError(f"{where} has shapes {found}; allowed: {needed}")
    down, up = (a.astype(dtype or a.dtype).reshape(len(a), -1) for a in (down, up))
    out: dict[str, Adapter] = {}
    for name, path, shape in entries:
        leaf = path.rpartition("/")[2]
        start, stop = (0, rank) if ranks is None else ranks.get(leaf, (0, 0))
        if stop > start:
            out[path] = {"down": down[start:stop], "up": up[_rows(name, shape[0])[0], start:stop]}
    return out


def _replaced(
    params: tree.Params, whole: Mapping[str, np.ndarray], layout: _Layout, where: Path
) -> tree.Params:
    """Return the parameters with the leaves that the folder holds in full."""
    leaves = tree.flatten(params)
    places = {layer: (path, i) for path in leaves for i, layer in enumerate(tree.layer_paths(path))}
    for tensor, array in whole.items():
        name, layer, shape = layout.find(layout.tensors, tensor, where)
        if name.part or name.experts or array.shape != name.file_shape(shape):
            needed = list(name.file_shape(shape))
            raise InputError(
                f"{where}: {tensor!r} of shape {list(array.shape)} does not fit; allowed: {needed}"
            )
        if layout.tied(layer):
            raise InputError(
                f"{where}: {tensor!r} would also replace the head, which shares the table; merge "
                "it with PEFT"
            )
        path, i = places[layer]
        if isinstance(leaves[path], Compressed):
            raise InputError(
                f"{where}: {tensor!r} replaces a compressed leaf; add the adapters before "
                "compressing"
            )
        new = jnp.asarray(
            (array.T if name.transposed else array).reshape(shape), leaves[path].dtype
        )
        leaves[path] = leaves[path].at[i].set(new) if tree.is_stacked(path) else new
    return tree.unflatten(leaves)


def _beside(
    params: tree.Params, new: Mapping[str, Adapter], mesh: jax.sharding.Mesh | None
) -> tree.Params:
    """Return the parameters with the adapters of layers.

    Segments are split where the adapters of their layers differ in shape.
    """
    base, _ = split_adapters(params)
    adapters = dict(_layers(params))
    for path, one in new.items():
        adapters[path] = _sum(adapters[path], one) if path in adapters else one
    shapes = {
        path: tuple((part, a.shape, a.dtype) for part, a in sorted(one.items()))
        for path, one in adapters.items()
    }
    base = tree.split(
        base,
        {
            layer: shapes.get(layer)
            for path in tree.flatten(base)
            for layer in tree.layer_paths(path)
        },
    )
    leaves = tree.flatten(base)
    everywhere = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.P())
    for path in tuple(leaves):
        if (layers := tree.layer_paths(path))[0] in adapters:
            for part in adapters[layers[0]]:
                each = [adapters[layer][part] for layer in layers]
                leaves[f"{path}{SUFFIX}/{part}"] = jax.device_put(
                    np.stack(each) if tree.is_stacked(path) else each[0], everywhere
                )
    return tree.unflatten(leaves)


def _sum(one: Adapter, other: Adapter) -> Adapter:
    """Return an adapter that computes the sum of two, with the higher of the two dropout rates."""
    ratio = (other["scale"] / one["scale"]).astype(np.float32)
    up = np.concatenate([one["up"], (other["up"] * ratio).astype(one["up"].dtype)], axis=1)
    rates = [a["dropout"] for a in (one, other) if "dropout" in a]
    down = np.concatenate([one["down"], other["down"].astype(one["down"].dtype)])
    return {
        "down": down,
        "up": up,
        "scale": one["scale"],
        **({"dropout": max(rates)} if rates else {}),
    }
