"""Planning for machines that are not here.

So far: the collectives of a program, read from what XLA compiled.
"""

from jaxmodel.plan.collectives import Collective, collectives, moved
from jaxmodel.plan.topology import topology

__all__ = ["Collective", "collectives", "moved", "topology"]
