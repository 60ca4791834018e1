"""One file for each architecture: a frozen `Config`, named `SIZES`, `model(config, policy) -> Model`, sharding `RULES`."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from jaxmodel.models.model import Inputs, Model, Output, Parts, wrap

__all__ = ["Inputs", "Model", "Output", "Parts", "families", "wrap"]


def families() -> dict[str, ModuleType]:
    """Every architecture by the name of its file: the modules of this folder that have a `Config`."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "Config")}
