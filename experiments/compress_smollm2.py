"""SmolLM2-135M made smaller: bits, quality and speed of every named recipe, against the same program in f32.

Command:  python experiments/compress_smollm2.py [--quick] [--seed N] --json -
Cost:     about 4 minutes on two cores (16 windows of 512); --quick about 2 (4 windows).
Goals:    f32 NLL 3.38783 +- 0.0005 (transformers 5.23 on torch 2.13, WikiText-2 test, first 16 windows); bf16 within 0.003; int8
          at most 8.4 bits a weight, NLL at most +0.002 with f32 activations and +0.04 with int8 ones; int4 at most 5.1 bits;
          weight files within 1 % of resident bytes; int8 against f32 in one run: decode of 8 streams >= 2.5x, prefill of 512
          tokens >= 2x; absolute aims >= 45 tokens/s for 1 stream and >= 250 for 8.
Measured: see RESULTS.md (`make numbers`).
"""

from __future__ import annotations

import argparse
import tempfile
import time

from jaxmodel import report
from jaxmodel.cli import demo
from jaxmodel.cli.options import Demo

REFERENCE = 3.38783  # only for the text and windows named above


def main() -> None:
    """Run the demo's measurements without its training, and judge them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="4 windows instead of 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default=None, metavar="FILE")
    args = parser.parse_args()
    began = time.perf_counter()
    windows = 4 if args.quick else 16
    with report.clean_stdout(args.json), tempfile.TemporaryDirectory() as room:
        options = Demo(windows=windows, train_steps=0, seed=args.seed)
        folder = report.start_run("compress-smollm2", {"verb": "demo", "windows": windows, "seed": args.seed}, room)
        result = demo.run(options, folder)
    by_name = {row["name"]: row for row in result["rows"]}
    f32, int8, plain, int4 = (by_name[name] for name in ("f32", "int8", "int8-weight", "int4"))
    full = windows == 16 and "wikitext2-test" in result["text"]["origin"]
    entries: list[tuple] = [
        ("f32 NLL", f32["nll"], "nats", f"{REFERENCE} +- 0.0005" if full else None),
        ("bf16 NLL change", by_name["bf16"]["nll_change"], "nats", "0 +- 0.003"),
        ("int8 bits per weight", int8["bits_per_weight"], "bits", "<= 8.4"),
        ("int8-weight NLL change", plain["nll_change"], "nats", "<= 0.002"),
        ("int8 NLL change", int8["nll_change"], "nats", "<= 0.04"),
        ("int4 bits per weight", int4["bits_per_weight"], "bits", "<= 5.1"),
        ("int4 NLL change", int4["nll_change"], "nats", None),
        ("sparse50-int8 bits per weight, packed", by_name["sparse50-int8"]["bits_per_weight"], "bits", None),
        ("sparse50-int8 NLL change", by_name["sparse50-int8"]["nll_change"], "nats", None),
        ("int8 decode, 8 streams, over f32", int8["decode_tps_8"] / f32["decode_tps_8"], "x", ">= 2.5"),
        ("int8 prefill 512 over f32", int8["prefill_tps"] / f32["prefill_tps"], "x", ">= 2"),
        ("int8 decode, 1 stream", int8["decode_tps_1"], "tokens/s", ">= 45"),
        ("int8 decode, 8 streams", int8["decode_tps_8"], "tokens/s", ">= 250"),
    ]
    for row in result["rows"]:
        excess = abs(row["file_bytes"] / row["packed_bytes"] - 1)
        entries.append((f"{row['name']} file over packed bytes", 100 * excess, "%", "<= 1"))
        for key in ("prefill_tps", "decode_tps_1", "decode_tps_8"):
            entries.append((f"{row['name']} {key}", row[key], "tokens/s"))
    protocol = {"text": result["text"], "windows": windows, "window": 512, "seed": args.seed, **folder.versions}
    report.emit(report.rows(entries, time.perf_counter() - began, protocol), args.json or "-")


if __name__ == "__main__":
    main()
