"""Batches of training data as pure functions of (seed, step), from texts, images or arrays.

Text: load it, cut it into windows or pack its documents into bins, and make a `Stream`. Images:
load them with their labels and stream their rows. `SyntheticSeq2Seq` makes pairs of texts. Larger
than memory: `documents` reads any format from anywhere, `tokenize` writes `Shards` once,
`PackedShards` and `ShardWindows` read rows of them, and `ImageFolder` reads rows of files.
`answers` makes rows of chats and of prompts with completions, `labelled` of texts with labels.
`Mixture` mixes streams, and `WithUnlabelled` puts unlabelled rows beside labelled ones.

>>> import numpy as np
>>> stream = Stream(windows(range(100), length=9, stride=8), batch_size=4, seed=0)
>>> batch = stream.batch(step=7)
>>> batch["tokens"].shape, bool(np.all(batch["targets"] == batch["tokens"] + 1))
((4, 8), True)
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxmodel import moved
from jaxmodel.data.examples import answers, labelled
from jaxmodel.data.image_folder import ImageFolder
from jaxmodel.data.images import load_images
from jaxmodel.data.mixture import Mixture
from jaxmodel.data.pack import pack, windows
from jaxmodel.data.packed_shards import PackedShards
from jaxmodel.data.paired import WithUnlabelled
from jaxmodel.data.shards import Shards, tokenize
from jaxmodel.data.sources import documents
from jaxmodel.data.splits import kfold, split, subset
from jaxmodel.data.stream import Batches, Rows, Shifted, Stream, prefetch
from jaxmodel.data.synthetic import SyntheticSeq2Seq
from jaxmodel.data.text import load_text, split_documents

__all__ = [
    "Batches",
    "ImageFolder",
    "Mixture",
    "PackedShards",
    "Rows",
    "Shards",
    "Shifted",
    "Stream",
    "SyntheticSeq2Seq",
    "WithUnlabelled",
    "answers",
    "documents",
    "kfold",
    "labelled",
    "load_images",
    "load_text",
    "pack",
    "prefetch",
    "split",
    "split_documents",
    "subset",
    "tokenize",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name == "augment":  # late: it imports jax
        return importlib.import_module("jaxmodel.data.augment")
    raise AttributeError(f"module 'jaxmodel.data' has no attribute {name!r}")


moved.attach(__name__)
