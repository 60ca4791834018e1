"""The identity of a run: the plain values that distinguish it from others.

`fit` passes it to its checkpoints, which refuse a different run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmodel.models import Model
from jaxmodel.train.config import TrainConfig

FREE = ("log_every", "save_every", "save_seconds")
"""Fields of a `TrainConfig` that only change what is recorded, and when."""
JUDGING = ("eval_every", "eval_batches", "eval_rows")
"""Fields that only change when a run may stop early."""


def run_identity(model: Model, config: TrainConfig, **functions: Any) -> dict[str, Any]:
    """Return the plain values that determine a run, besides its data.

    Args:
      model: the model, of which the config and the dtypes count.
      config: the training config; fields that only change what is recorded do not count.
      functions: name -> loss, optimiser, augmentation and so on, as `described`; None for none.

    >>> from jaxmodel.models import mlp
    >>> known = run_identity(mlp.model(mlp.Config(4, (8,), 2)), TrainConfig(), loss=sum)
    >>> known["train"]["learning_rate"], known["model"]["classes"], known["loss"]
    (0.001, 2, 'builtins.sum')
    """
    free = (*FREE, *(() if config.patience else JUDGING))
    train = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in free
    }
    policy = model.policy
    return {
        "train": described(train),
        "family": type(model.config).__module__,
        "model": described(model.config),
        "compute": str(policy.compute_dtype),
        "stream": str(policy.activation_dtype),
        **{name: short(value) for name, value in functions.items() if value is not None},
    }


def described(value: Any) -> Any:
    """Describe a value in JSON types, the same in every process.

    Arrays are described by a digest, functions by their name and what is bound to them, including
    the settings in closures (but not their code), other objects by their class.

    >>> described(functools.partial(max, default=1.0))
    {'call': 'builtins.max', 'bound': [{'default': 1.0}]}
    """
    return _described(value, ())


def short(function: Any) -> str:
    """Describe a function in one line: its name, and a digest of what is bound to it."""
    known = described(function)
    if isinstance(known, str):
        return known
    name = known.get("call") if isinstance(known, Mapping) else None
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    return f"{name or type(function).__name__} with settings {digest}"


def _described(value: Any, inside: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if id(value) in inside:  # a recursive function
        return "..."
    go = functools.partial(_described, inside=(*inside, id(value)))
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        return {
            field.name: go(getattr(value, field.name, None)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): go(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [go(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((go(one) for one in value), key=repr)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return (
            f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:12]}"
        )
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, functools.partial):
        return _call(
            go(value.func),
            [*map(go, value.args), *([go(value.keywords)] if value.keywords else [])],
        )
    if isinstance(value, types.MethodType):
        return _call(_name(value), [go(value.__self__)])
    # a traced array under jit
    if (
        callable(value)
        and not isinstance(value, types.FunctionType)
        and hasattr(value, "__wrapped__")
    ):
        return go(inspect.unwrap(value))
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        bound = {name: go(_content(cell)) for name, cell in cells}
        # the defaults of a lambda or a nested function are settings too
        inner = "<" in value.__qualname__
        defaults = (
            [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()] if inner else []
        )
        return _call(_name(value), [part for part in (bound, list(map(go, defaults))) if part])
    if isinstance(value, types.BuiltinFunctionType):
        return _name(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _call(name: Any, bound: list[Any]) -> Any:
    return {"call": name, "bound": bound} if bound else name


def _name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is still empty
        return None
