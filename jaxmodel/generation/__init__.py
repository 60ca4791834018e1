"""Text generation: sampling, the decode loop, `generate` and `stream`, beam search, and speed."""

from jaxmodel import moved
from jaxmodel.generation.beam import beam_search
from jaxmodel.generation.generate import (
    GenerationRequest,
    for_inference,
    generate,
    generate_ids,
    stream,
)
from jaxmodel.generation.hypotheses import beam_texts
from jaxmodel.generation.sampling import GREEDY, SamplingParams
from jaxmodel.generation.timing import compare_speed, measure_speed

__all__ = [
    "GREEDY",
    "GenerationRequest",
    "SamplingParams",
    "beam_search",
    "beam_texts",
    "compare_speed",
    "for_inference",
    "generate",
    "generate_ids",
    "measure_speed",
    "stream",
]

moved.attach(__name__)
