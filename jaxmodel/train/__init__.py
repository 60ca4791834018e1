"""Training: a program that is built once, a pure step, and the loop around it.

The names in `__init__.pyi` are imported when they are first used, because the command line shows
`TrainOptions` and must answer at once.
"""

import lazy_loader

from jaxmodel import moved

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved.attach(__name__)
