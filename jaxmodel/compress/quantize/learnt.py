"""Steps and clipping limits that are learnt while a model trains: LSQ and PACT.

    model, params = learn_ranges(model, params, [(".*/(q|k|v|o)", Learnt(4)), (".*", None)])
    state, _ = train.fit(model, stream, config, params=params)
    params = store_ranges(state.params)

What is learnt stands beside its weight: `q_range`, with `step`, `limit` and the number of bits,
stands beside `q`. The wrapped model reads both; `store_ranges` makes `QTensor` leaves of them,
which the model without the wrapper runs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel import tree
from jaxmodel.axes import Axes, read, written
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed, QTensor, Turned
from jaxmodel.models import Model
from jaxmodel.models.model import Parts, wrap
from jaxmodel.schema import Positive, Range, make

SUFFIX = "_range"
_PART = re.compile(f".*{SUFFIX}/(step|limit|bits)")


@dataclasses.dataclass(frozen=True)
class Learnt:
    """The range of a weight, and of its input, as things to learn.

    Attributes:
      bits: of a weight, 2 to 8. The step of each row is learnt (LSQ: Esser et al., 2020); it begins
        at `2 mean|w| / sqrt(2^(bits-1) - 1)`.
      limit: where the input is clipped at the beginning; it is learnt (PACT: Choi et al., 2018),
        and the input rounded to 8 bits. None for an input that stays as it is.

    Raises:
      InputError: a setting out of its range.
    """

    bits: Annotated[int, Range(2, 8)] = 4
    limit: Positive | None = None

    def __post_init__(self) -> None:
        make(self.bits, Annotated[int, Range(2, 8)], "Learnt", "bits")
        make(self.limit, Positive | None, "Learnt", "limit")


def learn_ranges(model: Model, params: tree.Params, rules: tree.Rules) -> tuple[Model, tree.Params]:
    """Add steps and limits that train to a model and its parameters.

    Args:
      model: a model of any family.
      params: plain arrays where a range is learnt.
      rules: path of a matrix -> `Learnt` or None. Segments are split where layers differ.

    Returns:
      The wrapped model, whose weights are rounded, and the parameters.

    Raises:
      InputError: a rule for a leaf that is not a plain matrix, or a value that is no `Learnt`.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> rules = [(".*/up", Learnt(4, limit=6.0)), (".*", None)]
    >>> rounded, params = learn_ranges(model, jax.jit(model.init)(jax.random.key(0)), rules)
    >>> {name: leaf.shape for name, leaf in params["blocks"]["0-2"]["mlp"]["up_range"].items()}
    {'bits': (3,), 'step': (3, 128), 'limit': (3,)}
    """
    tree.check(params)
    params, values = tree.match(rules, params)
    leaves = tree.flatten(params)
    for path, leaf in tuple(leaves.items()):
        one = values[path]
        if one is None:
            continue
        shape = tree.layer_shape(path, leaf)
        if not isinstance(one, Learnt) or len(shape) != 2 or isinstance(leaf, Compressed):
            raise InputError(
                f"rules: {one!r} given for {path!r} of shape {shape}; allowed: a Learnt for a "
                "plain matrix, or None"
            )
        lead = leaf.shape[:-2]
        top = 2 ** (one.bits - 1) - 1
        size = jnp.mean(jnp.abs(leaf.astype(jnp.float32)), axis=-1)
        parts = {"bits": jnp.full(lead, one.bits, jnp.int32), "step": 2 * size / top**0.5}
        if one.limit is not None:
            parts["limit"] = jnp.full(lead, one.limit, jnp.float32)
        leaves |= {f"{path}{SUFFIX}/{name}": part for name, part in parts.items()}
    return with_ranges(model), tree.unflatten(leaves)


@functools.cache
def with_ranges(model: Model) -> Model:
    """Wrap a model so that it reads learnt ranges wherever its parameters have them."""
    if any(f"{SUFFIX}/" in pattern for pattern, *_ in model.axes.rules):
        return model
    again = lambda policy: with_ranges(model.with_policy(policy))
    axes = dataclasses.replace(model.axes, rules=(*_axes(model.axes), *model.axes.rules))
    return dataclasses.replace(wrap(model, _reading), axes=axes, with_policy=again)


def _axes(axes: Axes) -> tuple[Any, ...]:
    rules = []
    for pattern, text, *_ in axes.rules:
        letters = read(text).axes
        if len(letters) not in (0, 2):
            continue
        out = written(letters[0]) if letters else "_"
        for name, own in (("step", out), ("limit", ""), ("bits", "")):
            rules.append((tree.optional(f"(?:{pattern}){SUFFIX}/{name}"), own, jax.P()))
    return tuple(rules)


def _reading(parts: Parts) -> Parts:
    def reads(function: Any) -> Any:
        return lambda params, *args, **named: function(read_ranges(params), *args, **named)

    block = None if parts.block is None else reads(parts.block)
    return Parts(reads(parts.embed), block, reads(parts.head))


def read_ranges(params: tree.Params) -> tree.Params:
    """Replace weights that have learnt ranges by rounded ones, in a tree or that of one layer."""
    out = {
        name: read_ranges(node) if isinstance(node, dict) else node for name, node in params.items()
    }
    for name in [name for name in out if name.endswith(SUFFIX)]:
        base = name.removesuffix(SUFFIX)
        if base not in out or not {"step", "bits"} <= set(out[name]) <= {"step", "bits", "limit"}:
            continue  # a name of the user's own
        found: Any = out.pop(name)
        whole: Any = out[base]
        weight = learnt_step(whole, found["step"], found["bits"])
        limit = found.get("limit")
        out[base] = weight if limit is None else Turned(weight, limit=limit[..., None, None])
    return out


def learnt_step(
    weight: Float[Array, "... out in"], step: Float[Array, "... out"], bits: Int[Array, "..."]
) -> Float[Array, "... out in"]:
    """Round to multiples of a step, with the gradients of LSQ for weight and step."""
    top = (2.0 ** (bits.astype(jnp.float32) - 1) - 1)[..., None, None]
    # the gradient of a step is a sum over its weights: this factor makes it as large as theirs
    small = jax.lax.rsqrt(weight.shape[-1] * top)
    step = jnp.maximum(step.astype(jnp.float32), 1e-12)[..., None]
    step = step * small + jax.lax.stop_gradient(step - step * small)
    code = jnp.clip(weight.astype(jnp.float32) / step, -top, top)
    code = code + jax.lax.stop_gradient(jnp.round(code) - code)
    return (code * step).astype(weight.dtype)


def store_ranges(params: tree.Params) -> tree.Params:
    """Make `QTensor` leaves of weights with learnt ranges, for the model without the wrapper."""
    tree.check(params)
    leaves = tree.flatten(params)
    out = {path: leaf for path, leaf in leaves.items() if not _PART.fullmatch(path)}
    for path in [path for path in out if f"{path}{SUFFIX}/step" in leaves]:
        names = ("step", "limit", "bits")
        part: Any = {name: leaves.get(f"{path}{SUFFIX}/{name}") for name in names}
        bits = int(jnp.max(part["bits"]))
        top = 2 ** (bits - 1) - 1
        scale = jnp.maximum(part["step"].astype(jnp.float32), 1e-12)[..., None]
        weight: Any = out[path]
        codes = jnp.round(jnp.clip(weight.astype(jnp.float32) / scale, -top, top))
        limit = part["limit"]
        out[path] = QTensor.from_codes(
            codes.astype(jnp.int32),
            scale,
            bits=bits,
            activations=None if limit is None else "int8",
            limit=None if limit is None else jnp.maximum(limit, 1e-6)[..., None, None],
        )
    return tree.unflatten(out)
