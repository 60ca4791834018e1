"""`jaxmodel models`, `summary`, `predict`, and what a notebook shows of a bundle."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from jaxmodel import compress, hub, tree
from jaxmodel.cli import inspect
from jaxmodel.cli.inspect import WEIGHTS
from jaxmodel.cli.options import Summary
from jaxmodel.errors import InputError
from jaxmodel.hub.images import ImageProcessor
from jaxmodel.hub.pretrained import KNOWN
from jaxmodel.models import bert, lenet, llama, sizes, vit
from tests.cli.conftest import as_json, call

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20
LABELS = ("no", "yes", "[may]be")  # brackets are no markup


def bundle_of(module, config, processor, name: str) -> hub.Bundle:
    """With weights so large that the classes differ."""
    model = module.model(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes)
    return hub.Bundle(model, params, processor, {"name": name})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bundles of a text model with labels and without, of an image model, and files to read."""
    room = tmp_path_factory.mktemp("verbs")
    tokenizer = hub.train_bpe([TEXT], 300)
    vocab = tokenizer.vocab_size
    made = {
        "texts": bundle_of(
            bert, bert.Config(vocab, 32, 2, 4, 64, 32, "classify", LABELS), tokenizer, "texts"
        ),
        "images": bundle_of(
            vit, vit.Config(8, 4, 32, 1, 4, 64, LABELS), ImageProcessor((8, 8)), "images"
        ),
        "grey": bundle_of(
            lenet,
            lenet.Config((4,), (8,), 8, 3),
            ImageProcessor((8, 8), mean=(0.0,), std=(1.0,)),
            "grey",
        ),
        "plain": bundle_of(
            llama, llama.Config(vocab, 64, 3, 4, 2, 16, 128, 128, tied=True), tokenizer, "plain"
        ),
    }
    made["small"], _ = compress.compress_bundle(made["plain"], compress.get_recipe("int8"))
    made["grey"] = dataclasses.replace(made["grey"], card={"name": "grey", "labels": LABELS})
    made["colours"] = dataclasses.replace(made["grey"], processor=ImageProcessor((8, 8)))
    made["unequal"] = dataclasses.replace(
        made["grey"], card={"name": "unequal", "labels": LABELS[:2]}
    )
    for name, bundle in made.items():
        bundle.save_pretrained(room / name)
    for i, text in enumerate(("The dog", "The quick brown fox", TEXT)):
        (room / f"{i}.txt").write_text(text + "\n")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 4)).astype(np.uint8)
    Image.fromarray(pixels[..., :3]).save(room / "rgb.png")
    Image.fromarray(pixels).save(room / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(room / "grey.png")
    (room / "broken.png").write_bytes((room / "rgb.png").read_bytes()[:60])
    (room / "empty.txt").write_text(" \n")
    (room / "latin.txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    return room


# ------------------------------------------------------------------------------------------- models

PUBLISHED = {  # what transformers counts; of bert with the head for masked tokens
    "gpt2/gpt2": 124_439_808,
    "gpt2/gpt2-xl": 1_557_611_200,
    "llama/smollm2-135m": 134_515_008,
    "llama/llama-2-7b": 6_738_415_616,
    "llama/llama-3-70b": 70_553_706_496,
    "bert/bert-base": 109_514_298,
    "vit/vit-base-16": 86_567_656,
}


def test_models(capsys, folder, monkeypatch):
    monkeypatch.setattr(
        inspect, "count_parameters", lambda known: dict.fromkeys(known, 0)
    )  # what is not stored
    got = as_json(capsys, folder, "models")
    rows = {f"{row['family']}/{row['name']}": row for row in got}
    assert list(rows) == list(sizes()) and set(WEIGHTS) < set(rows)
    assert {name: rows[name]["parameters"] for name in PUBLISHED} == PUBLISHED  # and so stored
    for row in got:
        assert set(row) == {"family", "name", "parameters", "needs"}
        needs = row["needs"]
        assert (needs["float32_bytes"], needs["bfloat16_bytes"]) == (
            4 * row["parameters"],
            2 * row["parameters"],
        )
    assert rows["llama/smollm2-135m"]["needs"]["weights"] == "smollm2-135m-instruct-q4_1"
    assert rows["gpt2/gpt2"]["needs"]["weights"] == "hub openai-community/gpt2"
    assert rows["gpt2/tiny"]["needs"]["weights"] == "none"
    assert {where for where in WEIGHTS.values() if "/" not in where} < set(KNOWN)


def test_a_size_that_has_changed_or_is_new_is_counted(capsys, folder, monkeypatch):
    module, config = sizes()["llama/tiny"]
    known = {
        "llama/tiny": (module, dataclasses.replace(config, vocab=100)),
        "llama/new": (module, config),
    }
    monkeypatch.setattr("jaxmodel.models.sizes", lambda: known)
    counts = {row["name"]: row["parameters"] for row in as_json(capsys, folder, "models")}
    assert counts["tiny"] == counts["new"] - 156 * 32 * 2 == 44_256 - 156 * 32 * 2


def test_models_for_people(capsys, folder, monkeypatch):
    few = {name: sizes()[name] for name in ("gpt2/gpt2-xl", "llama/tiny")}
    monkeypatch.setattr("jaxmodel.models.sizes", lambda: few)
    lines = call(capsys, "models", "--runs", folder / "runs").out.splitlines()
    (line,) = [line for line in lines if "gpt2-xl" in line]
    assert line.split() == [
        "gpt2",
        "gpt2-xl",
        "1,557,611,200",
        "6.2",
        "GB",
        "3.1",
        "GB",
        "hub",
        "openai-community/gpt2-xl",
    ]


# ------------------------------------------------------------------------------------------ summary


def test_summary_of_a_size(capsys, folder):
    got = as_json(capsys, folder, "summary", "llama/llama-3-70b")
    assert (
        got["parameters"] == PUBLISHED["llama/llama-3-70b"]
        and got["bytes"] == 4 * got["parameters"]
    )
    assert got["family"] == "llama" and got["config"]["width"] == 8192 and got["weights"] is False
    rows = {row["path"]: row for row in got["leaves"]}
    q = rows["blocks/0-79/attn/q"]
    assert (q["layers"], q["shape"], q["kind"], q["sharding"]) == (
        80,
        [8192, 8192],
        "float32",
        ["tensor", "fsdp"],
    )
    assert q["bytes"] == 80 * 8192 * 8192 * 4 and rows["norm/weight"]["sharding"] == [None]
    assert (
        as_json(capsys, folder, "summary", "llama-3-70b")["leaves"] == got["leaves"]
    )  # one family has that size
    lines = call(capsys, "summary", "llama-3-70b", "--runs", folder / "runs").out.splitlines()
    (line,) = [line for line in lines if "attn/q" in line]
    assert line.split() == [
        "blocks/0-79/attn/q",
        "80",
        "8192",
        "x",
        "8192",
        "float32",
        "5,368,709,120",
        "21.5",
        "GB",
        "tensor",
        "fsdp",
    ]
    assert any("70,553,706,496 parameters" in line for line in lines)


def test_summary_of_a_bundle(capsys, folder):
    got = as_json(capsys, folder, "summary", folder / "small")
    params = hub.from_pretrained(folder / "small").params
    assert [row["path"] for row in got["leaves"]] == list(tree.flatten(params))
    assert (
        got["bytes"] == tree.nbytes(params)
        and got["parameters"] == tree.count(params)
        and got["weights"] is True
    )
    kinds = {row["path"]: row["kind"] for row in got["leaves"]}
    assert (
        kinds["blocks/0-2/mlp/up"] == "Turned(hadamard=64) of QTensor(bits=8, activations=int8)"
        and kinds["norm/weight"] == "float32"
    )
    assert got["card"]["name"] == "plain" and 8 < got["bits_per_weight"] < 10
    assert (
        "QTensor(bits=8" in call(capsys, "summary", folder / "small", "--runs", folder / "runs").out
    )


def test_summary_of_what_runs(capsys, folder):
    """Fused leaves, with how their products run; sizes have no weights to run."""
    got = as_json(capsys, folder, "summary", folder / "small", "--running")
    runs = {row["path"]: row["runs"] for row in got["leaves"]}
    assert runs["blocks/0-2/mlp/gate+up"].startswith("its input turned, then ")
    assert runs["norm/weight"] == "products in float"
    shown = call(capsys, "summary", folder / "small", "--running", "--runs", folder / "runs").out
    assert "runs" in shown and "products in" in " ".join(shown.split())
    with pytest.raises(InputError, match="--running: 'llama/tiny' is a size without weights"):
        inspect.summary(Summary(name="llama/tiny", running=True), None)


def test_a_notebook_shows_the_same(folder, monkeypatch):
    bundle = hub.from_pretrained(folder / "small")
    page = bundle._repr_html_()
    assert (
        page is not None
        and "0-2" in page
        and "Turned(hadamard=64) of QTensor(bits=8, activations=int8)" in page
    )
    shown, _ = DisplayFormatter().format(bundle)
    assert shown["text/html"] == page or "0-2" in shown["text/html"]
    fused = hub.Bundle(bundle.model, bundle.for_inference())
    assert "no rule" in (
        fused._repr_html_() or ""
    )  # fused leaves too, for which there are no sharding rules
    monkeypatch.setitem(sys.modules, "treescope", None)
    assert bundle._repr_html_() is None
    shown, _ = DisplayFormatter().format(bundle)
    assert set(shown) == {"text/plain"} and "Bundle(" in shown["text/plain"]


# ------------------------------------------------------------------------------------------ predict


def expected(bundle, inputs):
    logits = jax.jit(bundle.model.apply)(bundle.params, inputs).logits
    return np.asarray(jax.nn.softmax(logits))


def test_predict_texts(capsys, folder):
    files = [folder / f"{i}.txt" for i in range(3)]
    args = ("predict", folder / "texts", "--input", *files)
    got = as_json(capsys, folder, *args, "--top", 2, "--batch", 2)
    bundle = hub.from_pretrained(folder / "texts")
    for row, file in zip(got["rows"], files, strict=True):
        ids = bundle.processor.encode(file.read_text().strip(), special=True)
        ids = ids if len(ids) <= 32 else [*ids[:31], ids[-1]]
        (want,) = expected(bundle, jnp.asarray([ids], jnp.int32))
        best = int(want.argmax())
        assert (row["file"], row["label"]) == (str(file), LABELS[best])
        assert row["probability"] == pytest.approx(want[best], abs=1e-5)
        assert [one["label"] for one in row["top"]] == [LABELS[i] for i in np.argsort(-want)[:2]]
    assert [row["truncated"] for row in got["rows"]] == [False, False, True]
    assert (got["reads"], got["classes"]) == ("text", 3)
    one_by_one = as_json(capsys, folder, *args, "--batch", 1)["rows"]
    assert [row["probability"] for row in one_by_one] == pytest.approx(
        [row["probability"] for row in got["rows"]], abs=1e-5
    )
    out = call(capsys, *args, "--runs", folder / "runs").out
    assert "only the beginning was read of" in out and all(label in out for label in LABELS)


def test_predict_images(capsys, folder):
    files = [folder / name for name in ("rgb.png", "alpha.png", "grey.png")]
    got = as_json(capsys, folder, "predict", folder / "images", "--input", *files)
    bundle = hub.from_pretrained(folder / "images")
    assert isinstance(bundle.processor, ImageProcessor)
    white = Image.new("RGBA", (12, 10), "white")  # what shows behind what is transparent
    shown = [
        Image.alpha_composite(white, Image.open(file).convert("RGBA")).convert("RGB")
        for file in files
    ]
    pixels = bundle.processor([np.asarray(image) for image in shown])
    want = expected(bundle, jnp.asarray(pixels))
    for row, probabilities in zip(got["rows"], want, strict=True):
        assert row["label"] == LABELS[int(probabilities.argmax())] and not row["truncated"]
        assert [one["probability"] for one in row["top"]] == pytest.approx(
            -np.sort(-probabilities), abs=1e-5
        )
    assert got["reads"] == "images"
    assert len({row["probability"] for row in got["rows"]}) == 3
    assert (
        "rgb.png"
        in call(
            capsys, "predict", folder / "images", "--input", files[0], "--runs", folder / "runs"
        ).out
    )


def test_predict_grey_images_with_the_labels_of_a_card(capsys, folder):
    got = as_json(
        capsys,
        folder,
        "predict",
        folder / "grey",
        "--input",
        folder / "rgb.png",
        folder / "grey.png",
    )
    bundle = hub.from_pretrained(folder / "grey")
    pixels = bundle.processor(
        [np.asarray(Image.open(folder / f"{name}.png").convert("L")) for name in ("rgb", "grey")]
    )
    assert pixels.shape == (2, 8, 8, 1)
    for row, probabilities in zip(got["rows"], expected(bundle, jnp.asarray(pixels)), strict=True):
        assert row["label"] == LABELS[int(probabilities.argmax())]
        assert row["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_an_image_is_turned_as_the_camera_was_held(capsys, folder):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turned
    Image.fromarray(pixels).save(folder / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(folder / "upright.png")
    got = as_json(
        capsys,
        folder,
        "predict",
        folder / "images",
        "--input",
        folder / "turned.png",
        folder / "upright.png",
    )["rows"]
    assert got[0]["top"] == got[1]["top"]


BAD = [
    (["summary"], "Missing from jaxmodel summary: NAME"),
    (["summary", "tiny"], "name: 'tiny' is a size of several families; allowed: "),
    (["summary", "gpt2-xxl"], "name: 'gpt2-xxl' is not known; allowed: "),
    (
        ["summary", "gpt2/gpt2-xxl"],
        "name: 'gpt2/gpt2-xxl' is not known; allowed: gpt2/gpt2, gpt2/gpt2-large",
    ),
    (["summary", "{nowhere}"], "nowhere"),
    (["predict", "{texts}"], "--input"),
    (["predict", "{texts}", "--input"], "--input"),
    (["predict", "smolm2-135m", "--input", "{0.txt}"], "model: 'smolm2-135m' is not known"),
    (
        ["predict", "{plain}", "--input", "{0.txt}"],
        "has no labels; allowed: a bundle of a classifier",
    ),
    (["predict", "{texts}", "--input", "{nowhere}"], "nowhere' cannot be used: No such file"),
    (["predict", "{texts}", "--input", "{texts}"], "not a regular file"),
    (
        ["predict", "{texts}", "--input", "{0.txt}", "{empty.txt}"],
        "empty.txt' is empty; allowed: a file with text",
    ),
    (["predict", "{texts}", "--input", "{latin.txt}"], "latin.txt' is no UTF-8 text"),
    (
        ["predict", "{texts}", "--input", "{rgb.png}"],
        "rgb.png' is no UTF-8 text; allowed: text, which is what this model reads",
    ),
    (
        ["predict", "{images}", "--input", "{rgb.png}", "{broken.png}"],
        "broken.png' cannot be decoded: ",
    ),
    (
        ["predict", "{images}", "--input", "{0.txt}"],
        "0.txt' cannot be decoded: cannot identify image file",
    ),
    (
        ["predict", "{colours}", "--input", "{rgb.png}"],
        "processor of 'grey' makes 8 x 8 x 3 pixels; the model reads 8 x 8 x 1",
    ),
    (
        ["eval", "{texts}", "--data", "{2.txt}", "--window", "16"],
        "texts' does not continue texts; allowed: a decoder",
    ),
    (["eval", "{grey}", "--data", "{2.txt}"], "grey' does not continue texts; allowed: a decoder"),
    (
        ["predict", "{unequal}", "--input", "{rgb.png}"],
        "card: labels names 2 classes; the model has 3",
    ),
    (
        ["predict", "{texts}", "--input", "{0.txt}", "--top", "0"],
        "--top: 0 given; allowed: a whole number of at least 1",
    ),
    (["predict", "{texts}", "--input", "{0.txt}", "--batch", "0"], "--batch: 0 given"),
]


@pytest.mark.parametrize(("args", "says"), BAD, ids=[" ".join(args)[:45] for args, _ in BAD])
def test_bad_input_is_one_line_and_code_2(capsys, folder, args, says):
    args = [str(folder / a[1:-1]) if a.startswith("{") else a for a in args]
    err = call(capsys, *args, "--runs", folder / "runs", code=2).err
    lines = [line for line in err.splitlines() if line.startswith("jaxmodel: ")]
    assert len(lines) == 1 and says in lines[0], err
    assert "Traceback" not in err


def test_without_pillow(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    err = call(
        capsys,
        "predict",
        folder / "images",
        "--input",
        folder / "rgb.png",
        "--runs",
        folder / "runs",
        code=2,
    ).err
    assert "pip install 'jaxmodel[data]'" in err


def test_methods_says_what_texts_may_name(capsys, folder):
    rows = as_json(capsys, folder, "methods")
    names = {(row["kind"], row["name"]) for row in rows}
    assert {("method", name) for name in compress.methods()} < names
    kinds = {"recipe": "int8", "transform": "rotate", "range": "mse", "augment": "rotate"}
    assert set(kinds.items()) < names
    said = call(capsys, "methods", "gptq", "--runs", folder / "runs").out
    assert "gptq(bits=4, group=None" in said and "damping: of the Hessian" in said
    assert "wanda" not in said
    said = call(capsys, "methods", "gtpq", "--runs", folder / "runs", code=2).err
    assert said.strip().endswith("(nearest: gptq)")
