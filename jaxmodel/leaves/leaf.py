"""The base class of compressed leaves: frozen dataclass pytrees that stand for an array.

A leaf has a shape, a decoder, partition specs and named tensors. Its arrays may carry a leading
axis of layers, which `scan` slices off. Its static fields therefore hold no absolute shape and
nothing about that axis: shapes follow from the arrays, and axes are counted from the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jaxmodel import tree
from jaxmodel.brief import briefly
from jaxmodel.errors import InputError, one_of

type AxisSizes = Mapping[str, int]


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """Declare a dataclass field as pytree metadata.

    It must be hashable; it is compared when leaves are stacked, and stored as JSON.
    """
    return dataclasses.field(default=default, metadata={"static": True})


def later(*, default: None = None, fixed: bool = False) -> Any:
    """Declare a dataclass field that older files lack; it is stored only if it is not None.

    Args:
      default: None.
      fixed: True for pytree metadata, as `static`; False for an array.
    """
    return dataclasses.field(default=default, metadata={"static": fixed, "later": True})


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(static, later, dataclasses.field)
)
def register[T: type](cls: T) -> T:
    """Make a class a frozen dataclass pytree whose fields marked `static()` are metadata."""
    own = "__repr__" in vars(cls)
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)  # pyright: ignore[reportAssignmentType]
    cls = cls if own else briefly(cls)
    names = [(f.name, bool(f.metadata.get("static"))) for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    return jax.tree_util.register_dataclass(
        cls, data_fields=[n for n, s in names if not s], meta_fields=[n for n, s in names if s]
    )


class Compressed:
    """Base class of the compressed leaves.

    A subclass is decorated with `register` and defines the methods that are abstract here.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the leaf stands for, with the layer axis if there is one."""
        raise NotImplementedError

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of `decode()`."""
        raise NotImplementedError

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return the array that the leaf stands for, in `dtype` or in the leaf's own."""
        raise NotImplementedError

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> Compressed:
        """Return the leaf with a `PartitionSpec` in place of each array.

        Args:
          spec: the spec of the logical axes, with an entry for the layer axis if there is one.
          sizes: the number of devices along each mesh axis.

        Raises:
          InputError: the spec would split a group or a byte.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Check the invariants of the class docstring; raise InputError if one is broken."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of axes, the layer axis included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights that the leaf stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of all buffers (codes, scales, masks) in bytes."""
        return tree.nbytes(self)

    @property
    def bits_per_weight(self) -> float:
        """The number of bits stored for each weight, including scales and masks."""
        return 8 * self.nbytes / max(self.size, 1)


def decode(leaf: Any, dtype: Any = None) -> jax.Array:
    """Return a leaf, compressed or not, as a plain array."""
    if isinstance(leaf, Compressed):
        return leaf.decode(dtype)
    return leaf if dtype is None else leaf.astype(dtype)


def expect(ok: bool, leaf: Compressed, message: str) -> None:
    """Raise InputError with the leaf's class and the message unless `ok`."""
    if not ok:
        raise InputError(f"{type(leaf).__name__}: {message}")


def check_weights(leaf: Any, what: str) -> None:
    """Refuse an array that cannot be quantised.

    One NaN or infinity would spoil all the weights that share its scale.

    Args:
      leaf: an array; if it is traced, only its shape and dtype are checked.
      what: the name of the array, for errors.

    Raises:
      InputError: the array is not floating-point, is empty, or has values that are not finite.
    """
    if isinstance(leaf, Compressed):
        return
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise InputError(f"{what}: its weights are {leaf.dtype}; allowed: floating-point numbers")
    if not math.prod(leaf.shape):
        raise InputError(f"{what}: has the shape {list(leaf.shape)}, so no weights; leave it out")
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and not _all_finite(leaf):
        raise InputError(
            f"{what}: some of its weights are NaN or infinite; those that share a scale with them "
            f"would be lost"
        )


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


def shards(entry: Any, sizes: AxisSizes) -> int:
    """Return the number of parts into which one entry of a partition spec cuts its axis."""
    return math.prod(
        sizes[name] for name in ((entry,) if isinstance(entry, str) else (entry or ()))
    )


def full_spec(spec: PartitionSpec, ndim: int) -> list[Any]:
    """Return the entries of a spec, one for every axis."""
    return [*spec, *[None] * (ndim - len(spec))]


# ------------------------------------------------------------------- the same leaf by name, on disk


def to_tensors(leaf: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a leaf as named arrays and its static fields.

    Returns:
      `({"": array}, None)` for a plain array. For a compressed leaf, the arrays by field name
      (`packed`, `scale`; those of a nested leaf are joined by `_`: `values_packed`), and the static
      fields, as JSON can hold them, that are needed to rebuild the leaf.
    """
    if not isinstance(leaf, Compressed):
        return {"": leaf}, None
    arrays: dict[str, Any] = {}
    fields: dict[str, Any] = {"type": type(leaf).__name__}
    for field in dataclasses.fields(leaf):  # pyright: ignore[reportArgumentType]
        value = getattr(leaf, field.name)
        if value is None and field.metadata.get("later"):
            continue
        if field.metadata.get("static"):
            fields[field.name] = value
        elif value is None:
            # so that an array missing on disk is not mistaken for one that never existed
            fields[field.name] = None
        else:
            inner, inner_fields = to_tensors(value)
            arrays |= {
                f"{field.name}_{name}" if name else field.name: array
                for name, array in inner.items()
            }
            if inner_fields is not None or field.metadata.get("later"):
                fields[field.name] = inner_fields or {}
    return arrays, fields


def tensor_names(fields: Mapping[str, Any] | None) -> list[str]:
    """Return the array names of a leaf with these static fields, as `to_tensors` gives them."""
    if fields is None:
        return [""]
    names = []
    for field in dataclasses.fields(_class(fields)):  # pyright: ignore[reportArgumentType]
        absent = None if field.metadata.get("later") else ""
        if not field.metadata.get("static") and fields.get(field.name, absent) is not None:
            inner = tensor_names(fields.get(field.name) or None)
            names += [f"{field.name}_{name}" if name else field.name for name in inner]
    return names


def from_tensors(arrays: Mapping[str, Any], fields: Mapping[str, Any] | None) -> Any:
    """Rebuild and check a leaf from what `to_tensors` returned.

    Raises:
      InputError: the type is unknown, an array is missing, or an invariant is broken.
    """
    if fields is None:
        return arrays[""]
    cls = _class(fields)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        name = field.name
        given = fields.get(field.name)
        if field.metadata.get("static"):
            if name in fields:
                values[name] = tuple(given) if isinstance(given, list) else given
        elif given:
            head = f"{name}_"
            values[name] = from_tensors(
                {k[len(head) :]: v for k, v in arrays.items() if k.startswith(head)}, given
            )
        elif name in arrays:
            values[name] = arrays[name]
        elif given == {} or (name not in fields and not field.metadata.get("later")):
            raise InputError(f"{cls.__name__}: the tensor {name!r} is missing")
    try:
        leaf = cls(**values)
    except TypeError as error:
        raise InputError(f"{cls.__name__}: {error}") from None
    leaf.check()
    return leaf


def _class(fields: Mapping[str, Any]) -> type[Compressed]:
    classes = {cls.__name__: cls for cls in Compressed.__subclasses__()}
    one_of("leaf type", fields.get("type"), classes)
    return classes[fields["type"]]
