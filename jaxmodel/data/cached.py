"""`cached`: a property that is computed once."""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a type checker rejects a cached property where a protocol has a property
    cached = property
else:
    cached = functools.cached_property
