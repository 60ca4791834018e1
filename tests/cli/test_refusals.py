"""What `jaxmodel train` refuses before a text is tokenised or a model is loaded, each in
one line.
"""

from __future__ import annotations

import json
import re
import sys

import pytest

from jaxmodel import hub
from jaxmodel.cli import corpus, main

WRONG = [
    ("--heads 3", "--heads: 3 given; allowed: a divisor of the width 128: 1, 2, 4, 8"),
    ("--steps 1e3 --width 30", "--heads: 4 given; allowed: a divisor of the width 30: "),
    ("--steps 10.5", "--steps: '10.5' given; allowed: a whole number"),
    ("--batch 1e400", "--batch: '1e400' given; allowed: a whole number"),
    ("--learning-rate 1%", "--learning-rate: '1%' given; allowed: a number"),
    ("--optimizer adam", "--optimizer: 'adam' is not known; allowed: .*nearest: adamw"),
    ("--pack yes", "--pack: 'yes' given; it takes no value"),
    ("--steps", "--steps: no value given"),
    ("notes.txt", "'notes.txt' is one word too many for train"),
    ("--recipe int8", "--recipe is unknown to train; it is an option of compress"),
    ("--mesh fdsp=2", r"--mesh: 'fdsp' is not known; allowed: .*nearest: fsdp"),
    ("--mesh fsdp=3", "needs 3 devices; there are 1"),
    ("--mesh fsdp", "mesh: 'fsdp' cannot be read"),
    (
        "--gradient-accumulation-steps 3 --batch 4",
        "--gradient-accumulation-steps: 3 micro-batches do not divide a batch of 4 rows",
    ),
    ("--patience 4", "patience: 4 given for 200 steps with 4 held-out loss"),
    ("--patience 1 --eval-every 1e3", "patience: 1 given for 200 steps with 1 held-out loss"),
    (
        "--gradient-compression int8",
        "--gradient-compression: int8 given without an axis data in --mesh",
    ),
    ("--microbatches 4", "--microbatches: 4 given without an axis pipeline"),
    ("--pipeline 1f1b --mesh data=1", "--pipeline: 1f1b given without an axis pipeline"),
    ("--elastic", "Missing from jaxmodel launch: --processes INT"),
    ("--devices-per-process 2", "Missing from jaxmodel launch: --processes INT"),
    ("--processes 2 --regrow 5", "--regrow: given without --elastic"),
    ("--processes 2 --devices 4", "--devices: 4 given with launch; allowed: --devices-per-process"),
    ("--processes 3", "--batch: 16 rows do not divide over 3 processes of 1 devices"),
    ("--processes 1e6", "--processes: 1000000 given; allowed: 1 to 512"),
    ("--sample=", "--sample: '' given; allowed: at least one token"),
    ("--weights 1 2", "--weights: 2 given for 1 texts of --data; allowed: one for each"),
    (
        "--data english pydoc --weights 0 1",
        r"--weights: 0.0 1.0 given; allowed: finite numbers above 0",
    ),
    ("--weights nan", r"--weights: nan given; allowed: finite"),
    ("--augment token_drop(0)", "'token_drop' is not known; allowed: .*nearest: token_dropout"),
    (
        "--augment token_dropout(1024)",
        r"--augment: token_dropout\(token=1024\) given; allowed: .* 0 to 1023",
    ),
    ("--augment rotate(5)", "'pixels' .* is needed"),
    ("--data nowhere.txt", "'nowhere.txt' is neither a file nor a known text"),
    ("--heldout nowhere.txt", "'nowhere.txt' is neither a file nor a known text"),
    ("--data {room}/*.nothing", "no file has this name"),
    ("--data ftp://a/b.txt", "allowed: local files, and URLs of"),
    (
        "--checkpoints ftp://a/b",
        "checkpoints: 'ftp://a/b' given; allowed: local files, and URLs of gs://, s3://",
    ),
    ("--checkpoints {room}/file", "is a file; a folder is needed"),
    ("--checkpoints /proc/none", "--checkpoints: '/proc/none' cannot be used"),
    ("--out {room}/file", "is a file; allowed: a folder"),
    ("--out /proc/none", "out: '/proc/none' cannot be made"),
    ("--json /proc/none", "--json: '/proc/none' cannot be written"),
    ("--tensorboard", "needs the package 'tensorboardX', which is not installed"),
    ("--model nowhere --width 256", "--width: 256 given with --init, which has its own"),
    ("--model nowhere --lora r=0", "rank: 0 given; allowed: a whole number of at least 1"),
    (
        "--model nowhere --lora rank=8",
        "--lora: 'rank' is not known; allowed: alpha, dropout, r, rslora, targets",
    ),
    ("--lora r=8", "--lora: given without --init"),
    ("--b2 1", "b2: 1.0 given; allowed: at least 0 and below 1"),
]


@pytest.fixture
def untouched(monkeypatch):
    """Reading a text or loading a model fails the test."""

    def touched(*_, **__):
        raise AssertionError("something was read before the options were checked")

    monkeypatch.setattr(corpus, "load", touched)
    monkeypatch.setattr(hub, "from_pretrained", touched)


@pytest.mark.parametrize(("words", "says"), WRONG, ids=[words[:40] for words, _ in WRONG])
def test_a_wrong_option_is_refused_at_once(words, says, untouched, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        main(["train", *words.format(room=tmp_path).split(" ")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and re.search(says, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # no run folder


ON_MESHES = """
    import contextlib, io, json
    from jaxmodel import hub, sharding
    from jaxmodel.cli import corpus, main

    def touched(*_, **__):
        raise AssertionError("something was read before the options were checked")

    corpus.load = hub.from_pretrained = touched
    sharding.simulate_devices = lambda count: None  # eight are there
    found = []
    for words in json.loads(WORDS):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            main(["train", *words.split()])
        found.append(said.getvalue())
    print(json.dumps(found))
"""
MESHES = [
    (
        "--mesh fsdp=4,tensor=2 --batch 6",
        "batch: 6 rows cannot be divided among the 4 devices of fsdp",
    ),
    ("--mesh tensor=3", "'tensor': 3} does not divide the leaf"),
    ("--mesh expert=2", "the axis 'expert' would hold 2 copies of everything"),
    ("--mesh fsdp=16", "needs 16 devices; there are 8"),
    ("--mesh pipeline=4 --depth 6", "does not divide|pipeline"),
    (
        "--mesh pipeline=2 --microbatches 3",
        "microbatches: 3 given for 16 rows in 2 stages; allowed: 2, 4, 8, 16",
    ),
    ("--processes 2 --mesh tensor=3 --batch 6", "'tensor': 3} does not divide the leaf"),
    (
        "--processes 2 --devices-per-process 4 --mesh fsdp=8 --batch 12",
        "--batch: 12 rows do not divide over 2 processes of 4",
    ),
]


def test_a_mesh_that_does_not_fit_is_refused_at_once(devices8, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = json.dumps([words for words, _ in MESHES])
    found = json.loads(
        devices8(
            f"WORDS = {words!r}\n" + "\n".join(line[4:] for line in ON_MESHES.splitlines()),
            fresh=True,
        ).splitlines()[-1]
    )
    for (given, says), err in zip(MESHES, found, strict=True):
        assert err.count("\n") == 1 and re.search(says, err), (given, err)
    assert list(tmp_path.iterdir()) == []
