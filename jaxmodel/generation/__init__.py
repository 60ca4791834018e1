"""Text from a model: sampling, the decode loop, `generate` and `stream`, and how fast it runs."""

from jaxmodel.generation.generate import Completion, Request, generate, generate_ids, running_only, stream
from jaxmodel.generation.sampling import GREEDY, Sampling, filter_logits, sample
from jaxmodel.generation.timing import measure_speed

__all__ = [
    "GREEDY",
    "Completion",
    "Request",
    "Sampling",
    "filter_logits",
    "generate",
    "generate_ids",
    "measure_speed",
    "running_only",
    "sample",
    "stream",
]
