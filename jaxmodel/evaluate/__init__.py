"""Evaluation: quality with confidence intervals, of one model or of its variants side by side."""

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
