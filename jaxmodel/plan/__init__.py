"""What a program will need on machines that are not here: its collectives, read from what XLA
compiled.
"""

from jaxmodel.plan.collectives import Collective, collectives, moved
from jaxmodel.plan.topology import topology

__all__ = ["Collective", "collectives", "moved", "topology"]
