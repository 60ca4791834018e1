"""Numbers that a config claims: compared with what the files hold before anything is made for each
of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxmodel import hub, models
from jaxmodel.errors import InputError
from jaxmodel.hub.schemas import Config

GOLDENS = Path(__file__).parent / "goldens"
FOLDERS = [*GOLDENS.glob("*-a"), *GOLDENS.glob("seq2seq/*"), GOLDENS / "llama-tied"]
DEPTHS = {key for key in Config.__annotations__ if "layers" in key or key == "n_layer"}
DEPTHS -= {"max_window_layers", "mlp_only_layers", "no_rope_layers"}  # these count nothing


def depths(config: Any, trail: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in config.items() if isinstance(config, dict) else ():
        found += (
            [(*trail, key)]
            if key in DEPTHS and type(value) is int
            else depths(value, (*trail, key))
        )
    return found


def places() -> list[tuple[Path, tuple[str, ...]]]:
    configs = [
        (folder, json.loads((folder / "config.json").read_text()))
        for folder in sorted(FOLDERS)
        if folder.is_dir()
    ]
    return [(folder, place) for folder, config in configs for place in depths(config)]


def changed(folder: Path, to: Path, place: tuple[str, ...], value: int) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    inside = config
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("folder", "place"), places(), ids=lambda x: x.name if isinstance(x, Path) else ".".join(x)
)
def test_depths(folder: Path, place: tuple[str, ...], tmp_path: Path) -> None:
    """Each of every family: a list of so many layers would take all of the memory."""
    given = changed(folder, tmp_path / "given", place, 2**31 - 1)
    with pytest.raises(
        InputError,
        match=rf"config.json: {place[-1]} is 2,147,483,647; the files have \d+ tensors, and every",
    ):
        hub.from_pretrained(given)


def test_experts(tmp_path: Path) -> None:
    given = changed(GOLDENS / "mixtral-a", tmp_path / "given", ("num_local_experts",), 2**31 - 1)
    with pytest.raises(InputError, match="is missing|has shape|too large"):
        hub.from_pretrained(given)


def test_sizes_that_no_array_has(tmp_path: Path) -> None:
    given = changed(
        GOLDENS / "clip-a", tmp_path / "given", ("vision_config", "image_size"), 3 * 10**7
    )
    with pytest.raises(InputError, match="config: its sizes are too large for arrays") as error:
        hub.from_pretrained(given)
    assert "\n" not in str(error.value)


def test_depths_of_our_own_folders(tmp_path: Path) -> None:
    """Every architecture with a depth, under its own names."""
    for name, module in models.families().items():
        size = module.SIZES["tiny"]
        fields = [field for field in ("depth", "encoder_depth") if hasattr(size, field)]
        if not fields or not hasattr(module, "model"):
            continue
        model = module.model(size)
        folder = tmp_path / name
        hub.Bundle(model, jax.jit(model.init)(jax.random.key(0))).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        if "config" not in config:
            continue
        for field in fields:
            (folder / "config.json").write_text(
                json.dumps({**config, "config": {**config["config"], field: 2**31 - 1}})
            )
            with pytest.raises(
                InputError,
                match=rf"config.json: {field} is 2,147,483,647; the files have \d+ tensors",
            ):
                hub.from_pretrained(folder)
