"""Images in a folder with a sub-folder for each class, read and decoded when they are needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxmodel.data import files
from jaxmodel.data.stream import Batch
from jaxmodel.errors import InputError, at_least, require
from jaxmodel.report import bar

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images `folder/CLASS/*.png|jpg|jpeg|bmp`, in the order of their names; what `Stream` takes for `data`.

    A label is the place of its class in `names`. Images are turned upright as their camera says, scaled so that they cover
    `resize`, and what stands over is cut off at both ends.

    Attributes:
      folder: a path or a URL.
      resize: rows and columns (Y, X) of all images.
      channels: 3 for colour, 1 for grey.

    Raises:
      InputError: a folder without images in sub-folders, a size out of range; when read, a file that is no image.
    """

    folder: files.Where
    resize: tuple[int, int]
    channels: int = 3

    def __post_init__(self) -> None:
        for side in self.resize:
            at_least("resize", side)
        if self.channels not in _MODES:
            raise InputError(f"channels: {self.channels} given; allowed: 1, 3")
        if not self.paths:
            raise InputError(f"images: {str(self.folder)!r} has no images; CLASS/NAME{', '.join(ENDINGS)} below it are needed")

    @cached_property
    def paths(self) -> list[str]:
        """The files, from the folder: CLASS/NAME, sorted."""
        return [path for path in files.below(self.folder) if path.count("/") == 1 and path.lower().endswith(ENDINGS)]

    @cached_property
    def names(self) -> list[str]:
        """The classes: names of sub-folders that hold an image, sorted."""
        return sorted({path.split("/")[0] for path in self.paths})

    @cached_property
    def labels(self) -> np.ndarray:
        """The class int32 [N] of each image."""
        places = {name: i for i, name in enumerate(self.names)}
        return np.array([places[path.split("/")[0]] for path in self.paths], np.int32)

    @property
    def fingerprint(self) -> str:
        """sha256 of sizes, names and the digests of all files, which are read for it."""
        return self._fingerprint  # pyright takes no cached property for that of a protocol

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"image folder 1 {self.resize} {self.channels}\n".encode())
        with bar(len(self), "digest images") as job:
            for path in self.paths:
                digest.update(f"{path} {files.sha256(files.join(self.folder, path))}\n".encode())
                job.advance()
        return digest.hexdigest()

    def __len__(self) -> int:
        """The number of images N."""
        return len(self.paths)

    def take(self, indices: np.ndarray) -> Batch:
        """`pixels` float32 [n, Y, X, C] from 0 to 1 and `labels` int32 [n] of the images of these numbers."""
        pixels = np.empty((len(indices), *self.resize, self.channels), np.float32)
        for i, index in enumerate(indices):
            pixels[i] = self._decode(files.join(self.folder, self.paths[index]))
        return {"pixels": pixels, "labels": self.labels[indices]}

    def _decode(self, path: str) -> np.ndarray:
        images, ops = require("PIL.Image", "data"), require("PIL.ImageOps", "data")
        with files.reading(path, unpack=False) as file:
            try:
                image = ops.exif_transpose(images.open(file)).convert(_MODES[self.channels])
            except (OSError, ValueError, SyntaxError, images.DecompressionBombError) as error:
                reason = str(error).partition("\n")[0]
                raise InputError(f"images: {path!r} cannot be decoded: {reason}; a PNG, JPEG or BMP file is needed") from None
        fitted = ops.fit(image, self.resize[::-1], images.Resampling.BILINEAR)
        return np.asarray(fitted, np.float32).reshape(*self.resize, self.channels) / np.float32(255)
