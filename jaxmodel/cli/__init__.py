"""`jaxmodel VERB`: options, errors as one line, run folders."""

from jaxmodel.cli.main import main

__all__ = ["main"]
