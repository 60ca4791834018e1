"""Weights that other people trained, and our own on disk: HF folders, GGUF files, tokenizers, names
per family.

What `__init__.pyi` lists is imported when it is first used: `jaxmodel.data` asks for the images
alone, without JAX.
"""

import lazy_loader

from jaxmodel import moved

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved.attach(__name__)
