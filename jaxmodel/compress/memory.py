"""Memory of the process: what was freed goes back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc; else do nothing.

    glibc keeps what threads have freed, in pieces between what is still used. A long row of large
    arrays of changing sizes, as calibration makes them, so takes several times its own memory.
    """
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
