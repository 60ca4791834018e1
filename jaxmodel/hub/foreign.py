"""Foreign Flax modules on disk: weights, fields, and an import path that is never imported.

config.json states the module's import path, the fields that JSON can hold, and the inputs. A folder
of weights may not bring code along, so the reader passes the module:

    # the module that was given to from_linen or from_nnx
    from_pretrained(folder, module=Net(width=3))
    # its class, which is constructed with the fields that the folder states
    from_pretrained(folder, module=Net)
    # a model, used as it is
    from_pretrained(folder, module=models.from_linen(Net(3), inputs, call=...))
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.hub.names import Family, Name, layer_shapes
from jaxmodel.models import Model
from jaxmodel.models.foreign import Foreign, from_linen, from_nnx, is_linen

KIND = "jaxmodel-foreign"


def layout(model: Model) -> Family:
    """Return the file names of a foreign module's leaves: their paths."""

    def names(config: Any) -> list[Name]:
        paths = list(tree.flatten(layer_shapes(model)))
        for path in paths:
            if "{" in path or "}" in path:
                raise InputError(
                    f"module: the name {path!r} has a brace; allowed for saving: names without "
                    "braces"
                )
        numbered = [re.sub(r"(^|/)\d+/", r"\1{}/", path, count=1) for path in paths]
        return [Name(path, path) for path in dict.fromkeys(numbered)]

    def never(_: Any) -> Any:
        raise AssertionError("a foreign module is passed in, not made from a config")

    return Family("foreign", (KIND,), names, never, never)


def config_of(model: Model) -> dict[str, Any]:
    """Return the config.json of a foreign module."""
    config: Foreign = model.config
    module = config.module
    given = _given(config.module)
    plain = {name: value for name, value in given.items() if _is_plain(value)}
    shapes = (
        None
        if callable(config.inputs)
        else {n: {"shape": list(s), "dtype": str(d)} for n, s, d in config.inputs}
    )
    return {
        "model_type": KIND,
        "flax": "linen" if is_linen(module) else "nnx",
        "module": _import_path(module),
        "fields": plain,
        "stated": {name: repr(value) for name, value in given.items() if name not in plain},
        "inputs": shapes,
        "rngs": list(config.rngs),
        "own_call": config.own_call,
    }


def model_of(folder: Path, hf: Mapping[str, Any], module: Any) -> Model:
    """Return the model of a folder, made from the given module.

    Raises:
      InputError: no module was given, or its fields are not those that the folder states.
    """
    called = f"{folder}: weights of the Flax module {hf['module']!r}"
    if module is None:
        fields = ", ".join(
            f"{name}={value!r}" for name, value in {**hf["fields"], **hf["stated"]}.items()
        )
        short = str(hf["module"]).rpartition(":")[2]
        raise InputError(
            f"{called}, whose code is not imported for you; pass it: from_pretrained(folder, "
            f"module={short}({fields})), or its class, or a model made by models.from_linen or "
            "from_nnx"
        )
    if isinstance(module, Model):
        if not isinstance(module.config, Foreign):
            raise InputError(
                f"module: a model of {type(module.config).__module__} given; allowed: one of "
                f"from_linen or from_nnx"
            )
        return module
    if hf["own_call"] or hf["inputs"] is None:
        why = "needs its own `call`" if hf["own_call"] else "needs its own inputs"
        raise InputError(
            f"{called} that {why}; pass a model, such as models.from_linen(module, inputs, "
            "call=...) makes"
        )
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(s["shape"]), jnp.dtype(s["dtype"]))
        for name, s in hf["inputs"].items()
    }
    if inspect.isclass(module):
        if hf["stated"]:
            raise InputError(
                f"{called} with {', '.join(hf['stated'])}, which JSON cannot store; pass the "
                "module itself"
            )
        positional = hf["fields"].get("", [])
        named = {k: _tuples(v) for k, v in hf["fields"].items() if k}
        try:
            made = functools.partial(module, *_tuples(positional), **named)
            return _model_of(made() if is_linen(module) else made, shapes, hf)
        except TypeError as error:
            raise InputError(
                f"module: {module.__qualname__} cannot be made from the fields in {folder}: {error}"
            ) from None
    now = {name: value for name, value in _given(module).items() if _is_plain(value)}
    for name, value in hf["fields"].items():
        if name in now and json.loads(json.dumps(now[name])) != value:
            raise InputError(
                f"module: its {name or 'arguments'} is {now[name]!r}, but {folder} states "
                f"{value!r}; allowed: the same, or a "
                "model (models.from_linen(...)), which is used as it is"
            )
    return _model_of(module, shapes, hf)


def _model_of(module: Any, shapes: dict[str, Any], hf: Mapping[str, Any]) -> Model:
    return (
        from_linen(module, shapes, rngs=tuple(hf["rngs"]))
        if is_linen(module)
        else from_nnx(module, shapes)
    )


def _import_path(module: Any) -> str:
    """Return `package.file:Class` of a module, or of the function that makes one."""
    while isinstance(module, functools.partial):
        module = module.func
    kind = module if inspect.isclass(module) or inspect.isfunction(module) else type(module)
    return f"{kind.__module__}:{kind.__qualname__}"


def _given(module: Any) -> dict[str, Any]:
    """Return a module's known arguments: the fields of Linen, or the arguments of a partial."""
    if is_linen(module):
        return {
            f.name: getattr(module, f.name)
            for f in dataclasses.fields(module)
            if f.init and f.name not in ("parent", "name")
        }
    if isinstance(module, functools.partial):
        positional = {"": list(module.args)} if module.args else {}
        return {**_given(module.func), **positional, **module.keywords}
    return {}


def _is_plain(value: Any) -> bool:
    """Return whether a value survives writing and reading as JSON unchanged."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return (
        value is None
        or type(value) in (bool, int, str)
        or (type(value) is float and math.isfinite(value))
    )


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, so that a module that holds them can be hashed."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
