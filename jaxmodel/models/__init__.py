"""Architectures, one file each: `Config`, named `SIZES`, `axes(config)` and `model(config)`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from jaxmodel import moved
from jaxmodel.models.checks import check_params
from jaxmodel.models.contents import summary
from jaxmodel.models.family import KNOWN, Family, family
from jaxmodel.models.foreign import from_linen, from_nnx, linen_params, nnx_params
from jaxmodel.models.model import Model, Output, wrap
from jaxmodel.models.parts import Parts
from jaxmodel.models.predict import predict_fn
from jaxmodel.models.stochastic_depth import stochastic_depth

__all__ = [
    "Family",
    "Model",
    "Output",
    "Parts",
    "check_params",
    "families",
    "family",
    "from_linen",
    "from_nnx",
    "linen_params",
    "nnx_params",
    "predict_fn",
    "sizes",
    "stochastic_depth",
    "summary",
    "wrap",
]


def sizes() -> dict[str, tuple[Family, Any]]:
    """Return every named size as `family/name`, with its family and config.

    >>> family, config = sizes()["gpt2/gpt2-xl"]
    >>> config.width
    1600
    """
    return {
        f"{name}/{size}": (one, config)
        for name, one in families().items()
        for size, config in one.SIZES.items()
    }


def families() -> dict[str, Family]:
    """Return every architecture by name.

    They are those of this folder, and those that were declared elsewhere (`family`).
    """
    for info in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{info.name}")
    return dict(sorted(KNOWN.items()))


moved.attach(__name__)
