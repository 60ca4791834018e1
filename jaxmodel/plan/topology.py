"""The devices of a TPU slice that is not here; its compiler runs on any machine."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from jaxmodel.errors import InputError, require
from jaxmodel.files import open_own

_held: list[Any] = []  # the lock, held until this process ends


def topology(name: str) -> list[Any]:
    """Return the devices of a TPU slice, to compile for but not to run on.

    Use it as `make_mesh(shape, topology("v5e:2x4"))`. It needs libtpu (the extra `plan`), which
    only one process at a time may load: this one waits for its turn, and keeps it until it ends. So
    use a process of its own, with JAX_PLATFORMS=cpu, since JAX takes an installed libtpu for a TPU
    that is present.

    Args:
      name: generation and grid of chips, such as `v5e:2x4`, `v6e:8x8` or `v5p:4x4x4`.

    Raises:
      InputError: libtpu is not installed or does not know the name.
    """
    require("libtpu", "plan")
    # else it asks the network what machine this is
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # libtpu's own lock fails instead of waiting; nothing runs on a chip here
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not _held:
        lock = open_own(Path(tempfile.gettempdir()) / "jaxmodel-libtpu.lock")
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held.append(lock)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        raise InputError(
            f"topology: {name!r} is not a slice that libtpu knows ({error}); allowed: such as "
            "'v5e:2x4'"
        ) from None
