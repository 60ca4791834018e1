"""One file for each architecture: a frozen `Config`, named `SIZES`, `axes(config)`, `model(config, policy) -> Model`."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jaxmodel.models.checks import check_params
from jaxmodel.models.contents import summary
from jaxmodel.models.foreign import from_linen, from_nnx, linen_params, nnx_params, set_state
from jaxmodel.models.model import Inputs, Model, Output, Parts, wrap
from jaxmodel.models.predict import predict_fn
from jaxmodel.models.stochastic_depth import stochastic_depth

__all__ = [
    "Inputs",
    "Model",
    "Output",
    "Parts",
    "check_params",
    "families",
    "from_linen",
    "from_nnx",
    "linen_params",
    "nnx_params",
    "predict_fn",
    "set_state",
    "sizes",
    "stochastic_depth",
    "summary",
    "wrap",
]


def sizes() -> dict[str, tuple[ModuleType, Any]]:
    """Every named size as `family/name`, with its module and config.

    >>> module, config = sizes()["gpt2/gpt2-xl"]
    >>> config.width
    1600
    """
    return {f"{family}/{name}": (m, config) for family, m in families().items() for name, config in m.SIZES.items()}


def families() -> dict[str, ModuleType]:
    """Every architecture by the name of its file: the modules of this folder that have a `Config`."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "Config")}
