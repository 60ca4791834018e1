"""Small real files of every kind that the project reads, made once; each is fuzzed in a copy of its own."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodel import compress, hub, train
from jaxmodel.data import tokenize
from jaxmodel.models import gpt2

GOLDENS = Path(__file__).resolve().parents[1] / "hub" / "goldens"
TEXTS = ["A dog runs over the field and back.", "Prices rise in spring.", "Nothing is said of it."] * 4
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
FOLDERS = ("llama-tied", "gemma2-a", "bert-a", "bert-b", "clip-a", "vit-a", "qwen3-a", "mixtral-a", "t5-a")


def make(room: Path) -> list[tuple[str, str]]:
    """Make all samples in a folder; the name of each and how it is read (see `fuzz.worker.READERS`)."""
    found = []
    for name in FOLDERS:
        if (GOLDENS / name).is_dir():
            shutil.copytree(GOLDENS / name, room / name)
            found.append((name, "load"))
    tokenizer = hub.train_bpe([], 257)
    tokenizer = hub.Tokenizer(tokenizer.backend, (0,), 0, 0, chat_template=TEMPLATE)
    model = gpt2.model(gpt2.Config(vocab=257, width=16, depth=2, heads=2, context=64))
    bundle = hub.Bundle(model, jax.jit(model.init)(jax.random.key(0)), tokenizer)
    bundle.save_pretrained(room / "plain")
    smaller, _ = compress.compress_bundle(bundle, compress.named("int4"))
    smaller.save_pretrained(room / "int4")
    found += [("plain", "chat"), ("plain", "generate"), ("int4", "load")]
    _gguf(room / "gguf")
    found.append(("gguf", "load"))
    found += [(name, kind) for name, kind in _data(room)]
    _images(room / "images")
    found.append(("images", "images"))
    tokenize(TEXTS, tokenizer, room / "shards", shard_tokens=200)
    found.append(("shards", "shards"))
    state = train.TrainState(jax.numpy.int32(3), jax.numpy.int32(3), {"w": jax.numpy.ones((4, 3))}, (), {})
    with train.Checkpoints(room / "checkpoints", identity={"a": 1}) as checkpoints:
        checkpoints.save(state)
    found.append(("checkpoints", "checkpoints"))
    run = room / "run"
    run.mkdir()
    config = {"verb": "models", "runs": "runs", "json": None}
    for name, value in {"config": config, "versions": {"jax": "1"}, "report": {"rows": [{"a": 1.0}]}}.items():
        (run / f"{name}.json").write_text(json.dumps(value))
    found.append(("run", "rerun"))
    return found


def _data(room: Path) -> list[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from array_record.python.array_record_module import ArrayRecordWriter

    for kind in ("txt", "jsonl", "jsonl.gz", "csv", "json", "parquet", "arrayrecord"):
        (room / f"data.{kind}").mkdir()
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    (room / "data.txt" / "a.txt").write_text("\n\n".join(TEXTS))
    (room / "data.jsonl" / "a.jsonl").write_text(lines)
    (room / "data.jsonl.gz" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (room / "data.json" / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    with (room / "data.csv" / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])
    pq.write_table(pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))}), room / "data.parquet" / "a.parquet")
    writer = ArrayRecordWriter(str(room / "data.arrayrecord" / "a.arrayrecord"), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return [(path.name, "documents") for path in sorted(room.glob("data.*"))]


def _images(room: Path) -> None:
    from PIL import Image

    for i, name in enumerate(("a/1.png", "a/2.jpg", "b/3.bmp")):
        (room / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3) + i
        Image.fromarray(pixels).save(room / name)


def _gguf(room: Path) -> None:
    import gguf

    room.mkdir()
    writer = gguf.GGUFWriter(room / "a.gguf", "llama")
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    sizes: dict[str, Any] = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "context_length": 64}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 16, "vocab_size": 8}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "c", "d", "cd", "<s>", "</s>"])
    writer.add_array("tokenizer.ggml.merges", ["a b", "c d"])
    matrices = {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    matrices |= {f"ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    for name, shape in matrices.items():
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
    writer.add_tensor("token_embd.weight", rng.standard_normal((8, 32)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
