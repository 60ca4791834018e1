"""Folders of images: classes from names, pixels as Pillow has them, read when they are needed."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from jaxmodel.data import ImageFolder, Stream
from jaxmodel.errors import InputError

rng = np.random.default_rng(0)
COLOURS = rng.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
NAMES = ["cats/b.png", "cats/a.bmp", "dogs/c.png", "ants/z.PNG", "cats/d.png", "dogs/a.bmp"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, pixels in zip(NAMES, COLOURS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    (tmp_path / "cats" / "._a.png").write_text("what a file system left")
    (tmp_path / "README.md").write_text("no class")
    return tmp_path


def test_images_and_labels(folder: Path) -> None:
    images = ImageFolder(str(folder), resize=(5, 7))
    assert images.names == ["ants", "cats", "dogs"] and len(images) == 6
    assert images.paths == sorted(NAMES)
    order = np.array([NAMES.index(name) for name in sorted(NAMES)])
    found = images.take(np.arange(6))
    assert found["labels"].tolist() == [0, 1, 1, 1, 2, 2] and found["labels"].dtype == np.int32
    assert found["pixels"].dtype == np.float32 and np.array_equal(found["pixels"] * 255, COLOURS[order].astype(np.float32))
    some = images.take(np.array([4, 0, 4]))
    assert all(np.array_equal(some[name], found[name][[4, 0, 4]]) for name in found)


def test_scaled_images_keep_their_proportions(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 3:9, 0] = 255  # what stands in the middle stays, both ends go
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    pixels = ImageFolder(str(tmp_path), (2, 2)).take(np.arange(1))["pixels"][0]
    assert pixels.shape == (2, 2, 3) and (pixels[..., 0] == 1).all() and not pixels[..., 1:].any()
    small = ImageFolder(str(tmp_path), (8, 24)).take(np.arange(1))["pixels"][0]
    wanted = Image.fromarray(wide).resize((24, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(small * 255, np.asarray(wanted, np.float32))


def test_grey_and_turned_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    turned = Image.fromarray(grey)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    turned.save(tmp_path / "a" / "1.png", exif=exif)
    Image.fromarray(grey).save(tmp_path / "a" / "2.png")
    upright = ImageFolder(str(tmp_path), (4, 3), 1).take(np.array([0]))["pixels"]
    assert np.array_equal(upright[0, ..., 0] * 255, np.rot90(grey, -1))
    three = ImageFolder(str(tmp_path), (3, 4)).take(np.array([1]))["pixels"][0] * 255
    assert np.array_equal(three, np.repeat(grey[..., None], 3, axis=-1))


def test_behind_a_url(folder: Path, memory: str) -> None:
    for name in NAMES:
        fsspec.filesystem("memory").pipe_file(f"{memory}/{name}", (folder / name).read_bytes())
    here, there = ImageFolder(str(folder), (4, 4)), ImageFolder(memory, (4, 4))
    assert there.fingerprint == here.fingerprint and there.names == here.names
    left, right = (Stream(images, 4, 1).batch(3) for images in (here, there))
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_the_fingerprint_is_that_of_names_and_bytes(folder: Path) -> None:
    first = ImageFolder(str(folder), (4, 4)).fingerprint
    assert ImageFolder(str(folder), (4, 4)).fingerprint == first
    prints = {first, ImageFolder(str(folder), (4, 5)).fingerprint, ImageFolder(str(folder), (4, 4), 1).fingerprint}
    (folder / "ants" / "z.PNG").rename(folder / "ants" / "y.png")
    prints.add(ImageFolder(str(folder), (4, 4)).fingerprint)
    Image.fromarray(COLOURS[0]).save(folder / "ants" / "y.png")
    prints.add(ImageFolder(str(folder), (4, 4)).fingerprint)
    (folder / "dogs" / "c.png").unlink()
    prints.add(ImageFolder(str(folder), (4, 4)).fingerprint)
    assert len(prints) == 6


def test_bad_input(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    images = ImageFolder(str(folder), (4, 4))
    (folder / "ants" / "z.PNG").write_bytes(b"rubbish")
    (folder / "cats" / "a.bmp").write_bytes((folder / "cats" / "a.bmp").read_bytes()[:60])
    (folder / "cats" / "b.png").write_bytes((folder / "cats" / "b.png").read_bytes()[:-40])
    (folder / "cats" / "d.png").unlink()
    for call, message in [
        (lambda: ImageFolder(str(empty), (4, 4)), "images: .*' has no images; CLASS/NAME.png, .jpg, .jpeg, .bmp below it"),
        (lambda: ImageFolder(str(empty / "none"), (4, 4)), "none' has no images"),
        (lambda: ImageFolder(str(folder), (0, 4)), "resize: 0 given"),
        (lambda: ImageFolder(str(folder), (4, 4), 4), "channels: 4 given; allowed: 1, 3"),
        (lambda: images.take(np.array([0])), "images: .*z.PNG' cannot be decoded: cannot identify image file"),
        (lambda: images.take(np.array([1])), "images: .*a.bmp' cannot be decoded: "),
        (lambda: images.take(np.array([2])), "images: .*b.png' cannot be decoded: "),
        (lambda: images.take(np.array([3])), "data: .*d.png' cannot be read or written: No such file"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
