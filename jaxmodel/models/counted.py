"""Masking of padding rows in the moments of Flax's own batch norms, in a foreign module."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodel.errors import InputError


def linen_counting(counts: jax.Array | None) -> contextlib.AbstractContextManager[Any]:
    """Make every `nn.BatchNorm` in this context take its moments of the rows that count.

    Args:
      counts: bool `[B]`; None changes nothing.
    """
    if counts is None:
        return contextlib.nullcontext()

    def counted(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            kwargs = _masked(context.orig_method, context.module.name, counts, args, kwargs)
        return call(*args, **kwargs)

    return nn.intercept_methods(counted)


def nnx_counting(module: Any, counts: jax.Array | None) -> None:
    """Make every `nnx.BatchNorm` of a module take its moments of the rows that count, in place."""
    if counts is None:
        return
    from flax import nnx

    for path, part in list(nnx.iter_graph(module)):
        if isinstance(part, nnx.BatchNorm):
            part.__class__ = _counting_kind(type(part), "/".join(map(str, path)), counts)


def _counting_kind(kind: Any, name: str, counts: jax.Array) -> Any:
    class Counting(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **_masked(kind.__call__, name, counts, args, kwargs))

    return Counting


def _masked(
    method: Callable[..., Any], name: str | None, counts: jax.Array, args: Any, kwargs: Any
) -> Any:
    """Return the keywords with a mask for `x`, if the method takes one and none was given."""
    if kwargs.get("mask") is not None or "mask" not in inspect.signature(method).parameters:
        return kwargs
    x = kwargs["x"] if "x" in kwargs else args[0]
    if x.shape[0] % counts.shape[0]:
        raise InputError(
            f"weights: the batch norm {name!r} reads {x.shape[0]} rows of a batch of "
            f"{counts.shape[0]}, so it cannot tell which of them count; allowed: inputs with the "
            "rows first, or no row weights"
        )
    known = counts | ~jnp.any(counts)  # the moments of no rows would be NaN
    # if rows and positions are one axis, rows come first
    mask = jnp.repeat(known, x.shape[0] // counts.shape[0])
    return {**kwargs, "mask": mask.reshape(-1, *[1] * (x.ndim - 1))}
