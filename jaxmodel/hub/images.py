"""Images to a model's input pixels: preprocessor_config.json of an HF folder as a pure function."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxmodel import schema
from jaxmodel.errors import InputError, one_of
from jaxmodel.hub.schemas import Images, Processor
from jaxmodel.limits import limits, way

FILE = "preprocessor_config.json"
_AT_ONCE = 2**22  # 64-bit numbers of the piece of an image that is resized at a time
_FILTERS = {2: "bilinear", 3: "bicubic"}  # values of `resample`, from Pillow


class _Kind(NamedTuple):
    """The defaults of a kind of image processor.

    Attributes:
      resample: the filter.
      crop: whether images are cropped.
      short: whether a single number is the length of the shorter side.
      mean: of each channel.
      std: of each channel.
    """

    resample: int
    crop: bool
    short: bool
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


_OF_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_KINDS = {
    "ViT": _Kind(2, False, False),
    "CLIP": _Kind(3, True, True, *_OF_CLIP),
    "Bit": _Kind(3, True, True, *_OF_CLIP),  # DINOv2's
    "Siglip": _Kind(3, False, True),
}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, scale, and `(x - mean) / std`, in this order; each step may be off.

    The model reads as many channels as `mean` has: `mean=(0.5,)` makes grey images. A model must be
    given images like those it was trained on: `data.ImageFolder(...).processor` is the processor of
    a folder of images.

    Attributes:
      size: (height, width) of the resized image; or the length of its shorter side; or "cover" for
        the smallest size, with the image's proportions, that contains the crop; None for no
        resizing.
      crop: (height, width) of the central part that is kept; None for no crop.
      filter: of the resizing, "bilinear" or "bicubic"; a reduction averages over the area that a
        new pixel covers.
      scale: factor of pixels of 0 to 255.
      mean: of each channel.
      std: of each channel.
    """

    size: tuple[int, int] | int | Literal["cover"] | None
    crop: tuple[int, int] | None = None
    filter: str = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if isinstance(self.size, str) and (self.size != "cover" or self.crop is None):
            raise InputError(
                f"size: {self.size!r} given; allowed: lengths, None, or 'cover' with a crop"
            )
        one_of("filter", self.filter, _FILTERS.values())
        if len(self.mean) != len(self.std) or not self.mean or 0 in self.std:
            raise InputError(
                f"std: {self.std} given for a mean of {self.mean}; allowed: one number for each "
                "channel, not 0"
            )

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return the pixels `[B, Y, X, C]`, float32, of images `[Y, X]` or `[Y, X, C]` of any size.

        Images are uint8, or uint16, where 65535 is white and counts as 255. A grey image becomes
        three equal channels, and a fourth channel (alpha) is dropped.

        Raises:
          InputError: an image of another shape or dtype or smaller than the crop, or images of
            different sizes without resizing.
        """
        out = [self._one(np.asarray(image)) for image in images]
        if len({image.shape for image in out}) > 1:
            raise InputError(
                f"images: sizes {sorted({image.shape[:2] for image in out})}; allowed: one size "
                "for all, or an ImageProcessor with a size"
            )
        return np.stack(out) if out else np.zeros((0, 0, 0, len(self.mean)), np.float32)

    def _one(self, image: np.ndarray) -> np.ndarray:
        channels = len(self.mean)
        image = image[..., None] if image.ndim == 2 else image
        known = image.dtype in (np.uint8, np.uint16)
        if (
            not known
            or image.ndim != 3
            or image.shape[-1] not in (1, channels, channels + 1)
            or not image.size
        ):
            raise InputError(
                f"images: {image.dtype} {list(image.shape)} given; allowed: uint8 or uint16 [Y, "
                f"X] or [Y, X, {channels}]"
            )
        image = image.astype(np.float32) / np.float32(257) if image.dtype == np.uint16 else image
        image = (
            np.broadcast_to(image, (*image.shape[:2], channels))
            if image.shape[-1] == 1
            else image[..., :channels]
        )
        if self.size is not None:
            image = resize(
                image, _target(self.size, self.crop, image.shape[0], image.shape[1]), self.filter
            )
        if self.crop is not None:
            room = [have - keep for have, keep in zip(image.shape[:2], self.crop, strict=True)]
            if min(room) < 0:
                raise InputError(
                    f"images: {list(image.shape[:2])} pixels, from which {list(self.crop)} cannot "
                    f"be cropped"
                )
            top = room[0] // 2
            left = room[1] // 2
            image = image[top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return (image.astype(np.float32) * np.float32(self.scale) - mean) / std

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, as transformers and `from_folder` read it."""
        size = (
            dict(zip(("height", "width"), self.size, strict=True))
            if isinstance(self.size, tuple)
            else self.size
        )
        size = (
            {"shortest_edge": size}
            if isinstance(size, int)
            else {"cover": True}
            if size == "cover"
            else size
        )
        config = {
            "image_processor_type": "CLIPImageProcessor" if self.crop else "ViTImageProcessor",
            "do_resize": size is not None,
            "size": size,
            "resample": next(number for number, name in _FILTERS.items() if name == self.filter),
            "do_center_crop": self.crop is not None,
            "crop_size": None
            if self.crop is None
            else dict(zip(("height", "width"), self.crop, strict=True)),
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        text = json.dumps(
            {key: value for key, value in config.items() if value is not None}, indent=2
        )
        (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def from_folder(folder: str | Path) -> ImageProcessor | None:
    """Return the image processor of a folder in HF layout; None if it has none.

    Raises:
      InputError: the file is invalid.
    """
    path = Path(folder) / FILE
    if path.exists():
        hf = schema.read(path, Images)
    else:  # transformers 5 keeps it together with the model's other processors
        path = Path(folder) / "processor_config.json"
        hf = schema.read(path, Processor, missing=True).get("image_processor")
    if hf is None:
        return None
    named = str(
        hf.get("image_processor_type", hf.get("feature_extractor_type", "ViTImageProcessor"))
    )
    found = re.fullmatch(
        rf"({'|'.join(_KINDS)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)", named
    )
    if found is None:  # other kinds crop, pad and scale differently
        raise InputError(
            f"{path}: the image processor {named!r} is not supported; allowed: those of "
            f"{', '.join(_KINDS)}"
        )
    kind = _KINDS[found[1]]
    resample = hf.get("resample", kind.resample)
    if resample not in _FILTERS:
        raise InputError(
            f"{path}: resample is {resample!r}; allowed: "
            f"{', '.join(f'{n} ({f})' for n, f in _FILTERS.items())}"
        )
    plain = not hf.get("do_normalize", True)
    try:
        crops = hf.get("do_center_crop", kind.crop)
        return ImageProcessor(
            size=_size(hf.get("size", 224), short=crops or kind.short)
            if hf.get("do_resize", True)
            else None,
            crop=_pair(hf.get("crop_size", 224)) if crops else None,
            filter=_FILTERS[resample],
            scale=float(hf.get("rescale_factor", 1 / 255)) if hf.get("do_rescale", True) else 1.0,
            mean=(0.0,) * 3 if plain else tuple(map(float, hf.get("image_mean", kind.mean))),
            std=(1.0,) * 3 if plain else tuple(map(float, hf.get("image_std", kind.std))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: a value is missing or has the wrong type: {' '.join(str(error).split())}"
        ) from None


def _size(size: Any, short: bool) -> tuple[int, int] | int | Literal["cover"]:
    """Return `size` of the file.

    A single number is the shorter side where a crop follows, and otherwise a square (older files).
    """
    if isinstance(size, Mapping) and size.get(
        "cover"
    ):  # ours only: other programs have no such size
        return "cover"
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"])
    return int(size) if short and isinstance(size, int) else _pair(size)


def _pair(size: Any) -> tuple[int, int]:
    return (
        (int(size["height"]), int(size["width"]))
        if isinstance(size, Mapping)
        else (int(size), int(size))
    )


def _target(
    size: tuple[int, int] | int | Literal["cover"],
    crop: tuple[int, int] | None,
    height: int,
    width: int,
) -> tuple[int, int]:
    if isinstance(size, tuple):
        return size
    if isinstance(size, str):
        rows, columns = crop or (1, 1)
        down = height * columns <= width * rows  # the rows decide
        return (rows, rows * width // height) if down else (columns * height // width, columns)
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize(image: np.ndarray, size: tuple[int, int], filter: str = "bilinear") -> np.ndarray:
    """Resize an image `[Y, X, C]` as Pillow does: columns, then rows; uint8 is rounded each time.

    Args:
      image: to be resized.
      size: (height, width).
      filter: "bilinear" or "bicubic".

    Raises:
      InputError: more pixels than `limits` allows, or a change of size that takes too much work.
    """
    if (
        max(math.prod(size), *(old * new for old, new in zip(image.shape, size, strict=False)))
        > limits().pixels
    ):
        old, new = (" x ".join(f"{side:,}" for side in sides[:2]) for sides in (image.shape, size))
        raise InputError(
            f"images: {old} pixels would become {new}; allowed: {limits().pixels:,.0f}, also for "
            f"old times new in one direction ({way('pixels')})"
        )
    for axis, length in ((1, size[1]), (0, size[0])):
        if image.shape[axis] != length:
            weights = _weights(image.shape[axis], length, filter)
            moved = np.moveaxis(image, axis, 0)
            made = np.empty((length, *moved.shape[1:]), image.dtype)
            for i in range(
                0, moved.shape[1], lines := max(1, _AT_ONCE // max(moved[:, :1].size, 1))
            ):
                mixed = np.tensordot(weights, moved[:, i : i + lines].astype(np.float64), 1)
                if image.dtype == np.uint8:
                    # round to the nearest level, half up, as Pillow does
                    mixed = np.floor(mixed + 0.5)
                made[:, i : i + lines] = np.clip(mixed, 0, 255)
            image = np.moveaxis(made, 0, axis)
    return image


@functools.lru_cache(16)
def _weights(before: int, after: int, filter: str) -> np.ndarray:
    """Return `[after, before]`: the weight of each old pixel in each new one; rows sum to one."""
    ratio = before / after
    stretch = max(ratio, 1.0)  # a reducing filter covers the whole area of a new pixel
    reach = stretch * (1.0 if filter == "bilinear" else 2.0)
    weights = np.zeros((after, before))
    for i in range(after):
        center = (i + 0.5) * ratio
        first = max(int(center - reach + 0.5), 0)
        last = min(int(center + reach + 0.5), before)
        distance = np.abs((np.arange(first, last) + 0.5 - center) / stretch)
        row = _linear(distance) if filter == "bilinear" else _cubic(distance)
        weights[i, first:last] = row / math.fsum(row)
    return weights


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Compute the cubic convolution (Keys, 1981)."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
