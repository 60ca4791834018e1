"""Folders of images: classes from names, pixels as Pillow has them, read when they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from jaxmodel import losses, train
from jaxmodel.data import ImageFolder, Mixture, Stream
from jaxmodel.errors import InputError
from jaxmodel.hub import decode as hub_decode
from jaxmodel.hub.decode import decode
from jaxmodel.hub.images import from_folder
from jaxmodel.models import lenet

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
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.fromarray(COLOURS[0]).save(tmp_path / ".ipynb_checkpoints" / "a.png")
    return tmp_path


def save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def one(path: Path, resize: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    """The only image below a folder, as training sees it; and `jaxmodel predict`, by the folder's
    processor, sees the same.
    """
    images = ImageFolder(str(path), resize, channels)
    pixels = images.take(np.array([0]))["pixels"]
    with open(path / images.paths[0], "rb") as file:
        np.testing.assert_array_equal(images.processor([decode(file, channels, "x")]), pixels)
    return pixels[0]


def test_images_and_labels(folder: Path) -> None:
    images = ImageFolder(str(folder), resize=(5, 7))
    assert images.names == ["ants", "cats", "dogs"] and len(images) == 6
    assert images.paths == sorted(NAMES)
    order = np.array([NAMES.index(name) for name in sorted(NAMES)])
    found = images.take(np.arange(6))
    assert found["labels"].tolist() == [0, 1, 1, 1, 2, 2] and found["labels"].dtype == np.int32
    assert found["pixels"].dtype == np.float32 and np.allclose(
        found["pixels"] * 255, COLOURS[order], atol=1e-4
    )
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
    np.testing.assert_allclose(small * 255, np.asarray(wanted), atol=1e-4)


def test_grey_and_turned_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    turned = Image.fromarray(grey)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    turned.save(tmp_path / "a" / "1.png", exif=exif)
    Image.fromarray(grey).save(tmp_path / "a" / "2.png")
    upright = ImageFolder(str(tmp_path), (4, 3), 1).take(np.array([0]))["pixels"]
    np.testing.assert_allclose(upright[0, ..., 0] * 255, np.rot90(grey, -1), atol=1e-4)
    three = ImageFolder(str(tmp_path), (3, 4)).take(np.array([1]))["pixels"][0] * 255
    np.testing.assert_allclose(three, np.repeat(grey[..., None], 3, axis=-1), atol=1e-4)


def test_behind_a_url(folder: Path, memory: str) -> None:
    for name in NAMES:
        fsspec.filesystem("memory").pipe_file(f"{memory}/{name}", (folder / name).read_bytes())
    here = ImageFolder(str(folder), (4, 4))
    there = ImageFolder(memory, (4, 4))
    assert there.fingerprint == here.fingerprint and there.names == here.names
    left, right = (Stream(images, 4, 1).batch(3) for images in (here, there))
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_the_fingerprint_is_that_of_names_and_bytes(folder: Path) -> None:
    first = ImageFolder(str(folder), (4, 4)).fingerprint
    assert ImageFolder(str(folder), (4, 4)).fingerprint == first
    prints = {
        first,
        ImageFolder(str(folder), (4, 5)).fingerprint,
        ImageFolder(str(folder), (4, 4), 1).fingerprint,
    }
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
        (
            lambda: ImageFolder(str(empty), (4, 4)),
            "images: .*' has no images; allowed: CLASS/NAME.png, .jpg, .* below it",
        ),
        (lambda: ImageFolder(str(empty / "none"), (4, 4)), "none' has no images"),
        (lambda: ImageFolder(str(folder), (0, 4)), "resize: 0 given"),
        (lambda: ImageFolder(str(folder), (4, 4), 4), "channels: 4 given; allowed: 1, 3"),
        (
            lambda: images.take(np.array([0])),
            "images: .*z.PNG' cannot be decoded: cannot identify image file",
        ),
        (lambda: images.take(np.array([1])), "images: .*a.bmp' cannot be decoded: "),
        (lambda: images.take(np.array([2])), "images: .*b.png' cannot be decoded: "),
        (
            lambda: images.take(np.array([3])),
            "data: .*d.png' cannot be read or written: No such file",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()


# ----------------------------------------------------------------------------------- kinds of files

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_keep_their_levels(kind: str, tmp_path: Path) -> None:
    save(Image.fromarray(RAMP), tmp_path / "a" / f"1.{kind}")
    grey = one(tmp_path, channels=1)
    np.testing.assert_allclose(grey[..., 0], RAMP / 65535, atol=1e-6)
    np.testing.assert_allclose(one(tmp_path), np.repeat(RAMP[..., None], 3, -1) / 65535, atol=1e-6)
    small = one(tmp_path, (4, 4), 1)  # no level is lost in between
    wanted = Image.fromarray((RAMP / 65535).astype(np.float32)).resize(
        (4, 4), Image.Resampling.BILINEAR
    )
    np.testing.assert_allclose(small[..., 0], np.asarray(wanted), atol=1e-5)


def test_floating_numbers_are_read_where_black_and_white_are_known(tmp_path: Path) -> None:
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    save(Image.fromarray(levels), tmp_path / "ok" / "a" / "1.tiff")
    np.testing.assert_allclose(one(tmp_path / "ok", channels=1)[..., 0], levels, atol=1e-5)
    for i, wrong in enumerate((levels * 255, levels - 0.5, np.full((8, 8), np.nan, np.float32))):
        save(Image.fromarray(wrong), tmp_path / str(i) / "a" / "1.tiff")
        with pytest.raises(
            InputError, match="1.tiff' has floating-point values from .*; allowed: 0 .black. to 1"
        ):
            one(tmp_path / str(i))
    save(Image.fromarray(np.full((8, 8), 70000, np.int32)), tmp_path / "long" / "a" / "1.tif")
    with pytest.raises(InputError, match="32-bit integers"):
        one(tmp_path / "long")


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    pixels = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[:4, :, 3] = 0  # colours that nobody sees
    wanted = pixels[..., :3] / 255 * (pixels[..., 3:] / 255) + 1 - pixels[..., 3:] / 255
    save(Image.fromarray(pixels), tmp_path / "rgba" / "a" / "1.png")
    save(Image.fromarray(pixels), tmp_path / "webp" / "a" / "1.webp", lossless=True, exact=True)
    for name in ("rgba", "webp"):
        np.testing.assert_allclose(one(tmp_path / name), wanted, atol=0.01)
    grey = Image.fromarray(pixels[..., [0, 3]], "LA")
    save(grey, tmp_path / "la" / "a" / "1.png")
    shade = pixels[..., 0] / 255 * (pixels[..., 3] / 255) + 1 - pixels[..., 3] / 255
    np.testing.assert_allclose(one(tmp_path / "la", channels=1)[..., 0], shade, atol=0.01)
    palette = Image.fromarray(np.tile(np.array([[0, 1], [1, 0]], np.uint8), (4, 4)), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    save(palette, tmp_path / "p" / "a" / "1.png", transparency=0)
    found = one(tmp_path / "p")
    np.testing.assert_allclose(found[0, 0] * 255, 255)
    np.testing.assert_allclose(found[0, 1] * 255, [200, 100, 0], atol=1e-3)
    save(palette, tmp_path / "gif" / "a" / "1.gif")
    np.testing.assert_allclose(one(tmp_path / "gif")[0, 0] * 255, [10, 20, 30], atol=1e-3)


def test_other_modes(tmp_path: Path) -> None:
    bits = rng.integers(0, 2, (8, 8)).astype(bool)
    save(Image.fromarray(bits), tmp_path / "bits" / "a" / "1.png")
    np.testing.assert_array_equal(one(tmp_path / "bits", channels=1)[..., 0], bits)
    inks = np.full((8, 8, 4), [255, 0, 0, 0], np.uint8)
    save(Image.fromarray(inks, "CMYK"), tmp_path / "inks" / "a" / "1.tif")
    np.testing.assert_allclose(one(tmp_path / "inks")[0, 0], [0, 1, 1], atol=0.01)  # cyan
    save(Image.fromarray(inks, "CMYK"), tmp_path / "jpeg" / "a" / "1.jpg")
    np.testing.assert_allclose(one(tmp_path / "jpeg")[0, 0], [0, 1, 1], atol=0.05)


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.fromarray(np.full((8, 8), shade, np.uint8)) for shade in (10, 200)]
    for ending in ("gif", "png"):
        save(
            frames[0],
            tmp_path / ending / "a" / f"1.{ending}",
            save_all=True,
            append_images=frames[1:],
        )
    hub_decode._said.clear()
    for ending in ("gif", "png"):
        np.testing.assert_allclose(one(tmp_path / ending, channels=1) * 255, 10)
    said = capsys.readouterr().err
    assert said.count("has 2 frames; of all animations only the first frame is used") == 1


def test_what_is_left_out_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Image.fromarray(COLOURS[0]), folder / "dogs" / "young" / "e.webp", lossless=True)
    save(Image.fromarray(COLOURS[0]), folder / "stray.png")
    (folder / "cats" / "raw.heic").write_bytes(b"?")
    (folder / "cats" / "Thumbs.db").write_bytes(b"?")
    (folder / "emus").mkdir()
    capsys.readouterr()
    images = ImageFolder(str(folder), (4, 4))
    assert (
        images.names == ["ants", "cats", "dogs", "emus"] and images.paths[-1] == "dogs/young/e.webp"
    )
    assert images.labels.tolist() == [0, 1, 1, 1, 2, 2, 2]
    left = (
        "4 files left out (1 .heic, 1 .txt, 2 outside of a class's folder); no image of the "
        "class 'emus'"
    )
    assert capsys.readouterr().err == f"jaxmodel: images: {str(folder)!r}: {left}\n"


# ------------------------------------------------------------------------------- classes and labels


def test_numbers_are_in_their_order(tmp_path: Path) -> None:
    for name in ("10", "2", "1", "a10", "a9", "b"):
        save(Image.fromarray(COLOURS[0]), tmp_path / name / "1.png")
    images = ImageFolder(str(tmp_path), (4, 4))
    assert images.names == ["1", "2", "10", "a9", "a10", "b"]
    assert [images.names[i] for i in images.labels] == [path.split("/")[0] for path in images.paths]


def test_a_class_without_images_keeps_its_label(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("heldout")
    save(Image.fromarray(COLOURS[0]), other / "dogs" / "1.png")
    learnt = ImageFolder(str(folder), (4, 4))
    judged = ImageFolder(str(other), (4, 4), classes=learnt.names)
    assert judged.labels.tolist() == [2] and judged.names == learnt.names
    with pytest.raises(
        InputError, match="classes: 'dogs' is not known; allowed: ants, dog .nearest: dog"
    ):
        ImageFolder(str(other), (4, 4), classes=["ants", "dog"])
    for wrong in ("dogs", ["dogs", "dogs"]):
        with pytest.raises(
            InputError, match="classes: .* given; allowed: a list of names, each once"
        ):
            ImageFolder(str(other), (4, 4), classes=wrong)
    assert (
        ImageFolder(str(other), (4, 4), classes=["dogs", "ants"]).fingerprint != judged.fingerprint
    )


def test_fit_refuses_held_out_images_of_other_classes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("heldout")
    for name in ("ants", "dogs"):
        save(Image.fromarray(COLOURS[0]), other / name / "1.png")
    model = lenet.model(lenet.SIZES["tiny"])
    learnt, judged = (Stream(ImageFolder(str(path), (4, 4)), 2) for path in (folder, other))
    message = (
        r"one folder of images has 2 .ants, dogs., another 3 .ants, cats, dogs., so labels "
        r"would mean different"
    )
    for stream in (learnt, Mixture([(learnt, 1.0), (learnt, 1.0)], 2)):
        with pytest.raises(InputError, match=message):
            train.fit(
                model,
                stream,
                train.TrainConfig(steps=1),
                heldout=judged,
                loss=losses.classification,
            )


@pytest.mark.parametrize("resize", [(6, 6), (6, 9), (9, 4)])
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (7, 5), (6, 6)])
def test_the_processor_of_a_folder_covers_and_crops(
    resize: tuple[int, int], size: tuple[int, int], tmp_path: Path
) -> None:
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    save(Image.fromarray(pixels), tmp_path / "a" / "1.png")
    folder = ImageFolder(str(tmp_path), resize)
    found = one(tmp_path, resize)
    scale = max(resize[0] / size[0], resize[1] / size[1])
    whole = Image.fromarray(pixels).resize(
        (max(resize[1], int(size[1] * scale)), max(resize[0], int(size[0] * scale))), 2
    )
    top = (whole.size[1] - resize[0]) // 2
    left = (whole.size[0] - resize[1]) // 2
    wanted = np.asarray(whole)[top : top + resize[0], left : left + resize[1]] / 255
    np.testing.assert_allclose(
        found, wanted, atol=1.01 / 255
    )  # Pillow rounds whole numbers, which may be a level off
    assert np.mean(np.abs(found - wanted) > 1e-5) < 0.2
    folder.processor.save(tmp_path)
    assert from_folder(tmp_path) == folder.processor
