"""Products of few rows of activations with weights in codes, by kernels in C++.

XLA unpacks codes into memory, or in a loop that it does not block; `kernels.cc` unpacks a register
of them once and multiplies several rows with it. It is compiled when it is first of use, for the
processor at hand, and kept in the cache folder (`$JAXMODEL_CACHE`, or `~/.cache/jaxmodel`). Where
there is no C++ compiler, no x86 processor with AVX2, or more than one device, XLA's form runs,
which is the oracle in the tests. The environment variable `JAXMODEL_KERNELS` may be `native` (the
default), `avx2` (no newer instructions), or `off`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.errors import one_of
from jaxmodel.leaves import Adapted, Compressed, QTensor, RowPacked, Turned
from jaxmodel.leaves.qtensor import FLOATS

SETTING = "JAXMODEL_KERNELS"
TARGETS = {"native": "native", "avx2": "x86-64-v3", "off": None}
"""Settings, with the processor that the compiler builds for."""
MOST_ROWS = {"packed": 32, "bytes": 32, "rounded": 10**9}
"""The largest number of rows of activations that each kernel is given.

With more in float, unpacking once is little beside the products, and XLA is as fast. Activations of
8 bits may have any number.
"""

SOURCE = Path(__file__).with_name("kernels.cc")
PART = SOURCE.with_name("kernels_rounded.h")
Plain = Callable[[Array, Any], Array]


def product(x: Float[Array, "... in"], w: Any, plain: Plain) -> Float[Array, "... out"]:
    """Compute `x @ w.T` for a leaf of codes `[out, in]` with a kernel, if one serves.

    Gradients are those of `plain`.

    Args:
      x: the activation.
      w: a `QTensor` or `RowPacked` leaf. Its `activations` are rounded here if it has whole rows of
        8 bits, else they are rounded already.
      plain: `(x, w) -> float32 y`, which runs where no kernel serves.
    """
    name = _kernel(w)
    if not name or not x.size or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return plain(x, w)
    found = library()
    if found.tag is None or x.size > MOST_ROWS[name] * x.shape[-1]:
        return plain(x, w)

    def on_cpu(x: Array, w: Any) -> Array:
        y = _call(f"{name}{found.tag}", x.astype(jnp.float32).reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], w.shape[-2])

    @jax.custom_jvp
    def run(x: Array, w: Any) -> Array:
        # the program may be for a TPU that is not here
        return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=plain)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return run(*primals), jax.jvp(plain, primals, tangents)[1]

    return run(x, w)


def _kernel(w: Any) -> str:
    """Return the name of the kernel for a leaf, or nothing."""
    if isinstance(w, RowPacked):
        return "packed"
    if not isinstance(w, QTensor) or w.bits != 8 or w.minimum is not None or w.form in FLOATS:
        return ""
    return "rounded" if of_int8(w) else "bytes"


def of_int8(w: Any) -> bool:
    """Return whether products with a leaf are int8 x int8: its input is rounded inside of them."""
    return (
        isinstance(w, QTensor)
        and w.activations == "int8"
        and w.groups == 1
        and w.minimum is None
        and w.form not in FLOATS
    )


def _call(name: str, x: Array, w: Any) -> Array:
    numbers = lambda a: a if a.dtype in (jnp.float16, jnp.float32) else a.astype(jnp.float32)
    none = jnp.zeros(0, jnp.float32)
    parts, settings = [numbers(w.scale)], {}
    if name.startswith("packed"):
        parts.append(none if w.minimum is None else numbers(w.minimum))
        settings["bits"] = w.bits
    if name.startswith("rounded"):
        limit = none if w.limit is None else w.limit.astype(jnp.float32).reshape(1)
        parts = [w.scale.astype(jnp.float32), limit]
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[-2]), jnp.float32)
    run = jax.ffi.ffi_call(f"jaxmodel_{name}", shape, vmap_method="sequential")
    return run(x, w.packed, *parts, **settings)


# ------------------------------------------------------------------------------------- the library


class Library(NamedTuple):
    """What was built: the end of the names of its entries, or None and why there are none."""

    tag: str | None
    reason: str = ""


def library() -> Library:
    """Build and register the kernels, once.

    Raises:
      InputError: the environment variable is another word.
    """
    setting = os.environ.get(SETTING, "native")
    one_of(SETTING, setting, tuple(TARGETS))
    return _library(setting)


def says(leaf: Any) -> str:
    """Return how products with a leaf run on this machine, in words.

    >>> says(jnp.ones((2, 3)))
    'products in float'
    """
    if isinstance(leaf, Turned):
        return f"its input turned, then {says(leaf.base)}"
    if isinstance(leaf, Adapted):
        return f"{says(leaf.base)}, and the adapter's in float"
    if not isinstance(leaf, Compressed):
        return "products in float"
    plain = "products of int8" if of_int8(leaf) else "unpacked for products in float"
    name = _kernel(leaf)
    if not name or jax.default_backend() != "cpu":
        return plain
    if jax.device_count() > 1:
        return f"{plain} (several devices)"
    found = library()
    if found.tag is None:
        return f"{plain} (no kernel: {found.reason})"
    most = f" up to {MOST_ROWS[name]} rows, then {plain}" if name != "rounded" else ""
    return f"kernel in C++{most}"


@functools.cache
def _library(setting: str) -> Library:
    target = TARGETS[setting]
    if target is None:
        return Library(None, f"{SETTING} is {setting}")
    if platform.machine() != "x86_64":
        return Library(None, f"the processor is {platform.machine()}")
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in known.splitlines() if line.startswith("flags")), "")
    if "avx2" not in flags.split():
        return Library(None, "the processor has no AVX2")
    if (compiler := shutil.which(os.environ.get("CXX", "c++"))) is None:
        return Library(None, "there is no C++ compiler")
    command = [
        compiler,
        "-std=c++17",
        "-O3",
        f"-march={target}",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fPIC",
        "-shared",
        f"-I{jax.ffi.include_dir()}",
    ]
    # with the flags, since another processor may share the folder
    key = hashlib.sha256(
        "\n".join([*command, jax.__version__, flags, SOURCE.read_text(), PART.read_text()]).encode()
    ).hexdigest()[:16]
    folder = Path(os.environ.get("JAXMODEL_CACHE", "~/.cache/jaxmodel")).expanduser() / "kernels"
    try:
        if not (built := folder / f"{key}.so").exists():
            _build(command, built)
        handle = ctypes.CDLL(str(built))
        entries = {name: getattr(handle, f"jaxmodel_{name}") for name in MOST_ROWS}
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return Library(None, f"they could not be built: {type(error).__name__}")
    for name, entry in entries.items():
        pointer = jax.ffi.pycapsule(entry)
        jax.ffi.register_ffi_target(f"jaxmodel_{name}_{key}", pointer, platform="cpu")
    return Library(f"_{key}")


def _build(command: list[str], target: Path) -> None:
    """Compile beside the target, which appears when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        made = Path(beside) / "made.so"
        subprocess.run(
            [*command, "-o", str(made), str(SOURCE)], check=True, capture_output=True, timeout=120
        )
        made.replace(target)
