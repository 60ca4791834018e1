"""Bad input on the command line is one line and exit code 2."""

from __future__ import annotations

import pytest

from tests.cli.conftest import call

BAD = [
    (["evl"], "the verb 'evl' is unknown; nearest eval; allowed: demo, train"),
    (["generate", "{tiny}", "--promt", "hi"], "--promt is unknown; nearest --prompt"),
    (["generate", "{tiny}", "--prompts=hi"], "--prompts is unknown; nearest --prompt"),
    (["train", "--lr", "0.1"], "--lr is unknown; nearest --learning-rate"),
    (["train", "--max_steps", "3"], "--max-steps is unknown; nearest --steps"),
    (["train", "-q"], "-q is unknown; `jaxmodel train --help` lists the options"),
    (["eval"], "Missing from jaxmodel eval: MODEL; `jaxmodel eval --help`"),
    (["compress", "m"], "Missing from jaxmodel compress: --recipe RECIPE, --out FOLDER; "),
    (
        ["generate", "m", "a", "b"],
        "'b' is one word too many for generate; a prompt of several words stands in quotes",
    ),
    (["eval", "m", "n"], "'n' is one word too many for eval"),
    (["eval", "m", "--recipe", "int8"], "--recipe is unknown to eval; it is an option of compress"),
    (
        ["eval", "m", "--dtype", "float16"],
        "--dtype: 'float16' is not known; allowed: bfloat16, float32 (nearest: ",
    ),
    (["eval", "m", "--max-windows"], "--max-windows: no value given"),
    (["Train"], "the verb 'Train' is unknown; nearest train"),
    (["-v"], "-v is unknown here; allowed: a verb first: demo, train"),
    (["eval", "tiny", "--windw", "3"], "--windw is unknown; nearest --window"),
    (["eval", "tiny", "--window", "x"], "--window"),
    (
        ["eval", "smolm2-135m"],
        "model: 'smolm2-135m' is not known; allowed: all-minilm-l6-v2, smollm2-135m, "
        "smollm2-135m-i",
    ),
    (["eval", "{tiny}", "--data", "wikitext2-tst"], "wikitext2-tst"),
    (["eval", "{tiny}", "--data", "{empty}"], "empty"),
    (
        ["eval", "{tiny}", "--data", "{text}", "--window", "500"],
        "500 is longer than the model's context of 128",
    ),
    (["eval", "{tiny}", "--data", "{text}", "--window", "100000"], "--data, --window: '"),
    (
        ["eval", "{tiny}", "--window", "1"],
        "--window: 1 given; allowed: a whole number of at least 2",
    ),
    (
        ["eval", "{tiny}", "--max-windows", "0"],
        "--max-windows: 0 given; allowed: a whole number of at least 1",
    ),
    (["train", "--context", "0"], "--context: 0 given; allowed: a whole number of at least 2"),
    (
        ["train", "--context", "9999", "--data", "{text}", "--heldout", "{text}"],
        "allowed: at least the 10000 of one window",
    ),
    (["train", "--batch", "0"], "--batch: 0 given; allowed: a whole number of at least 1"),
    (["train", "--vocab", "256"], "--vocab: 256 given; allowed: a whole number of at least 257"),
    (
        ["generate", "{tiny}", "--prompt", "a", "--max-new-tokens", "0"],
        "--max-new-tokens: 0 given; allowed",
    ),
    (
        ["demo", "--train-steps", "-1"],
        "--train-steps: -1 given; allowed: a whole number of at least 0",
    ),
    (["eval", "{tiny}", "--json", "{missing}/x.json"], "x.json"),
    (["generate", "{tiny}", "--prompt", ""], "prompt"),
    (["generate", "{tiny}", "--prompt", "fox " * 300], "context"),
    (["generate", "{tiny}", "--prompt", "fox", "--temperature", "-1"], "temperature"),
    (["generate", "{tiny}", "--prompt", "fox", "--chat"], "chat_template: this tokenizer has none"),
    (
        ["compress", "{tiny}", "--recipe", "int5", "--out", "{new}"],
        "recipe: 'int5' is not known; allowed: int4, int4-rtn",
    ),
    (
        ["compress", "{tiny}", "--recipe", "rtn(bits=12)", "--out", "{new}"],
        "bits is 12; allowed: a whole number of 1 to 8",
    ),
    (
        ["compress", "{tiny}", "--recipe", "int8", "--rule", "emb=rtn(8)", "--out", "{new}"],
        "'emb' matches no leaf; nearest: embed",
    ),
    (
        ["compress", "nowhere", "--recipe", "int8", "--rule", "head", "--out", "{new}"],
        "--rule: 'head' given; allowed: PATTERN",
    ),
    (
        ["compress", "nowhere", "--recipe", "int8", "--rule", "rtn(bits=8)", "--out", "{new}"],
        "--rule: 'rtn(bits=8)' given",
    ),
    (
        ["compress", "nowhere", "--recipe", "int8", "--rule", "=rtn(8)", "--out", "{new}"],
        "--rule: '=rtn(8)' given; allowed",
    ),
    (
        ["compress", "nowhere", "--recipe", "int8", "--rule", "head=rtm(8)", "--out", "{new}"],
        "--rule: the rule 'head': method: 'rtm' is not known; allowed: activations, ",
    ),
    (
        [
            "compress",
            "{tiny}",
            "--recipe",
            "int8",
            *("--rule", "embed=rtn(8)") * 2,
            "--out",
            "{new}",
        ],
        "'embed' decides nothing: earlier rules match all of its leaves",
    ),
    (
        ["compress", "{tiny}", "--recipe", "int8", "--rule", ".*=rtn(8)", "--out", "{new}"],
        "allowed: matrices",
    ),
    (
        ["compress", "nowhere", "--recipe", "no.yaml", "--out", "{new}"],
        "recipe: there is no file 'no.yaml'",
    ),
    (
        ["compress", "{tiny}", "--recipe", "int8", "--out", "{text}"],
        "is a file; allowed: a folder",
    ),
    (["compress", "{renamed}", "--recipe", "int8", "--out", "{new}"], "not a GGUF file"),
    (["train", "--mesh", "fsdp=3", "--data", "{text}"], "needs 3 devices; there are 1"),
    (["train", "--mesh", "fsdp", "--data", "{text}"], "mesh: 'fsdp' cannot be read"),
    (["train", "--devices", "0"], "devices: 0 given"),
    (["train", "--unroll", "0"], "--unroll: 0 given; allowed: a whole number of at least 1"),
    (
        ["train", "--watchdog", "-1"],
        "--watchdog: -1.0 given; allowed: a finite number of at least 0",
    ),
    (
        ["launch", "--processes", "2", "--regrow", "nan", "train"],
        "--regrow: nan given; allowed: a finite number of at least 0",
    ),
    (
        ["train", "--notices", "file:///etc/hostname"],
        "--notices: 'file:///etc/hostname' given; allowed: a URL that begins with",
    ),
    (["train", "--max-grad-norm", "-1"], "jaxmodel: max_grad_norm: -1.0 given"),
    (["train", "--steps", "0", "--data", "{text}", "--heldout", "{text}"], "steps: 0 given"),
    (
        ["train", "--heads", "0", "--data", "{text}", "--heldout", "{text}", "--vocab", "300"],
        "--heads: 0 given; allowed: a whole number",
    ),
    (
        ["train", "--heads", "3", "--data", "{text}", "--heldout", "{text}", "--vocab", "300"],
        "a divisor of the width 128",
    ),
    (
        ["train", "--sample", "", "--data", "{text}", "--heldout", "{text}", "--vocab", "300"],
        "sample: ''",
    ),
    (["train", "--out", "{text}"], "is a file; allowed: a folder"),
    (["eval", "{tiny}", "--seed", "-1"], "seed: -1 given"),
    (
        ["compress", "{tiny}", "--recipe", "rtn(scale_dtype='int8')", "--out", "{new}"],
        "scale_dtype is 'int8'",
    ),
    (["eval", "x" * 300], "cannot be used: File name too long"),
    (["rerun", "{missing}"], "is not a run folder"),
    (["demo", "--windows", "0"], "windows: 0"),
]


@pytest.mark.parametrize(("args", "says"), BAD, ids=[" ".join(args)[:40] for args, _ in BAD])
def test_bad_input_is_one_line_and_code_2(capsys, folder, args, says):
    (folder / "empty.txt").write_text(" \n")
    (folder / "renamed.gguf").write_text("this is not a model")
    places = {
        "tiny": folder / "tiny",
        "text": folder / "text.txt",
        "empty": folder / "empty.txt",
        "renamed": folder / "renamed.gguf",
        "missing": folder / "nowhere",
        "new": folder / "new",
    }
    args = [a.format(**places) if a.startswith("{") else a for a in args]
    err = call(capsys, *args, *(["--runs", folder / "runs"] if len(args) > 1 else []), code=2).err
    lines = [line for line in err.splitlines() if line.startswith("jaxmodel: ")]
    assert len(lines) == 1 and says in lines[0], err
    assert "Traceback" not in err and not (folder / "new").exists()
