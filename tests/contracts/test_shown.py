"""What an interpreter and a notebook show of results: short, escaped, from shapes alone.

Every class of the project that a public function returns is found; one that is new needs an example
here.
"""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import re
import types
import typing
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import compress, data, evaluate, hub, leaves, models, plan, report, train
from jaxmodel.brief import brief
from jaxmodel.compress.rounds import Round
from jaxmodel.contrib.confident import LabelReport
from jaxmodel.contrib.lottery import Ticket
from jaxmodel.data.examples import Answers
from jaxmodel.data.images import Images
from jaxmodel.data.text import Text
from jaxmodel.evaluate.perplexity import summarize
from jaxmodel.generation.generate import GenerationResult
from jaxmodel.models import gpt2
from jaxmodel.report.json_out import to_plain
from jaxmodel.report.training import History
from jaxmodel.train.rate_search import RateSearch
from jaxmodel.train.state import init_state

EVIL = "<script>alert(1)</script>\x1b[2J"
PACKAGES = (
    *(
        "adapt",
        "compress",
        "contrib",
        "data",
        "distributed",
        "evaluate",
        "generation",
        "hub",
        "leaves",
        "losses",
        "models",
    ),
    *("optim", "plan", "train"),
)
HTML = {
    "Bundle",
    "History",
    "ImageFolder",
    "Images",
    "Report",
    "Rows",
    "Text",
    "Tokenizer",
    "TrainState",
}
"""Those that a person looks at in a notebook. The others have a line."""
LESS = {
    "Aware",
    "Kept",
    "Transform",
    "Loss",
    "Bundle",
    "Guard",
    "Build",
    "Exchange",
    "Family",
    "Model",
    "Recipe",
    "Mup",
    "Method",
    "Hypothesis",
    "Beams",
    "Documents",
    "Shards",
    "Batches",
    "RunMonitor",
}
"""Without arrays of their own, or what has them only behind another object that is tested."""


def found() -> dict[str, type]:
    """The classes of the project in the return annotations of public functions, by name."""
    classes: dict[str, type] = {}

    def walk(one: object) -> None:
        if isinstance(one, type) and one.__module__.startswith("jaxmodel."):
            classes[one.__name__] = one
        for arg in typing.get_args(one):
            walk(arg)

    for name in PACKAGES:
        module = importlib.import_module(f"jaxmodel.{name}")
        for public in module.__all__:
            thing = getattr(module, public)
            if isinstance(thing, types.FunctionType):
                try:
                    hints = typing.get_type_hints(thing)
                except (NameError, TypeError):  # a name that only type checkers import
                    continue
                walk(hints.get("return"))
    return {name: cls for name, cls in classes.items() if not name.startswith("_")}


def examples(folder) -> dict[str, object]:
    model = gpt2.model(gpt2.SIZES["tiny"])
    params = model.init(jax.random.key(0))
    smaller, done = compress.apply(compress.get_recipe("int4-rtn"), params, axes=model.axes)
    tokenizer = hub.train_bpe([EVIL * 3, "a text of words " * 9], 260)
    state = init_state(params, optax.adam(1e-3))
    arrays = {
        "pixels": np.zeros((300, 8, 8, 1), np.float32),
        "labels": np.arange(300, dtype=np.int32) % 10,
    }
    rows = [
        {"step": i, "loss": 1.0 / i, EVIL: EVIL, "tokens_per_second": 9.0} for i in range(1, 200)
    ]
    rates = np.geomspace(1e-4, 1.0, 500)
    (folder / "cat").mkdir()
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (9, 9), (i, 9, 9)).save(folder / "cat" / f"{i}.png")
    fields = {field.name: 9.87654321 for field in dataclasses.fields(GenerationResult)}
    completion = GenerationResult(
        **{**fields, "text": "words " * 400, "ids": list(range(400)), "finish_reason": "length"}
    )
    return {
        "Accuracy": evaluate.Accuracy(1 / 3, 100, 300, (0.10512373222898143, 0.24773509567029176)),
        "Answers": Answers(
            np.arange(400, dtype=np.int32),
            np.ones(400, bool),
            np.array([0, 400]),
            np.array([0, 1]),
            400,
        ),
        "PackedRows": data.pack([list(range(99))] * 40, length=128),
        "Bundle": hub.Bundle(model, params, tokenizer, {"name": EVIL}),
        "Collective": plan.Collective("all-reduce", 256, 4, 1),
        "GenerationResult": completion,
        "History": History(rows),
        "ImageFolder": data.ImageFolder(folder, (8, 8)),
        "Images": Images(arrays, arrays, EVIL, EVIL, "0" * 64),
        "LabelReport": LabelReport(np.eye(99), np.ones(99), np.arange(99), np.arange(99)),
        "Perplexity": summarize(np.ones((3, 64), np.float32)),
        "QTensor": smaller["blocks"]["0-2"]["mlp"]["up"],
        "RateSearch": RateSearch(rates, rates, rates, None),
        "Report": dataclasses.replace(
            done, leaves=({**done.leaves[0], "path": EVIL}, *done.leaves[1:])
        ),
        "Round": Round(1, params, 10, 10),
        "Rows": report.Rows(rows),
        "Stream": data.Stream(arrays, batch_size=8),
        "Text": Text("a text of many words " * 9999 + EVIL, EVIL, EVIL, "0" * 64),
        "Ticket": Ticket(0.5, state, rows),
        "Tokenizer": tokenizer,
        "TrainConfig": train.TrainConfig(steps=7),
        "TrainState": state,
        "summary": models.summary(model, smaller),
    }


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return examples(tmp_path_factory.mktemp("images"))


def test_every_result_type_is_here(shown):
    missing = (
        {name for name, cls in found().items() if not issubclass(cls, leaves.Compressed)}
        - set(shown)
        - LESS
    )
    assert not missing, "write an example"


def test_a_repr_is_short_and_has_no_array(shown):
    for name, one in shown.items():
        words = repr(one)
        most = 6000 if isinstance(one, list) else 600
        assert len(words) < most, (name, len(words))
        assert not re.search(r"array\(\[|Array\(", words) and "\x1b" not in words, (
            name,
            words[:200],
        )


def test_a_notebook_shows_it(shown):
    class Reader(HTMLParser):
        def __init__(self, page):
            super().__init__()
            self.tags = []
            self.feed(page)

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)

    for name, one in shown.items():
        if name not in HTML:
            continue
        page = type(one)._repr_html_(one)
        tags = Reader(page).tags
        if name == "Bundle":  # treescope's own, tested with the command line
            continue
        assert (
            "script" not in tags
            and "\x1b" not in page
            and "http" not in page.replace("http://www.w3.org", "")
        ), name
        assert page.count("<table>") == len(
            re.findall(r'<div class="wide(?: fold)?"><table>', page)
        ), name
        assert len(page) < 200_000, name


def test_nothing_is_read_from_arrays():
    """The arrays are gone, or are none: what is shown is the same, but for the counters."""
    model = gpt2.model(gpt2.SIZES["tiny"])
    state = init_state(model.init(jax.random.key(1)), optax.adam(1e-3))
    state = dataclasses.replace(state, step=jnp.int32(3))
    assert (
        repr(state).startswith("TrainState(step 3, data_step 0, parameters ")
        and "step" in state._repr_html_()
    )
    leaf = (
        leaves.QTensor.from_dense(jnp.ones((4, 8)), bits=4)
        if hasattr(leaves.QTensor, "from_dense")
        else None
    )
    seen = repr(state)
    for array in jax.tree.leaves((state, leaf)):
        array.delete()
    assert repr(state) == seen.replace("step 3", "step int32[]").replace(
        "data_step 0", "data_step int32[]"
    )
    shapes = jax.eval_shape(lambda: init_state(model.init(jax.random.key(1)), optax.adam(1e-3)))
    assert "parameters" in repr(shapes)
    texts = []
    jax.jit(lambda s: texts.append(repr(s)))(
        jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes.step)
    )
    assert texts


def test_rows_are_a_list():
    rows = report.Rows([{"a": i, "b": 0.5} for i in range(40)])
    assert (
        rows == [{"a": i, "b": 0.5} for i in range(40)]
        and isinstance(rows[:3], report.Rows)
        and rows[-1]["a"] == 39
    )
    words = repr(rows)
    assert "The first and the last 6 of 40 rows" in words and "39" in words and "20" not in words
    assert pickle.loads(pickle.dumps(rows)) == rows and to_plain(rows) == list(rows)
    assert repr(report.Rows()) == "[]"
    rows.append(1)  # whatever somebody puts in
    assert repr(rows)


def test_a_few_words_never_fail():
    class Odd:
        def __repr__(self):
            raise RuntimeError("no")

    assert (
        brief(Odd()) == "<Odd>"
        and brief(jnp.ones((2, 3))) == "float32[2, 3]"
        and brief(print) == "print"
    )
    assert (
        brief([Odd()] * 2) == "[<Odd>, <Odd>]"
        and len(brief(EVIL * 99)) < 60
        and brief(0.1 + 0.2) == "0.3"
    )
