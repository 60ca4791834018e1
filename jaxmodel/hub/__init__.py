"""Trained weights: HF folders, GGUF files, tokenizers and the names that each family uses.

The names listed in `__init__.pyi` are imported on first use: `jaxmodel.data` imports the image code
alone, without JAX.
"""

import lazy_loader

from jaxmodel import moved

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved.attach(__name__)
