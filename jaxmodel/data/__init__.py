"""Text to batches: load a text, cut it into windows or pack its documents into bins, stream batches of (seed, step).
Images to batches: load them with their labels, stream their rows. Pairs of texts are made as they are needed.

>>> import numpy as np
>>> stream = Stream(windows(range(100), length=9, stride=8), batch_size=4, seed=0)
>>> batch = stream.batch(step=7)
>>> batch["tokens"].shape, bool(np.all(batch["targets"] == batch["tokens"] + 1))
((4, 8), True)
"""

from jaxmodel.data.images import Images, load_images
from jaxmodel.data.pack import Bins, pack, windows
from jaxmodel.data.stream import Batches, Stream, prefetch
from jaxmodel.data.synthetic import Pairs
from jaxmodel.data.text import NAMES, Text, load_text, split_documents

__all__ = [
    "NAMES",
    "Batches",
    "Bins",
    "Images",
    "Pairs",
    "Stream",
    "Text",
    "load_images",
    "load_text",
    "pack",
    "prefetch",
    "split_documents",
    "windows",
]
