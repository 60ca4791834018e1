"""Training: a program that is built once, a pure step, and the loop around it.

What `__init__.pyi` lists is imported when it is first used: the command line shows `TrainOptions`
and must answer at once.
"""

import lazy_loader

from jaxmodel import moved

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved.attach(__name__)
