"""The one image decoder, so that training and prediction see the same pixels of a file."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np

from jaxmodel.errors import InputError, require
from jaxmodel.limits import limits, way

ENDINGS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
# Pillow's names; other formats start programs (EPS) or are rare
FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
)

_MODES = {1: "L", 3: "RGB"}
_said: set[str] = set()
_lock = threading.Lock()


def decode(file: Any, channels: int, called: str) -> np.ndarray:
    """Return the pixels of an image file, turned upright by its orientation tag.

    Transparent parts become white, as on paper. Of an animation the first frame is used. Grey
    images of 16 bits keep them; in grey images of floats 0 is black and 1 is white.

    Args:
      file: opened for reading bytes.
      channels: 3 for colour, 1 for grey.
      called: the file's name in messages.

    Returns:
      `[Y, X]` or `[Y, X, channels]`: uint8, or uint16 if the file has more than 256 levels.

    Raises:
      InputError: not an image of a supported format; damaged; more pixels than `limits` allows; or
        numbers whose black and white are undefined.
    """
    pillow = require("PIL.Image", "data")
    ops = require("PIL.ImageOps", "data")
    try:
        opened = _open(pillow, file)
        allowed = int(limits().pixels)  # a small file can claim any number
        # one line takes memory, too
        if math.prod(opened.size) > allowed or max(opened.size) > allowed // 2**9:
            size = " x ".join(f"{side:,}" for side in opened.size)
            most = f"{allowed:,}, {allowed // 2**9:,} in a direction ({way('pixels')})"
            raise InputError(f"{called} has {size} pixels; allowed: {most}")
        # the further frames of a JPEG are previews
        if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
            _say(
                "frames",
                f"{called} has {opened.n_frames} frames; of all animations only the first frame is "
                "used",
            )
        image = ops.exif_transpose(opened)
        if (levels := _levels(image, opened.format, called)) is not None:
            return levels
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            image = pillow.alpha_composite(pillow.new("RGBA", clear.size, "white"), clear)
        return np.asarray(image.convert(_MODES[channels]))
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds of exceptions
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{called} cannot be decoded: {reason}; allowed: {', '.join(FORMATS)}"
        ) from None


def _open(pillow: Any, file: Any) -> Any:
    """Open an image, reading no more than its header.

    Pillow's own limit, which is sometimes a warning and sometimes an error, is off.
    """
    with _lock:
        usual = pillow.MAX_IMAGE_PIXELS
        pillow.MAX_IMAGE_PIXELS = None
        try:
            return pillow.open(file, formats=FORMATS)
        finally:
            pillow.MAX_IMAGE_PIXELS = usual


def _levels(image: Any, kind: str, called: str) -> np.ndarray | None:
    """Return the pixels of a grey image with more than 256 levels; None for other images."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        raise InputError(
            f"{called} has 32-bit integers, whose white level is unknown; allowed: 8 or 16 bits"
        )
    if image.mode != "F":
        return None
    pixels = np.asarray(image).astype(np.float32)
    low, high = (float(edge(pixels)) for edge in (np.min, np.max))
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"{called} has floating-point values from {low:.6g} to {high:.6g}; allowed: 0 (black) "
            "to 1 (white)"
        )
    return np.round(pixels * np.float32(65535)).astype(np.uint16)


def _say(kind: str, text: str) -> None:
    """Print a line once per process."""
    if kind not in _said:
        _said.add(kind)
        print(f"jaxmodel: {text}", file=sys.stderr, flush=True)
