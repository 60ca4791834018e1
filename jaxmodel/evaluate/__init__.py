"""How good a model is, with intervals."""

from jaxmodel.evaluate.perplexity import Perplexity, bootstrap, perplexity, summarize, token_nll

__all__ = ["Perplexity", "bootstrap", "perplexity", "summarize", "token_nll"]
