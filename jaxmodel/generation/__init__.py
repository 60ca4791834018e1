"""Text generation: sampling, the decode loop, `generate` and `stream`, beam search, and speed."""

from jaxmodel import moved
from jaxmodel.generation.beam import beam_search
from jaxmodel.generation.generate import Request, generate, generate_ids, running_only, stream
from jaxmodel.generation.hypotheses import beam_texts
from jaxmodel.generation.sampling import GREEDY, Sampling
from jaxmodel.generation.timing import measure_speed

__all__ = [
    "GREEDY",
    "Request",
    "Sampling",
    "beam_search",
    "beam_texts",
    "generate",
    "generate_ids",
    "measure_speed",
    "running_only",
    "stream",
]

moved.attach(__name__)
