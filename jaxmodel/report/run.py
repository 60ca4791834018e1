"""Run folders: the configuration of a run, its versions and machine, and its results.

`runs/<YYYYmmdd-HHMMSS>-<name>/` holds `config.json` and `versions.json` from the start,
`metrics.jsonl` as it grows, and whatever the run saves. Start one run per job, not one per process.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodel import schema
from jaxmodel.brief import briefly
from jaxmodel.errors import InputError
from jaxmodel.files import atomic_write, open_own
from jaxmodel.report.json_out import dumps, to_plain

_PACKAGES = ("jaxmodel", "jax", "jaxlib", "flax", "optax", "numpy")
_FLAGS = re.compile(r"sse4_2|fma|f16c|avx\w*|amx\w*|asimd\w*|sve\w*|bf16|i8mm")


@briefly
@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
      folder: the path of the run folder.
      config: what was asked for (the verb, the options, the seeds), and `resolved`, the resulting
        configuration.
      versions: the software and machine of the run; see `versions`.
    """

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]

    def path(self, name: str) -> Path:
        """Return the path of a file inside the folder, and make its parent folders.

        Raises:
          InputError: `name` leads out of the folder, or the parents cannot be made.
        """
        place = self.folder / name
        if not place.resolve().is_relative_to(self.folder.resolve()) or not name:
            raise InputError(
                f"name: {name!r} leads out of the run folder; allowed: a path inside "
                f"{str(self.folder)!r}"
            )
        _make_folder(place.parent)
        return place

    def log(self, **metrics: Any) -> None:
        """Append one line to `metrics.jsonl`, which is on disk when this returns.

        A number that is not finite is written as null.

        Raises:
          InputError: the file cannot be written.
        """
        try:
            with open_own(self.folder / "metrics.jsonl") as file:
                file.write(dumps(metrics, indent=None) + "\n")
        except OSError as error:
            raise InputError(
                f"metrics.jsonl in {str(self.folder)!r} cannot be written ({error.strerror})"
            ) from error

    def resolve(self, **resolved: Any) -> None:
        """Add the resolved options (whole configs, data by digest) to `config` and its file."""
        self.config["resolved"] = self.config.get("resolved", {}) | to_plain(resolved)
        self.save_json("config.json", self.config)

    def save_json(self, name: str, obj: Any) -> Path:
        """Write `obj` as JSON (see `to_plain`), atomically."""
        return atomic_write(self.path(name), dumps(obj) + "\n")

    def save_bytes(self, name: str, data: bytes | str) -> Path:
        """Write a file (a plot, a page), atomically."""
        return atomic_write(self.path(name), data)


def start_run(name: str, config: Mapping[str, Any], root: str | os.PathLike[str] = "runs") -> Run:
    """Make a run folder and record the configuration, the versions and the machine.

    Args:
      name: letters, digits, `.`, `_`, `-`.
      config: what is asked for, with the verb and every seed; `Run.resolve` adds the resolved
        options.
      root: the folder of all runs; it is made if missing.

    Raises:
      InputError: the name holds other characters, or the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"name: {name!r} cannot name a run folder; allowed: letters, digits, '.', '_', '-'"
        )
    _make_folder(Path(root))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = None
    again = 1
    while folder is None:
        place = Path(root) / (f"{stamp}-{name}" if again == 1 else f"{stamp}-{name}-{again}")
        folder = place if _make_folder(place, new=True) else None
        again = again + 1
    run = Run(folder, to_plain(config), versions())
    run.save_json("versions.json", run.versions)
    run.save_json("config.json", run.config)
    return run


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read the run in `folder`, as `start_run` returned it.

    Raises:
      InputError: `folder` is not a run folder, or its records cannot be read.
    """
    records = []
    for file in ("config.json", "versions.json"):
        try:
            records.append(schema.read(Path(folder) / file))
        except InputError as error:
            why = (
                f"is not a run folder ({file} is missing or unreadable: {error}); allowed: "
                f"runs/<time>-<name>"
            )
            raise InputError(f"folder: {str(folder)!r} {why}") from None
    return Run(Path(folder), *records)


def versions() -> dict[str, Any]:
    """Return the versions of the software, the machine, its devices and the commit of the code.

    This starts JAX's backend.

    Returns:
      `{"python", "jaxmodel", "jax", "jaxlib", "flax", "optax", "numpy", "platform", "cpu":
      {"model", "flags", "count"}, "devices": {"platform", "kind", "count", "processes"}, "git":
      {"commit", "dirty"} or None}`. `cpu.count` is the number of processors that this process may
      use: results repeat bit for bit only where it and the flags are the same.
    """
    import jax

    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git": _git(),
    }


def processor(known: Mapping[str, Any] | None = None) -> str:
    """Describe the processor in words, to be reported with a speed.

    Speeds on different kinds differ several times over.

    Args:
      known: what `versions` returned; None calls it.

    >>> cpu = {"model": "A", "flags": ["avx2", "avx512f", "avx512_vnni"], "count": 2}
    >>> processor({"devices": {"platform": "cpu"}, "cpu": cpu})
    'A, 2 cores, AVX-512 with VNNI'
    """
    known = versions() if known is None else known
    if (devices := known["devices"])["platform"] != "cpu":
        return f"{devices['count']} x {devices['kind']}"
    cpu = known["cpu"]
    flags = set(cpu["flags"])
    more = [
        name for flag, name in (("avx512_vnni", "VNNI"), ("avx512_bf16", "bf16")) if flag in flags
    ]
    kinds = (
        ("amx_tile", "AMX"),
        ("avx512f", "AVX-512"),
        ("avx2", "AVX2"),
        ("sve", "SVE"),
        ("asimd", "NEON"),
    )
    kind = next((name for flag, name in kinds if flag in flags), "no vectors known")
    return (
        f"{cpu['model']}, {cpu['count']} cores, "
        f"{kind}{f' with {" and ".join(more)}' if kind == 'AVX-512' and more else ''}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    entries = dict(re.findall(r"^(model name|flags|Features)\s*: *(.*)$", info, re.MULTILINE))
    flags = entries.get("flags", entries.get("Features", "")).split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = entries.get("model name") or platform.processor() or platform.machine()
    return {"model": model, "flags": sorted(filter(_FLAGS.fullmatch, flags)), "count": usable}


def _git() -> dict[str, Any] | None:
    """Return the commit of the tree that holds this code, and whether the tree differs from it."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None


def _make_folder(folder: Path, new: bool = False) -> bool:
    try:
        folder.mkdir(parents=not new, exist_ok=not new)
    except FileExistsError as error:
        if new:
            return False
        raise InputError(f"folder: {str(folder)!r} is a file; allowed: a folder") from error
    except OSError as error:
        allowed = "a place in a writable folder"
        raise InputError(
            f"folder: {str(folder)!r} cannot be made ({error.strerror}); allowed: {allowed}"
        ) from error
    return True
