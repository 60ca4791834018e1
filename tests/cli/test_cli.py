"""The command line as a user meets it: what it prints, what it leaves, and one line for bad
input.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from tokenizers import processors

import jaxmodel
from jaxmodel import compress, data, evaluate, hub, ops, report, train, tree
from jaxmodel.cli import common, main
from jaxmodel.cli.main import read
from jaxmodel.cli.options import VERBS, Train
from jaxmodel.data.text import NAMES
from jaxmodel.generation import decode
from jaxmodel.report.json_out import to_plain
from tests.cli.conftest import TEXT, as_json, call


def test_eval(capsys, folder):
    args = ("eval", folder / "tiny", "--data", folder / "text.txt", "--window", 32)
    got = as_json(capsys, folder, *args, "--max-windows", 3)
    assert got["predictions"] == 3 * 31 and got["windows"] == 3
    assert got["perplexity"] == pytest.approx(np.exp(got["nll"]))
    assert got["tokens"] == len(hub.from_pretrained(folder / "tiny").processor.encode(TEXT))
    low, high = got["interval"]
    assert low < got["nll"] < high
    assert "NLL" in call(capsys, *args, "--runs", folder / "runs").out


def test_generate(capsys, folder):
    args = ("generate", folder / "tiny", "--prompt", "The quick", "--max-new-tokens", 5)
    got = as_json(capsys, folder, *args, "--temperature", 0)
    assert len(got["ids"]) == 5 and got["tokens_per_second"] > 0
    assert got["text"] == hub.from_pretrained(folder / "tiny").processor.decode(got["ids"])
    out = call(capsys, *args, "--temperature", 1, "--seed", 3, "--runs", folder / "runs").out
    assert "The quick" in out and f"tokens/s on {report.processor()}, ended by" in " ".join(
        out.split()
    )


def test_chat_does_not_begin_the_text_twice(capsys, folder, monkeypatch):
    """The template writes the begin-of-text token, and the tokenizer would put it in front of any
    text.
    """
    bundle = hub.from_pretrained(folder / "tiny")
    special = [("<|endoftext|>", 0)]
    bundle.processor.backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=special
    )
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    talks = dataclasses.replace(bundle.processor, chat_template=template)
    dataclasses.replace(bundle, processor=talks).save_pretrained(folder / "chat")
    read = []
    monkeypatch.setattr(
        decode, "run", lambda model, params, rows, *_, **__: read.extend(rows) or iter(())
    )
    for words in (["--chat"], []):
        as_json(capsys, folder, "generate", folder / "chat", "--prompt", "The dog", *words)
    ids = bundle.processor.encode("The dog")
    assert read == [[0, *ids], [0, *ids]]


def test_compress_then_every_verb_takes_the_folder(capsys, folder):
    out = folder / "small"
    got = as_json(capsys, folder, "compress", folder / "tiny", "--recipe", "int8", "--out", out)
    assert got["bytes_after"] < got["bytes_before"] / 3.5 and 8 < got["bits_per_weight"] < 9
    assert got["bytes_after"] == tree.nbytes(hub.from_pretrained(out).params)
    assert {leaf["path"] for leaf in got["leaves"]} == set(
        tree.flatten(hub.from_pretrained(out).params)
    )
    scores = [
        as_json(capsys, folder, "eval", bundle, "--data", folder / "text.txt", "--window", 32)[
            "nll"
        ]
        for bundle in (folder / "tiny", out)
    ]
    assert abs(scores[0] - scores[1]) < 0.05
    assert as_json(capsys, folder, "generate", out, "--prompt", "The", "--max-new-tokens", 2)["ids"]


def test_a_recipe_from_text(capsys, folder):
    recipe = "magnitude(0.5) | rtn(bits=4, group=16)"
    with pytest.raises(SystemExit) as end:
        main(
            [
                "compress",
                str(folder / "tiny"),
                "--recipe",
                recipe,
                "--out",
                str(folder / "x"),
                "--runs",
                str(folder / "runs"),
            ]
        )
    assert (
        end.value.code == 0
        and "magnitude(fraction=0.5) | rtn(bits=4, group=16)" in capsys.readouterr().out
    )


def methods_of(capsys, folder, *words):
    """Path of each leaf, layer by layer -> the chain that it got."""
    got = as_json(capsys, folder, "compress", folder / "tiny", *words)
    return {
        layer: leaf["method"] for leaf in got["leaves"] for layer in tree.layer_paths(leaf["path"])
    }


def test_exceptions_from_a_recipe_by_rules_and_by_a_file(capsys, folder):
    rules = (
        "blocks/0/.*/(q|k)=rtn(bits=8)",
        "blocks/.*/q=magnitude(0.5) | rtn(bits=6)",
        "(?!blocks).*embed=",
    )
    words = [word for rule in rules for word in ("--rule", rule)]
    got = methods_of(
        capsys, folder, "--recipe", "rtn(bits=4, group=16)", *words, "--out", folder / "ruled"
    )
    six = "magnitude(fraction=0.5) | rtn(bits=6)"
    assert [got[f"blocks/{i}/attn/q"] for i in (0, 1)] == [
        "rtn(bits=8)",
        six,
    ]  # the first that matches
    assert [got[f"blocks/{i}/attn/k"] for i in (0, 1)] == [
        "rtn(bits=8)",
        "rtn(bits=4, group=16)",
    ] and got["embed"] == ""
    (folder / "mine.yaml").write_text(
        "base: rtn(bits=4, group=16)\nrules:\n  blocks/0/.*/(q|k): rtn(bits=8)\n"
        "  blocks/.*/q: magnitude(0.5) | rtn(bits=6)\n  (?!blocks).*embed: ''\n"
    )
    assert (
        methods_of(capsys, folder, "--recipe", folder / "mine.yaml", "--out", folder / "filed")
        == got
    )
    assert (
        methods_of(capsys, folder, "--recipe", folder / "ruled", "--out", folder / "repeated")
        == got
    )
    weights = [
        tree.fingerprint(hub.from_pretrained(folder / name).params)
        for name in ("ruled", "filed", "repeated")
    ]
    assert len(set(weights)) == 1


def test_a_run_leaves_a_folder_that_rerun_repeats(capsys, folder):
    runs = folder / "kept"
    call(
        capsys,
        "eval",
        folder / "tiny",
        "--data",
        folder / "text.txt",
        "--window",
        32,
        "--runs",
        runs,
    )
    (run,) = runs.iterdir()
    assert {"config.json", "versions.json", "report.json"} <= {p.name for p in run.iterdir()}
    config = json.loads((run / "config.json").read_text())
    assert config["verb"] == "eval"
    model = hub.from_pretrained(folder / "tiny").model
    assert config["resolved"]["model"] == to_plain(
        {"family": "llama", "config": model.config, "policy": model.policy}
    )
    assert set(config["resolved"]["data"]) == {"name", "origin", "sha256"}
    got = as_json(capsys, folder, "rerun", run)
    assert got["differ"] == {} and got["compared"] > 8
    recorded = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**recorded, "nll": recorded["nll"] + 1e-9}))
    out = call(capsys, "rerun", run, "--runs", folder / "runs", code=1).out
    assert "/nll" in out
    del config["resolved"]  # as an older version, or a run that was cut off early, left it
    (run / "config.json").write_text(json.dumps(config))
    call(capsys, "rerun", run, "--runs", folder / "runs", code=1)


def test_the_config_of_a_run_is_what_its_options_came_to(capsys, folder):
    def resolved(*args):
        call(capsys, *args, "--runs", folder / args[0])
        (run,) = (folder / args[0]).iterdir()
        return json.loads((run / "config.json").read_text())["resolved"]

    got = resolved(
        "generate",
        folder / "tiny",
        "--prompt",
        "The",
        "--max-new-tokens",
        2,
        "--top-k",
        3,
        "--temperature",
        0.5,
    )
    assert (
        got["request"]["sampling"]["top_k"] == 3
        and got["request"]["max_new_tokens"] == 2
        and got["request"]["special"]
    )
    got = resolved("compress", folder / "tiny", "--recipe", "int8", "--out", folder / "resolved")
    assert (
        got["recipe"] == compress.RECIPES["int8"].texts()
        and got["model"]["policy"]["compute_dtype"] == "bfloat16"
    )


def test_options_of_train_are_those_of_its_config():
    shared = {field.name for field in dataclasses.fields(train.TrainOptions)}
    assert shared < {field.name for field in dataclasses.fields(Train)} and issubclass(
        Train, train.TrainOptions
    )


def test_a_place_of_checkpoints_is_the_same_from_every_folder():
    assert Train(checkpoints="saved").checkpoints == os.path.abspath("saved")
    assert (
        Train(checkpoints="s3://bucket/saved").checkpoints == "s3://bucket/saved"
        and Train().checkpoints is None
    )


def test_files_are_the_same_from_every_folder_and_names_stay(tmp_path, monkeypatch):
    assert common.NAMES == NAMES
    for name in ("a.txt", "english", "b[1]/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    made = Train(
        data=("a.txt", "./english", "english", "*.txt", "hf:a", "s3://a/b", "no.txt"),
        heldout="b[1]",
        out="out",
    )
    files = tuple(str(tmp_path / name) for name in ("a.txt", "english"))
    assert made.data == (*files, "english", str(tmp_path / "*.txt"), "hf:a", "s3://a/b", "no.txt")
    assert (
        made.heldout == "b[1]"
        and made.out == str(tmp_path / "out")
        and dataclasses.replace(made, out=None).out is None
    )
    monkeypatch.chdir(tmp_path / "b[1]")
    made = Train(data=("c.txt", "*.txt"))
    monkeypatch.chdir("/")
    assert made.data[0] == str(tmp_path / "b[1]" / "c.txt")
    assert [data.documents(one).parts for one in made.data] == [made.data[:1]] * 2


def test_train_on_eight_devices_and_rerun(folder, monkeypatch):
    """In processes of their own, as users run them, but for what XLA makes better."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    args = [
        "train",
        "--steps",
        4,
        "--b2",
        0.9,
        "--width",
        32,
        "--depth",
        2,
        "--context",
        32,
        "--batch",
        8,
        "--vocab",
        300,
    ]
    args += [
        "--data",
        folder / "text.txt",
        "--heldout",
        folder / "text.txt",
        "--devices",
        8,
        "--mesh",
        "fsdp=4,tensor=2",
    ]
    args += ["--checkpoints", folder / "saved"]  # from which the repetition does not go on
    command = [sys.executable, "-m", "jaxmodel", *args, "--runs", folder / "train", "--json", "-"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert [place.name for place in (folder / "saved").glob("step-*")] == ["step-000000004"]
    assert got["devices"] == 8 and got["mesh"] == {"fsdp": 4, "tensor": 2}
    assert got["history"][-1]["heldout_loss"] == got["heldout_loss"] < got["history"][0]["loss"]
    (run,) = (folder / "train").iterdir()
    resolved = json.loads((run / "config.json").read_text())["resolved"]
    assert set(resolved["train"]) == {field.name for field in dataclasses.fields(train.TrainConfig)}
    assert (
        resolved["train"]["eval_every"],
        resolved["train"]["b2"],
        resolved["train"]["weight_decay"],
    ) == (1, 0.9, 0.1)
    assert resolved["train"]["decay"] is None and resolved["mesh"] == {"fsdp": 4, "tensor": 2}
    assert resolved["model"]["family"] == "gpt2" and resolved["model"]["config"]["width"] == 32
    assert resolved["model"]["policy"]["axes"] and len(resolved["data"][0]["stream"]) == 64
    again = read(["train", "--config", str(run / "config.yaml")])
    assert dataclasses.replace(again, checkpoints=str(folder / "saved")) == read(
        list(map(str, args))
    )
    bundle = hub.from_pretrained(run / "bundle")
    assert sum(a.size for a in jax.tree.leaves(bundle.params)) == got["parameters"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(got["history"])
    again = [
        sys.executable,
        "-m",
        "jaxmodel",
        "rerun",
        run,
        "--runs",
        folder / "again",
        "--json",
        "-",
    ]
    done = subprocess.run([str(c) for c in again], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (
        json.loads(done.stdout)["differ"] == {}
        and "/history/4/loss" not in json.loads(done.stdout)["differ"]
    )
    one = [
        sys.executable,
        "-m",
        "jaxmodel",
        "replay",
        run,
        "--step",
        2,
        "--runs",
        folder / "again",
        "--json",
        "-",
    ]
    done = subprocess.run([str(c) for c in one], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["same"] is True, (
        done.stderr + done.stdout
    )


def test_demo_on_a_small_bundle_and_its_rerun(capsys, folder, sound_page):
    """The main job from end to end, with the training in a process of its own."""
    args = ("--window", 32, "--windows", 2, "--train-steps", 2, "--runs", folder / "demo")
    out = call(
        capsys,
        "demo",
        "--model",
        folder / "tiny",
        "--data",
        folder / "text.txt",
        *args,
        "--json",
        folder / "demo.json",
    )
    got = json.loads((folder / "demo.json").read_text())
    names = [row["name"] for row in got["rows"]]
    assert names == ["f32", "bf16", *compress.RECIPES]
    assert all(name in out.out for name in names) and got["int8_loads_back_identical"] is True
    for row in got["rows"]:
        assert row["file_bytes"] > row["packed_bytes"] > 0 and row["perplexity"] == pytest.approx(
            np.exp(row["nll"])
        )
        assert min(row["prefill_tps"], row["decode_tps_1"], row["decode_tps_8"]) > 0
    assert got["train"]["mesh"] == {"fsdp": 4, "tensor": 2} and set(got["train"]["compressed"]) == {
        "f32",
        "int8",
        "int4",
    }
    (run,) = (folder / "demo").iterdir()
    page = sound_page(run / "report.html")
    assert page.count("<svg") == 4 and "Made smaller, on other windows" in page
    assert {p.name for p in (run / "plots").iterdir()} == {
        "size.png",
        "prefill.png",
        "decode.png",
        "loss.png",
    }
    assert hub.from_pretrained(run / "int8").params
    resolved = json.loads((run / "config.json").read_text())["resolved"]
    assert set(resolved["recipes"]) == set(compress.RECIPES) and "model.config.width" in page
    assert as_json(capsys, folder, "rerun", run)["differ"] == {}


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(capsys, verb):
    out = call(capsys, *filter(None, [verb]), "--help").out
    random = (
        any(field.name == "seed" for field in dataclasses.fields(VERBS[verb])) if verb else False
    )
    assert "usage: jaxmodel" in out and ("--seed" in out or not random)


def options_of_help(text):
    """Option -> what its help says, and the title of the box that it stands in."""
    found = {}
    title = ""
    name = ""
    for line in text.splitlines():
        if box := re.match("(?:╭─)? (.*?options|positional arguments)[ ─]*╮?$", line):
            title = box[1]
            name = ""
        words = line.strip("│ ")
        if title and (new := re.match(r"(?:-h, )?--([\w-]+)", words)):
            name = new[1]
        if name and words and not re.search("[╰─-]{9}", words):
            said = re.sub(
                r"^-\S+(?:, --\S+)?(?: (?:[A-Z]+\b|\{[^}]*\})(?: \[[^]]*\])?)?", "", words
            )
            found.setdefault(name, [title, ""])[1] += f" {said}"
    return {name: (title, " ".join(text.split())) for name, (title, text) in found.items()}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_stands_in_one_box_and_its_help_stands_alone(capsys, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = options_of_help(call(capsys, verb, "--help").out)
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(VERBS[verb])}
    placed = {"model", "folder", "name", "command", "shell"}
    positional = placed if verb not in ("demo", "train") else set()
    found.pop("help")
    assert fields - positional <= set(found)
    for name, (title, said) in found.items():
        assert not re.match(r"(Of|At|In|On|That|Which|What|Only|Above|How|Where)\b|\d|$", said), (
            verb,
            name,
            said,
        )
        assert "(required)" not in said or title in ("required options", "positional arguments")
    if verb == "train":
        kinds = {
            f"{kind} options"
            for kind in ("optimizer", "data", "model", "device", "fault", "output", "training")
        }
        assert {title for title, _ in found.values()} == kinds
        assert not {name for name, (title, _) in found.items() if title == "options"}


@pytest.mark.parametrize("verb", VERBS)
def test_no_sentence_of_the_help_is_broken_in_the_middle(capsys, verb, monkeypatch):
    """On a terminal as wide as any sentence each is one line, beside or below its option."""
    monkeypatch.setenv("COLUMNS", "1500")
    lines = [line.strip("│ ") for line in call(capsys, verb, "--help").out.splitlines()]
    for i, line in enumerate(lines):
        if re.match("--?[a-z]", line):
            below = itertools.takewhile(lambda text: re.match(r"[\w'`(]", text), lines[i + 1 :])
            assert len([text for text in below if not text.endswith(" options")]) <= 1, line


def test_version(capsys):
    assert call(capsys, "--version").out == f"jaxmodel {jaxmodel.__version__}\n"


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("train --steps 1e3", "steps", 1000),
        ("train --steps=20.0", "steps", 20),
        ("train --batch +1.6E1", "batch", 16),
        ("train --vocab 1_024", "vocab", 1024),
        ("replay run --step 12.0", "step", 12),
        ("resume run --steps 2e2", "steps", 200),
        ("eval m --max-windows None", "max_windows", None),
        ("train --data a.txt --data b.txt c.txt", "data", ("a.txt", "b.txt", "c.txt")),
        ("train --weights 3 1 --weights 1 2", "weights", (1.0, 2.0)),
        ("train --pack --no-pack", "pack", False),
        ("generate --top_k 5 m hi", "prompt", "hi"),
        ("generate m --temperature 0.5 hi", "prompt", "hi"),
        ("generate m -- --prompt", "prompt", "--prompt"),
        ("generate m --prompt -5", "prompt", "-5"),
        ("generate m --prompt=--top-k=3", "prompt", "--top-k=3"),
        ("predict m a.txt b.txt --top 3", "input", ("a.txt", "b.txt")),
        ("compress m --rule a=rtn(8) --rule b= --recipe int8 --out o", "rule", ("a=rtn(8)", "b=")),
    ],
)
def test_what_is_written_in_several_ways(words, name, value):
    assert getattr(read(words.split()), name) == value


def test_help_in_several_ways(capsys):
    texts = [
        call(capsys, *words).out
        for words in (["train", "--help"], ["help", "train"], ["train", "--steps", "3", "-h"])
    ]
    assert len(set(texts)) == 1 and "--steps" in texts[0]


def test_a_prompt_may_stand_behind_the_model(capsys, folder):
    by_option, behind = (
        as_json(capsys, folder, "generate", folder / "tiny", *words, "--max-new-tokens", 3)["text"]
        for words in (("--prompt", "The dog"), ("The dog",))
    )
    assert by_option == behind


@pytest.mark.parametrize(
    "args",
    [
        ["models"],
        ["summary", "gpt2/tiny"],
        ["eval", "nowhere"],
        ["generate", "{tiny}", "--prompt", "a", "--temperature", "-1"],
        ["compress", "{tiny}", "--recipe", "int5", "--out", "x"],
        ["train", "--data", "nowhere.txt"],
        ["train", "--width", "30"],
    ],
)
def test_what_reads_and_what_fails_leaves_no_folder(capsys, folder, tmp_path, args):
    code = 0 if args[0] in ("models", "summary") else 2
    call(
        capsys,
        *(word.format(tiny=folder / "tiny") for word in args),
        "--runs",
        tmp_path / "runs",
        code=code,
    )
    assert list(tmp_path.iterdir()) == []


def test_import_is_light():
    """`import jaxmodel` brings nothing heavy, not even JAX; `--help` neither."""
    program = (
        "import sys, jaxmodel, jaxmodel.cli; print([m for m in ('jax', 'flax', 'optax', "
        "'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert done.stdout.strip() == "[]"


def test_policy_travels_with_the_bundle(folder):
    bundle = hub.from_pretrained(folder / "tiny", policy=ops.Policy(compute_dtype="bfloat16"))
    bundle.save_pretrained(folder / "half")
    assert hub.from_pretrained(folder / "half").model.policy.compute_dtype == "bfloat16"


def test_a_chat_with_a_system_message_tools_and_documents(capsys, folder, tmp_path):
    bundle = hub.from_pretrained(folder / "tiny")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    template += "{{ (tools or [{}])[0].name }}{{ documents | tojson }}"
    talks = dataclasses.replace(
        bundle, processor=dataclasses.replace(bundle.processor, chat_template=template)
    )
    talks.save_pretrained(tmp_path / "talks")
    files = {
        "tools.json": '[{"name": "now"}]',
        "texts.json": '[{"text": "dog"}]',
        "be.txt": "Be brief.\n",
        "one.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    ask = ("generate", tmp_path / "talks", "--prompt", "fox", "--max-new-tokens", 1)
    asked = lambda *more: as_json(capsys, folder, *ask, "--chat", *more)["prompt"]
    assert asked() == "user:fox;null"
    given = ("--tools", tmp_path / "tools.json", "--documents", tmp_path / "texts.json")
    assert (
        asked("--system", tmp_path / "be.txt", *given)
        == 'system:Be brief.;user:fox;now[{"text": "dog"}]'
    )
    assert asked("--system", "Be kind.") == "system:Be kind.;user:fox;null"
    assert (
        "--system: a chat is needed for it; give --chat too"
        in call(capsys, *ask, "--system", "x", code=2).err
    )
    assert (
        "allowed: a list"
        in call(capsys, *ask, "--chat", "--tools", tmp_path / "one.json", code=2).err
    )


def test_eval_gives_every_window_what_a_text_begins_with(capsys, folder, monkeypatch):
    bundle = hub.from_pretrained(folder / "tiny")
    read = []
    special = [("<|endoftext|>", 0)]
    bundle.processor.backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=special
    )
    bundle.save_pretrained(folder / "begins")
    score = evaluate.perplexity
    monkeypatch.setattr(
        evaluate,
        "perplexity",
        lambda m, p, windows, **more: read.append(windows) or score(m, p, windows, **more),
    )
    as_json(
        capsys,
        folder,
        "eval",
        folder / "begins",
        "--data",
        folder / "text.txt",
        "--window",
        32,
        "--max-windows",
        2,
    )
    ids = bundle.processor.encode(TEXT)
    assert read[0].tolist() == [[0, *ids[:31]], [0, *ids[31:62]]]
