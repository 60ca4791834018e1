"""How good a model is, with intervals, alone and beside its smaller versions."""

from jaxmodel.evaluate.accuracy import Accuracy, accuracy
from jaxmodel.evaluate.compare import COLUMNS, compare, resident_bytes
from jaxmodel.evaluate.perplexity import Perplexity, bootstrap, perplexity, summarize, token_nll

__all__ = [
    "COLUMNS",
    "Accuracy",
    "Perplexity",
    "accuracy",
    "bootstrap",
    "compare",
    "perplexity",
    "resident_bytes",
    "summarize",
    "token_nll",
]
