"""What scores and vectors mean, where others' files say it: by hand in NumPy, from the model's own
activations and logits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle, Tokenizer, from_pretrained, train_bpe
from jaxmodel.models import Model, bert, modernbert, predict_fn, vit
from jaxmodel.models.sentences import embed_texts

TOKENIZER = train_bpe([], vocab_size=257)
TEXTS = ["a river runs", "b", "longer than the others are"]
SENTENCES = bert.model(bert.Config(257, 16, 2, 4, 24, 64, "embed"))
MODERN = modernbert.model(modernbert.Config(257, 16, 2, 4, 24, 64, "embed", windows=(0, 3)))


@functools.cache
def drawn(model: Model) -> tree.Params:
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(model.init, jax.random.key(3))
    one = lambda path, a: (path.endswith("norm/weight") + rng.normal(size=a.shape) * 0.2).astype(
        a.dtype
    )
    return tree.map_leaves(one, shapes)


def base(tmp_path: Path, model: Model = SENTENCES, **card: Any) -> Path:
    folder = Bundle(model, drawn(model), TOKENIZER, card).save_pretrained(tmp_path / "model")
    (folder / "jaxmodel.json").unlink()  # somebody else's
    return folder


def say(folder: Path, pooling: dict[str, Any] | None = None, **files: Any) -> None:
    if pooling is not None:
        files["1_Pooling/config"] = {"word_embedding_dimension": 16, **pooling}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@functools.cache
def activations(model: Model, text: str) -> np.ndarray:
    """Of `drawn`, each text alone; how they are pooled has no part in them."""
    params = drawn(model)
    tokens = jnp.asarray([TOKENIZER.encode(text)], jnp.int32)
    x = np.asarray(jax.jit(model.hidden)(params, tokens).hidden)[0]
    if "norm" in params:  # that of ModernBERT stands behind the last layer
        x = (
            (x - x.mean(-1, keepdims=True))
            / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            * params["norm"]["weight"]
        )
    return x


WAYS = {
    "cls": lambda x: x[0],
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0),
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / np.sqrt(len(x)),
    "weightedmean": lambda x: (
        (x * np.arange(1, len(x) + 1)[:, None]).sum(0) / np.arange(1, len(x) + 1).sum()
    ),
    "lasttoken": lambda x: x[-1],
}
OLD = {
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "weightedmean": "weightedmean_tokens",
}


def near_units(found: np.ndarray, model: Model, *ways: str) -> None:
    for vector, text in zip(found, TEXTS, strict=True):
        x = activations(model, text)
        want = np.concatenate([WAYS[way](x) for way in ways])
        assert np.abs(vector - want / np.linalg.norm(want)).max() < 2e-6


@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize("way", WAYS)
def test_a_text_is_pooled_as_its_folder_says(way: str, form: str, tmp_path: Path) -> None:
    folder = base(tmp_path)
    old = {f"pooling_mode_{OLD.get(one, one)}": one == way for one in WAYS}
    say(folder, old if form == "old" else {"pooling_mode": way})
    bundle = from_pretrained(folder)
    near_units(
        embed_texts(bundle, TEXTS), SENTENCES, way
    )  # in one batch, so that the shorter ones are padded
    again = from_pretrained(bundle.save_pretrained(tmp_path / "saved"))
    assert again.model.config.pooling == (way,)
    (tmp_path / "saved" / "jaxmodel.json").unlink()
    assert from_pretrained(tmp_path / "saved").model.config.pooling == (way,)
    again.save_pretrained(
        tmp_path / "saved"
    )  # a folder with these files is one that a save may replace


def test_modernbert_is_pooled_behind_its_last_norm(tmp_path: Path) -> None:
    folder = base(tmp_path, MODERN)
    say(folder, {"pooling_mode": list(WAYS)})
    near_units(embed_texts(from_pretrained(folder), TEXTS), MODERN, *WAYS)


def test_several_poolings_stand_one_behind_the_other(tmp_path: Path) -> None:
    folder = base(tmp_path)
    say(folder, {"pooling_mode": ["max", "cls"]})
    bundle = from_pretrained(folder)
    near_units(embed_texts(bundle, TEXTS), SENTENCES, "max", "cls")
    (bundle.save_pretrained(tmp_path / "saved") / "jaxmodel.json").unlink()
    assert from_pretrained(tmp_path / "saved").model.config.pooling == ("max", "cls")
    say(folder, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    assert from_pretrained(folder).model.config.pooling == (
        "cls",
        "mean",
    )  # the old form has an order of its own


def test_modules_say_where_the_pooling_is_and_what_else_there_is(tmp_path: Path) -> None:
    folder = base(tmp_path)
    say(folder, {"pooling_mode_mean_tokens": True})
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "config.json").write_text('{"pooling_mode": "cls"}')
    modules = [
        {"path": "", "type": "a.Transformer"},
        {"path": "elsewhere", "type": "b.modules.pooling.Pooling"},
    ]
    say(folder, modules=modules)
    assert from_pretrained(folder).model.config.pooling == ("cls",)
    say(
        folder,
        modules=[*modules, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
    )
    with pytest.raises(
        InputError,
        match=r"modules.json: the module 'Dense' is not supported, .*Transformer, Pooling",
    ):
        from_pretrained(folder)
    say(folder, modules=[{"path": "../x", "type": "Pooling"}])
    with pytest.raises(InputError, match="leads out of the folder"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"pooling_mode": "middle"},
            "pooling_mode: 'middle' is not known; allowed: cls, lasttoken, max",
        ),
        ({"pooling_mode_middle": True}, "a key: 'pooling_mode_middle' is not known"),
        (
            {"pooling_mode_cls_token": "yes"},
            'pooling_mode_cls_token is "yes"; allowed: true or false',
        ),
    ],
)
def test_a_pooling_that_is_not_read(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = base(tmp_path)
    say(folder, said)
    with pytest.raises(InputError, match=message):
        from_pretrained(folder)


def test_what_happens_to_a_text_first(tmp_path: Path) -> None:
    folder = base(tmp_path)
    plain = from_pretrained(folder)
    say(folder, sentence_bert_config={"max_seq_length": 24, "do_lower_case": True})
    say(
        folder,
        config_sentence_transformers={
            "prompts": {"query": "query: "},
            "default_prompt_name": "query",
        },
    )
    bundle = from_pretrained(folder)
    saved = from_pretrained(bundle.save_pretrained(tmp_path / "saved"))
    for one in (bundle, saved):
        assert {key: one.card[key] for key in ("max_tokens", "lower_case", "prompt")} == {
            "max_tokens": 24,
            "lower_case": True,
            "prompt": "query: ",
        }
        assert np.array_equal(embed_texts(one, ["A River"]), embed_texts(plain, ["query: a river"]))
    say(folder, {"pooling_mode": "mean", "include_prompt": False})
    with pytest.raises(
        InputError, match="include_prompt is false, with a prompt before every text"
    ):
        from_pretrained(folder)
    say(
        folder,
        config_sentence_transformers={"prompts": {"query": "q"}, "default_prompt_name": "document"},
    )
    with pytest.raises(
        InputError, match="default_prompt_name: 'document' is not known; allowed: query"
    ):
        from_pretrained(folder)


# ------------------------------------------------------------------------------------- problem_type


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize(
    ("problem", "classes", "rule"),
    [
        ("", 3, softmax),
        ("single_label_classification", 3, softmax),
        ("multi_label_classification", 3, sigmoid),
        ("multi_label_classification", 1, sigmoid),
        ("", 1, sigmoid),
        ("regression", 1, None),
        ("regression", 2, None),
    ],
)
def test_scores_are_what_the_problem_says(
    kind: str, problem: str, classes: int, rule: Any, tmp_path: Path
) -> None:
    """As the classification pipelines of transformers choose; also behind a save, in others' form
    too.
    """
    names = tuple("abc"[:classes])
    config: Any = (
        bert.Config(257, 16, 1, 4, 24, 32, "classify", names)
        if kind == "bert"
        else vit.Config(8, 4, 16, 1, 4, 24, names)
    )
    module: Any = bert if kind == "bert" else vit
    model = module.model(dataclasses.replace(config, problem=problem))
    bundle = Bundle(model, drawn(model), TOKENIZER if kind == "bert" else None)
    folder = bundle.save_pretrained(tmp_path / "a")
    assert json.loads((folder / "config.json").read_text()).get("problem_type", "") == problem
    (folder / "jaxmodel.json").unlink()
    back = from_pretrained(folder)
    assert back.model.config == model.config
    x: Any = jnp.asarray([[5, 6, 7]], jnp.int32) if kind == "bert" else jnp.ones((1, 8, 8, 3))
    logits = np.asarray(predict_fn(back.model, "logits")(back.params, x))
    if rule is None:
        with pytest.raises(
            InputError, match="gives: 'probabilities' given for a regression; allowed: logits"
        ):
            predict_fn(back.model)
        return
    assert np.allclose(predict_fn(back.model)(back.params, x), rule(logits), atol=1e-6)
    assert np.allclose(
        np.exp(predict_fn(back.model, "log_probabilities")(back.params, x)), rule(logits), atol=1e-6
    )


def test_a_problem_that_is_not_known(tmp_path: Path) -> None:
    model = bert.model(bert.Config(257, 16, 1, 4, 24, 32, "classify", ("a", "b")))
    folder = Bundle(model, drawn(model), TOKENIZER).save_pretrained(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label"}))
    with pytest.raises(
        InputError,
        match="problem_type: 'multi_label' is not known; .*nearest: multi_label_classification",
    ):
        from_pretrained(folder)


def test_ends_of_a_text_are_kept_by_a_save(tmp_path: Path) -> None:
    folder = base(tmp_path)
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "eos_token_id": [7, 9]})
    )
    (folder / "tokenizer_config.json").write_text("{}")
    bundle = from_pretrained(folder)
    assert isinstance(bundle.processor, Tokenizer) and bundle.processor.eos_ids == (7, 9)
    saved = bundle.save_pretrained(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["eos_token_id"] == [7, 9]
    assert "eos_token" not in json.loads(
        (saved / "tokenizer_config.json").read_text()
    )  # it had none by name
    assert from_pretrained(saved).processor.eos_ids == (7, 9)  # pyright: ignore
