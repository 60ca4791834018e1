"""Images in a folder with one sub-folder per class, read and decoded on demand."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodel import report
from jaxmodel.data import storage
from jaxmodel.data.cached import cached
from jaxmodel.data.images import strip
from jaxmodel.data.paired import WithUnlabelled
from jaxmodel.data.stream import Batch
from jaxmodel.errors import InputError, at_least, unknown
from jaxmodel.hub.decode import ENDINGS, decode
from jaxmodel.hub.images import ImageProcessor
from jaxmodel.progress import bar
from jaxmodel.report import html
from jaxmodel.report.shown import card

# files that operating systems leave in folders of images
_OF_SYSTEMS = (
    "thumbs.db",
    "desktop.ini",
)


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images in and below `folder/CLASS/`, sorted by name, for the `data` of a `Stream`.

    A label is the index of its class in `names`. Images are decoded by `hub.decode` (upright, with
    white behind transparent parts), scaled to cover `resize` and cropped at the centre. `processor`
    does the same and belongs into the bundle of a model trained on them, as
    `Bundle(model, params, folder.processor, {"labels": names})`. Files that are not images are left
    out, and one line says how many. Hidden files and folders are ignored.

    Attributes:
      folder: a path or a URL.
      resize: rows and columns (Y, X) of all images.
      channels: 3 for colour, 1 for grey.
      classes: the classes in the order of their labels; some may have no image here. For held-out
        data give `names` of the training data. None for the sub-folders, empty ones too, in natural
        order (2 before 10).
      reads: the processor that makes pixels of an image, such as that of a bundle; None for values
        from 0 to 1.

    Raises:
      InputError: a folder without images in sub-folders, or with images of another class; a size
        out of range; when read, a file that is not an image.
    """

    folder: storage.Where
    resize: tuple[int, int]
    channels: int = 3
    classes: Sequence[str] | None = None
    reads: ImageProcessor | None = None

    def __post_init__(self) -> None:
        for side in self.resize:
            at_least("resize", side)
        if self.channels not in (1, 3):
            raise InputError(f"channels: {self.channels} given; allowed: 1, 3")
        if isinstance(self.classes, str) or (
            self.classes is not None and len(set(self.classes)) != len(self.classes)
        ):
            raise InputError(
                f"classes: {self.classes!r} given; allowed: a list of names, each once"
            )
        if not self.paths:
            raise InputError(
                f"images: {str(self.folder)!r} has no images; allowed: "
                f"CLASS/NAME{', '.join(ENDINGS)} below it"
            )
        places = set(self.names)
        for path in self.paths:
            if (name := path.split("/")[0]) not in places:
                raise unknown("classes", name, self.names)
        if left := self._left_out():
            print(f"jaxmodel: images: {str(self.folder)!r}: {left}", file=sys.stderr, flush=True)

    def __repr__(self) -> str:
        size = " x ".join(map(str, (*self.resize, self.channels)))
        return (
            f"ImageFolder({str(self.folder)!r}, {len(self):,} images of {len(self.names)} "
            f"classes, as {size})"
        )

    def _repr_html_(self) -> str:
        counts = np.bincount(self.labels, minlength=len(self.names))
        rows = [
            {"class": name, "label": i, "images": int(n)}
            for i, (name, n) in enumerate(zip(self.names, counts, strict=True))
        ]
        first = np.unique(self.labels, return_index=True)[1][:12]
        sections = [
            html.table(rows[:30], [report.Column(name) for name in ("class", "label", "images")])
        ]
        with contextlib.suppress(InputError, OSError):  # a file that is damaged, or gone
            shown = self.take(first)
            sections = [strip(shown["pixels"], [self.names[i] for i in shown["labels"]]), *sections]
        return card(repr(self), {}, sections)

    @cached_property
    def _below(self) -> list[str]:
        return storage.below(self.folder)

    @cached_property
    def paths(self) -> list[str]:
        """Return the files relative to the folder: CLASS/NAME or CLASS/FOLDER/NAME, sorted."""
        return [path for path in self._below if "/" in path and path.lower().endswith(ENDINGS)]

    @cached_property
    def names(self) -> list[str]:
        """Return the classes in the order of their labels."""
        if self.classes is not None:
            return list(self.classes)
        found = {path.split("/")[0] for path in self._below if "/" in path}
        if not storage.is_remote(self.folder):
            found |= {
                entry.name
                for entry in os.scandir(Path(str(self.folder)))
                if entry.is_dir() and entry.name[0] != "."
            }
        return sorted(found, key=_natural)

    @cached_property
    def labels(self) -> np.ndarray:
        """Return the class of each image, int32 [N]."""
        places = {name: i for i, name in enumerate(self.names)}
        return np.array([places[path.split("/")[0]] for path in self.paths], np.int32)

    @cached_property
    def processor(self) -> ImageProcessor:
        """Return the processor that makes the same pixels of an image as `take`, for a bundle."""
        if self.reads is not None:
            return self.reads
        rows, columns = self.resize
        # for a square give the shorter side, which other programs read too
        size = rows if rows == columns else "cover"
        return ImageProcessor(
            size=size, crop=self.resize, mean=(0.0,) * self.channels, std=(1.0,) * self.channels
        )

    @cached
    def fingerprint(self) -> str:
        """Return the SHA-256 of sizes, classes, names and digests of all files, which it reads."""
        digest = hashlib.sha256(
            f"image folder 2 {self.resize} {self.channels} {self.names}\n".encode()
        )
        if self.reads is not None:
            digest.update(f"{self.reads}\n".encode())
        with bar(len(self), "digest images") as job:
            for path in self.paths:
                own = storage.sha256(storage.join(self.folder, path))
                digest.update(f"{path} {own}\n".encode())
                job.advance()
        return digest.hexdigest()

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.paths)

    def take(self, indices: np.ndarray) -> Batch:
        """Return the images with these indices.

        Returns:
          `pixels` float32 [n, Y, X, C] from 0 to 1 and `labels` int32 [n].
        """
        pixels = np.empty((len(indices), *self.resize, self.channels), np.float32)
        for i, index in enumerate(indices):
            path = storage.join(self.folder, self.paths[index])
            with storage.reading(path, unpack=False) as file:
                pixels[i] = self.processor([decode(file, self.channels, f"images: {path!r}")])[0]
        return {"pixels": pixels, "labels": self.labels[indices]}

    def _left_out(self) -> str:
        """Describe in a line the files in the folders of classes that are not images."""
        kinds: collections.Counter[str] = collections.Counter()
        taken = set(self.paths)
        for path in self._below:
            name = path.rpartition("/")[2]
            if path not in taken and name.lower() not in _OF_SYSTEMS:
                ending = os.path.splitext(name)[1].lower()
                kinds[
                    "outside of a class's folder"
                    if "/" not in path
                    else ending or "without an ending"
                ] += 1
        some = {path.split("/")[0] for path in self.paths}
        empty = [name for name in self.names if name not in some]
        parts = (
            [
                f"{kinds.total()} files left out "
                f"({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})"
            ]
            if kinds
            else []
        )
        return "; ".join(
            parts + ([f"no image of the class {', '.join(map(repr, empty))}"] if empty else [])
        )


def same_classes(stream: Any, heldout: Any) -> None:
    """Refuse image folders of two streams whose labels mean different classes.

    Raises:
      InputError: the names of their classes differ.
    """
    first: list[str] | None = None
    for names in (*_names(stream), *_names(heldout)):
        first = first or names
        if names != first:
            raise InputError(
                f"classes: one folder of images has {_short(names)}, another {_short(first)}, so "
                f"labels would mean different "
                "classes; make the second with ImageFolder(..., classes=first.names)"
            )


def _names(batches: Any) -> list[list[str]]:
    """Return the classes of each image folder behind a stream, a mixture or a pair of streams."""
    inner = [stream for stream, _ in getattr(batches, "components", ())]
    # the labels of the unlabelled stream do not count
    inner += [batches.stream] if isinstance(batches, WithUnlabelled) else []
    folder = getattr(batches, "data", None)
    return (
        [folder.names]
        if isinstance(folder, ImageFolder)
        else [names for one in inner for names in _names(one)]
    )


def _short(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _natural(name: str) -> tuple[Any, ...]:
    """Return a sort key by which `2` comes before `10`, and `a2` before `a10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name
