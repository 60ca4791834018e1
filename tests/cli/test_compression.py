"""`jaxmodel compress` on a text, `sensitivity` and `compare`."""

from __future__ import annotations

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, data, evaluate, generation, hub, leaves, tree
from tests.cli.conftest import as_json, call, run

GPTQ = "gptq(3, group=16)"


def test_compress_measures_a_text_and_says_what_it_lost(capsys, folder):
    out = folder / "gptq"
    words = ("--recipe", GPTQ, "--calibration", folder / "text.txt", "--order", "sequential")
    sizes = ("--windows", 9, "--window", 32, "--held-out", 0.12, "--cap", 3.0, "--out", out)
    got = as_json(capsys, folder, "compress", folder / "tiny", *words, *sizes)
    told = got["protocol"]
    assert (told["tokens"], told["held_out_tokens"], told["context"]) == (8 * 32, 32, 32)
    assert (told["order"], told["cap"]) == ("sequential", 3.0) and told["text"]["name"] == str(
        folder / "text.txt"
    )
    rows = {row["path"]: row for row in got["leaves"]}
    assert rows["blocks/1/mlp/down"]["tokens"] == 256
    assert 0 < rows["blocks/1/mlp/down"]["output_error"] < 0.5
    # the same by the library, and the loss of the saved bundle on the window that was held out
    bundle = hub.from_pretrained(folder / "tiny")
    ids = hub.need_processor(bundle).encode((folder / "text.txt").read_text())
    windows = data.windows(ids, 32, limit=9, begin=hub.need_processor(bundle).begins)
    again, _ = compress.compress_bundle(
        bundle,
        compress.get_recipe(GPTQ),
        batches=[{"tokens": jnp.asarray(one)[None]} for one in windows],
        order="sequential",
        cap=3.0,
    )
    saved = hub.from_pretrained(out)
    assert tree.fingerprint(saved.params) == tree.fingerprint(again.params)
    after = evaluate.perplexity(saved.model, saved.params, windows[8:]).nll
    assert got["loss"]["after"]["mean"] == pytest.approx(after, rel=1e-4)
    # every leaf is on disk as soon as it is done
    (kept,) = (folder / "runs").glob("*-compress")
    lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [row["path"] for row in got["leaves"]]
    assert (kept / "plots/errors.png").stat().st_size > 1000


def test_sensitivity_is_the_loss_with_one_layer_compressed(capsys, folder):
    text = folder / "text.txt"
    sizes = ("--window", 32, "--max-windows", 2, "--widths", 2, 4)
    got = as_json(capsys, folder, "sensitivity", folder / "tiny", "--data", text, *sizes)
    rows = {(row["version"], row["layer"]): row["nll_change"] for row in got["rows"]}
    layers = ["embed", "blocks/0", "blocks/1"]
    assert set(rows) == {(f"{bits} bits", layer) for bits in (2, 4) for layer in layers}
    bundle = hub.from_pretrained(folder / "tiny")
    ids = hub.need_processor(bundle).encode(text.read_text())
    windows = data.windows(ids, 32, limit=2, begin=hub.need_processor(bundle).begins)
    one, _ = compress.apply(
        [("blocks/1/.*/(.)|blocks/1/mlp/.*", "rtn(2)"), (".*", "")], bundle.params
    )
    plain = tree.map_leaves(lambda _, leaf: leaves.decode(leaf), one)
    base, now = (
        evaluate.perplexity(bundle.model, params, windows).nll for params in (bundle.params, plain)
    )
    assert rows["2 bits", "blocks/1"] == pytest.approx(now - base, abs=1e-5)


def test_compare_takes_recipes_and_bundles(capsys, folder):
    text = folder / "text.txt"
    sizes = ("--window", 32, "--max-windows", 2, "--windows", 4)
    hub.from_pretrained(folder / "tiny").save_pretrained(folder / "twin")
    got = as_json(
        capsys, folder, "compare", folder / "tiny", "int8", GPTQ, folder / "twin",
        "--data", text, "--calibration", text, *sizes,
    )  # fmt: skip
    names = [row["name"] for row in got["rows"]]
    assert names == [str(folder / "tiny"), "int8", GPTQ, str(folder / "twin")]
    assert got["rows"][3]["nll_change"] == 0 and got["rows"][1]["bits_per_weight"] < 9
    assert np.isfinite(got["rows"][2]["nll"]) and got["rows"][2]["bits_per_weight"] < 6


def test_what_is_wrong_is_one_line(capsys, folder):
    tiny = folder / "tiny"
    short = folder / "short.txt"
    short.write_text("Too short.")
    out = ("--out", folder / "never")
    for words, message in (
        (
            ("compress", tiny, "--recipe", GPTQ, "--calibration", short, "--window", 64, *out),
            "short.txt' has 10 tokens; allowed: at least the 64 of one window",
        ),
        (
            ("compress", tiny, "--recipe", GPTQ, "--window", 999, *out),
            "--window: 999 given; allowed: 2 to the model's context of 128",
        ),
        (("compress", tiny, "--recipe", GPTQ, "--order", "onec", *out), "--order"),
        (
            ("compress", tiny, "--recipe", "int8", "--cap", 0.0, *out),
            "--cap: 0.0 given; allowed: a finite number above 0",
        ),
        (("compress", tiny, "--recipe", "int8", "--held-out", 1.5, *out), "--held-out: 1.5 given"),
        (("sensitivity", tiny, "--method", "rtn(4)"), "--method: 'rtn(4)' given; allowed: a chain"),
        (("compare", tiny), "Missing from jaxmodel compare: --versions VERSION"),
        (("compare", tiny, "rtm(4)", "--window", 32), "rtm"),
        (("compare", tiny, "int44"), "--versions: 'int44' is not known; allowed: "),
        (("compare", tiny, "int44"), "nearest: int4"),
        (("compare", tiny, tiny), "is the model itself; allowed: others"),
    ):
        code, _, err = run(capsys, *words, "--runs", folder / "runs")
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (folder / "never").exists()


def test_a_table_for_people(capsys, folder, monkeypatch):
    """Of the run above, so that nothing is compiled again but what measures the speed."""
    measure = generation.compare_speed
    quick = lambda before, after, turns: measure(before, after, streams=(1,), new=1, turns=1)
    monkeypatch.setattr(generation, "compare_speed", quick)
    words = ("--recipe", GPTQ, "--calibration", folder / "text.txt", "--order", "sequential")
    sizes = ("--windows", 9, "--window", 32, "--held-out", 0.12, "--cap", 3.0)
    where = ("--out", folder / "again", "--runs", folder / "runs")
    said = call(capsys, "compress", folder / "tiny", *words, *sizes, "--latency", *where).out
    assert "error of" in said and "judged on 32 others" in said and "change" in said
    assert re.search(
        r"on disk\ntokens/s: prefill .*x\), 1 stream .* → .*x\)\n\(prompt of 128,", said
    )
    kept = max((folder / "runs").glob("*-compress"))
    report = json.loads((kept / "report.json").read_text())
    was, now, ratio = (report["latency"][key] for key in ("before", "after", "ratio"))
    assert set(was) == set(now) == {"prefill_tps", "decode_tps_1"}
    assert all(ratio[key] == pytest.approx(now[key] / was[key]) for key in was)
    (file,) = (folder / "again").glob("*.safetensors")
    assert report["file_bytes"] == file.stat().st_size
    # the tensors of the file are the bytes in memory; the rest is its header
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert report["file_bytes"] - header - 8 == report["bytes_after"]
