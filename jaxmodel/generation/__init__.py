"""Text from a model: sampling, the decode loop, `generate` and `stream`, beam search, and how fast it runs."""

from jaxmodel.generation.beam import Beams, beam_search
from jaxmodel.generation.generate import Completion, Request, generate, generate_ids, running_only, stream
from jaxmodel.generation.hypotheses import Hypothesis, beam_texts
from jaxmodel.generation.sampling import GREEDY, Sampling, filter_logits, sample
from jaxmodel.generation.timing import measure_speed

__all__ = [
    "GREEDY",
    "Beams",
    "Completion",
    "Hypothesis",
    "Request",
    "Sampling",
    "beam_search",
    "beam_texts",
    "filter_logits",
    "generate",
    "generate_ids",
    "measure_speed",
    "running_only",
    "sample",
    "stream",
]
