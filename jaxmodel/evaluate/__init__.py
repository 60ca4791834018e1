"""How good a model is, with intervals, alone and beside its smaller versions."""

from jaxmodel import moved
from jaxmodel.evaluate.accuracy import Accuracy, accuracy
from jaxmodel.evaluate.compare import compare
from jaxmodel.evaluate.perplexity import Perplexity, bootstrap, perplexity, token_nll

__all__ = [
    "Accuracy",
    "Perplexity",
    "accuracy",
    "bootstrap",
    "compare",
    "perplexity",
    "token_nll",
]

moved.attach(__name__)
