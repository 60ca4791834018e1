"""How images are read for a model: against transformers (goldens/make_encoders.py), by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxmodel.errors import InputError
from jaxmodel.hub.images import ImageProcessor, from_folder, resize

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", ["smooth", "tall", "noise"])
@pytest.mark.parametrize("folder", ["vit-a", "clip-a"])
def test_images_are_read_as_by_transformers(folder: str, name: str, tmp_path: Path) -> None:
    processor = from_folder(GOLDENS / folder)
    with np.load(GOLDENS / "encoder-images.npz") as file:
        want = dict(file)
    assert processor is not None
    pixels = processor([want[f"image:{name}"], want[f"image:{name}"]])
    level = processor.scale / min(processor.std)
    stored = want[f"{folder}:{name}"]
    assert pixels[1].shape == stored.shape and pixels.dtype == np.float32
    assert (
        np.abs(pixels[1] - stored).max() < 1.01 * level
    )  # a level of 255, where sums are rounded the other way
    assert np.mean(np.abs(pixels[0] - want[f"{folder}:{name}"]) > 1e-5) < 0.1 or name == "tall"
    processor.save(tmp_path)
    assert from_folder(tmp_path) == processor
    given, ours = (
        json.loads((path / "preprocessor_config.json").read_text())
        for path in (GOLDENS / folder, tmp_path)
    )
    assert all(ours[key] == value for key, value in given.items() if key != "do_convert_rgb")


def test_resize_by_hand() -> None:
    """Halves are means of what they cover; a straight line stays one, but for its ends."""
    image = np.array([[[0], [10], [20], [30]]], np.uint8)
    assert resize(image, (1, 4)) is image
    # the triangle of a new pixel reaches over four old ones: weights 1, 3, 3, 1, those beyond the
    # edge left out
    assert resize(image, (1, 2)).ravel().tolist() == [
        round((3 * 0 + 3 * 10 + 20) / 7),
        round((10 + 3 * 20 + 3 * 30) / 7),
    ]
    assert resize(image, (1, 8)).ravel().tolist() == [0, 3, 8, 13, 18, 23, 28, 30]  # 2.5 goes up
    assert resize(image, (3, 4))[:, :, 0].tolist() == image[:, :, 0].tolist() * 3
    cubic = resize(image, (1, 8), "bicubic").ravel()
    assert cubic[0] <= 0 + 2 and np.all(np.diff(cubic.astype(int)) >= 0)


def test_kinds_of_images_and_of_files(tmp_path: Path) -> None:
    processor = ImageProcessor((4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    grey = np.full((9, 7), 51, np.uint8)
    np.testing.assert_allclose(processor([grey]), np.full((1, 4, 4, 3), 0.2), rtol=1e-6)
    alpha = np.concatenate(
        [np.full((9, 7, 3), 255, np.uint8), np.zeros((9, 7, 1), np.uint8)], axis=-1
    )
    np.testing.assert_allclose(processor([alpha, alpha]), np.ones((2, 4, 4, 3)), rtol=1e-6)
    assert processor([]).shape[0] == 0
    for wrong in (
        grey.astype(np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((0, 4), np.uint8),
    ):
        with pytest.raises(InputError, match="allowed: uint8"):
            processor([wrong])
    with pytest.raises(InputError, match=r"\[9, 7\] pixels, from which \[8, 8\] cannot be cropped"):
        ImageProcessor(None, (8, 8))([grey])
    with pytest.raises(InputError, match="allowed: one size for all"):
        ImageProcessor(None)([grey, grey.T])
    file = tmp_path / "preprocessor_config.json"
    assert from_folder(tmp_path) is None
    old = {"size": 8, "do_resize": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    file.write_text(json.dumps(old))
    assert from_folder(tmp_path) == ImageProcessor((8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    file.write_text(
        json.dumps(old | {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 6})
    )
    assert from_folder(tmp_path) == ImageProcessor(
        8, (6, 6), "bicubic", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    for change, message in (
        ({"resample": 1}, "resample is 1; allowed: 2 .bilinear., 3 .bicubic."),
        ({"size": {"longest_edge": 3}}, "missing or has the wrong type"),
        ({"image_mean": None}, "image_mean is null; allowed: a list, each a number"),
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "'ConvNextImageProcessor' is not supported",
        ),
    ):
        file.write_text(json.dumps(old | change))
        with pytest.raises(InputError, match=message):
            from_folder(tmp_path)
