"""Small real files of every kind that the project reads, made once; each is fuzzed in a copy of its
own.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodel import adapt, checkpoint, compress, hub, train
from jaxmodel.data import tokenize
from jaxmodel.models import bert, gpt2

GOLDENS = Path(__file__).resolve().parents[1] / "hub" / "goldens"
TEXTS = [
    "A dog runs over the field and back.",
    "Prices rise in spring.",
    "Nothing is said of it.",
] * 4
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools %}{{ "
    "tools | tojson }}{% endif %}"
)
TRAINING = [
    "--context",
    "8",
    "--batch",
    "2",
    "--eval-batches",
    "1",
    "--sample",
    "a",
    "--log-every",
    "1",
]
NEW = ["--vocab", "257", "--width", "16", "--depth", "1", "--heads", "2"]
RECIPE = {
    "base": "int4-rtn",
    "rules": {"blocks/0/.*/(q|k|v|o)": "rtn(bits=8)", "?head": ""},
    "compute": "bfloat16",
    "name": "mixed",
}
FOLDERS = (
    "llama-tied",
    "gemma2-a",
    "bert-a",
    "bert-b",
    "clip-a",
    "vit-a",
    "qwen3-a",
    "mixtral-a",
    "t5-a",
)


def make(room: Path) -> list[tuple[str, str]]:
    """Make all samples in a folder; the name of each and how it is read (see
    `fuzz.worker.READERS`).
    """
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
    smaller, _ = compress.compress_bundle(bundle, compress.get_recipe("int4-rtn"))
    smaller.save_pretrained(room / "int4")
    found += [("plain", "chat"), ("plain", "generate"), ("int4", "load")]
    adapted = adapt.lora(
        model, bundle.params, [(".*/(q|v)", adapt.LoRA(2)), (".*", None)], jax.random.key(1)
    )
    hub.save_adapters(hub.Bundle(*adapted, tokenizer), room / "adapters")
    _classifier(room / "classifier", tokenizer)
    found += [("adapters", "adapters"), ("classifier", "predict")]
    _tokenizers(room)
    found += [(name, "tokenizer") for name in ("bytes", "words", "pieces")]
    (room / "recipe").mkdir()
    (room / "recipe" / "mixed.json").write_text(json.dumps(RECIPE))
    (room / "recipe" / "mixed.yaml").write_text(json.dumps(RECIPE))  # which is YAML, too
    found.append(("recipe", "recipe"))
    _gguf(room / "gguf")
    found.append(("gguf", "load"))
    found += [(name, kind) for name, kind in _data(room)]
    _images(room / "images")
    found.append(("images", "images"))
    tokenize(TEXTS, tokenizer, room / "shards", shard_tokens=200)
    found.append(("shards", "shards"))
    state = train.TrainState(
        jax.numpy.int32(3), jax.numpy.int32(3), {"w": jax.numpy.ones((4, 3))}, (), {}
    )
    with checkpoint.Checkpoints(room / "checkpoints", identity={"a": 1}) as checkpoints:
        checkpoints.save(state)
    found.append(("checkpoints", "checkpoints"))
    text = str(room / "data.txt" / "a.txt")
    _left(
        room / "run",
        "eval",
        str(room / "plain"),
        "--data",
        text,
        "--window",
        "8",
        "--max-windows",
        "2",
    )
    found.append(("run", "rerun"))
    often = ["--steps", "2", "--save-every", "1"]
    _left(room / "trained", "train", "--data", text, "--heldout", text, *TRAINING, *NEW, *often)
    return [*found, ("trained", "resume"), ("trained", "replay")]


def _classifier(room: Path, tokenizer: hub.Tokenizer) -> None:
    model = bert.model(bert.Config(257, 32, 2, 4, 64, 32, "classify", ("no", "yes")))
    hub.Bundle(model, jax.jit(model.init)(jax.random.key(0)), tokenizer).save_pretrained(room)


def _left(room: Path, *words: str) -> None:
    """The folder that a command line leaves, in a process of its own: tests check types in this
    one, which changes what functions are called, and so the identity of a run.
    """
    runs = room.with_name("made")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-P", "-m", "jaxmodel", *words, "--runs", str(runs)]
    subprocess.run(command, env=environ, check=True, capture_output=True, cwd=room.parent)
    (made,) = runs.iterdir()
    made.rename(room)
    runs.rmdir()


def _tokenizers(room: Path) -> None:
    """One of each kind of model, with all that may stand around it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = ["<unk>", "<s>", "</s>", "a", "b", "ab", "##a", "##b", "d", "o", "g", "\u2581a"]
    ids = {name: i for i, name in enumerate(names)}
    kinds: dict[str, Any] = {
        "bytes": models.BPE(
            {**ids, "\u0120": 12, "\u0120a": 13}, [("a", "b"), ("\u0120", "a")], unk_token="<unk>"
        ),
        "words": models.WordPiece(ids, unk_token="<unk>"),
        "pieces": models.Unigram([(name, -float(i)) for i, name in enumerate(names)], unk_id=0),
    }
    around: dict[str, tuple[Any, Any, Any]] = {
        "bytes": (
            normalizers.NFC(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        ),
        "words": (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(),
        ),
        "pieces": (
            normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("''", '"')]),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
    }
    for name, kind in kinds.items():
        made = Tokenizer(kind)
        made.normalizer, made.pre_tokenizer, made.decoder = around[name]
        made.add_special_tokens(["<s>", "</s>"])
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        (room / name).mkdir()
        made.save(str(room / name / "tokenizer.json"))


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
    pq.write_table(
        pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))}),
        room / "data.parquet" / "a.parquet",
    )
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
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    sizes: dict[str, Any] = {
        "block_count": 1,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "context_length": 64,
    }
    sizes |= {
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "vocab_size": 8,
    }
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
        writer.add_tensor(
            f"blk.0.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind
        )
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
    writer.add_tensor("token_embd.weight", rng.standard_normal((8, 32)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
