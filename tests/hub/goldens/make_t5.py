"""What torch and transformers compute for encoders with decoders, stored for
`tests/hub/test_t5_goldens.py` and `tests/models`.

    make peers                                          # .peers/: torch, transformers 5.23.0
    .peers/bin/python tests/hub/goldens/make_t5.py  # writes the folders and .npz of goldens/seq2seq
    # transformers reads what our save_pretrained writes
    .peers/bin/python tests/hub/goldens/make_t5.py --check

Both take some seconds. `--ours` names the Python that has jaxmodel (default .venv/bin/python),
which `--check` runs.

Each tiny T5 (random weights, norms too) is a folder as transformers writes it and a `.npz`:

    source, source_mask     [2, S]: a full row, longer than the largest bucket, and one padded on
                            the right
    tokens, mask, logits    [2, T]: the targets, the second padded on the right
    loss, grad:NAME         mean cross entropy of the next token over what is not padding; its
                            gradients
    greedy                  [2, N]: `generate` without beams, of which the second row ends early
    beams, beam_scores      [2, 3, N], [2, 3]: `generate` with three, a length penalty of 0, and the
                            sums of log probabilities

`heads.npz` has a head of its own for the first, and its logits with it and without, by what
config.json says. `buckets.npz` has the bucket of each distance for several tables; `recurrent.npz`
weights, inputs and outputs of `torch.nn.LSTM` and `GRU`, in both directions, two layers, rows of
unequal length; `transformer.npz` the same of a stack of `torch.nn.TransformerEncoderLayer` and
`DecoderLayer` each, norms behind and in front.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

HERE = Path(__file__).resolve().parent / "seq2seq"
REPO = HERE.parents[3]
END = 1

MODELS = {
    "t5-tied": T5Config(
        vocab_size=97,
        d_model=16,
        d_kv=5,  # 3 heads of 5 are not the width
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-3,
        decoder_start_token_id=0,
    ),
    "t5-gated": T5Config(
        vocab_size=101,
        d_model=16,
        d_kv=4,
        d_ff=20,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=2,
    ),
}
GRADIENTS = {
    "shared.weight",
    "lm_head.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.block.1.layer.0.SelfAttention.k.weight",
    "encoder.final_layer_norm.weight",
    "decoder.block.1.layer.1.EncDecAttention.v.weight",
    "decoder.block.0.layer.1.EncDecAttention.q.weight",
    "decoder.block.0.layer.2.DenseReluDense.wi.weight",
    "decoder.block.0.layer.2.DenseReluDense.wi_0.weight",
}


def randomize(model: torch.nn.Module, draw: torch.Generator, size: float = 0.3) -> None:
    """Norms at 1 and biases at 0 would hide a wrong name."""
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = size * torch.randn(value.shape, generator=draw)
            value.copy_(1 + noise if "norm" in key and key.endswith("weight") else noise)


def t5(name: str) -> None:
    """One model: its folder and its `.npz`."""
    config = MODELS[name]
    draw = torch.Generator().manual_seed(sorted(MODELS).index(name))
    torch.manual_seed(0)
    model = T5ForConditionalGeneration._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    if (
        not config.scale_decoder_outputs
    ):  # version 1.1, whose head transformers 5 ties unless it is told apart
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    randomize(model, draw)
    if config.scale_decoder_outputs:
        with torch.no_grad():
            model.shared.weight *= 3  # else logits are too small to mean anything
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)

    source = torch.randint(3, config.vocab_size, (2, 29), generator=draw)
    source_mask = torch.ones_like(source)
    source[1, 17:], source_mask[1, 17:] = 0, 0
    tokens = torch.randint(3, config.vocab_size, (2, 25), generator=draw)
    tokens[:, 0] = config.decoder_start_token_id
    mask = torch.ones_like(tokens)
    tokens[1, 13:], mask[1, 13:] = 0, 0
    inputs = {"input_ids": source, "attention_mask": source_mask}
    logits = model(**inputs, decoder_input_ids=tokens, decoder_attention_mask=mask).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    loss = (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()
    loss.backward()
    grads = {
        f"grad:{key}": value.grad for key, value in model.named_parameters() if key in GRADIENTS
    }

    options = {
        "max_new_tokens": 9,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    search = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "length_penalty": 0.0,
        "early_stopping": True,
        "output_scores": True,
    }
    first = model.generate(
        **inputs, eos_token_id=config.vocab_size - 1, **options, **search
    ).sequences
    end = int(first[4, 4])  # so that some text of the second row ends early
    greedy = model.generate(**inputs, eos_token_id=end, **options).sequences
    beams = model.generate(**inputs, eos_token_id=end, **options, **search)
    found = torch.nn.functional.pad(beams.sequences[:, 1:], (0, 9 + 1 - beams.sequences.shape[1]))
    save(
        name,
        source=source.int(),
        source_mask=source_mask.bool(),
        tokens=tokens.int(),
        mask=mask.bool(),
        logits=logits,
        loss=loss,
        end=torch.tensor(end),
        greedy=greedy[:, 1:].int(),
        beams=found.reshape(2, 3, 9).int(),
        beam_scores=beams.sequences_scores.reshape(2, 3),
        **grads,
    )
    print(
        f"{name}: logits from {logits.min():.2f} to {logits.max():.2f}, loss {loss:.4f}, end {end}"
    )
    print(f"greedy {greedy.tolist()}, beams {found.tolist()}")


HEADS = {  # what config.json says, and whether the file has a head of its own
    "scaled-tied": ({"scale_decoder_outputs": True, "tie_word_embeddings": True}, False),
    "scaled-own": ({"scale_decoder_outputs": True, "tie_word_embeddings": True}, True),
    "plain-tied": ({"scale_decoder_outputs": False, "tie_word_embeddings": True}, False),
    "plain-own": ({"scale_decoder_outputs": False, "tie_word_embeddings": True}, True),
    "first-tied": ({"tie_word_embeddings": False}, False),
    "first-own": ({"tie_word_embeddings": False}, True),
}


def heads() -> None:
    """`heads.npz`: a head, and the logits of the folder t5-tied with it and without, by what
    config.json says of both.
    """
    stored = np.load(HERE / "t5-tied.npz")
    tensors = load_file(HERE / "t5-tied" / "model.safetensors")
    head = torch.randn(tensors["shared.weight"].shape, generator=torch.Generator().manual_seed(5))
    inputs = {
        key: torch.tensor(stored[name][:1, :9]).long()
        for key, name in (("input_ids", "source"), ("decoder_input_ids", "tokens"))
    }
    found = {"head": head}
    for name, (said, own) in HEADS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = json.loads((HERE / "t5-tied" / "config.json").read_text())
            config = {
                key: value for key, value in config.items() if key not in HEADS["scaled-tied"][0]
            } | said
            Path(folder, "config.json").write_text(json.dumps(config))
            save_file(
                tensors | ({"lm_head.weight": head} if own else {}),
                Path(folder, "model.safetensors"),
                {"format": "pt"},
            )
            found[name] = T5ForConditionalGeneration.from_pretrained(folder)(**inputs).logits
    save("heads", **found)


def buckets() -> None:
    """The tables of T5's relative positions: [distances from -600 to 600] for (buckets, largest
    distance, both sides).
    """
    gaps = torch.arange(-600, 601)
    tables = {}
    for count, largest in ((32, 128), (8, 20), (12, 16), (6, 30), (7, 9), (64, 500)):
        for both in (False, True):
            found = T5Attention._relative_position_bucket(
                gaps, bidirectional=both, num_buckets=count, max_distance=largest
            )
            tables[f"{count},{largest},{int(both)}"] = found.to(torch.int8)
    save("buckets", **tables)


def recurrent() -> None:
    """Two layers of each cell in both directions over padded rows."""
    draw = torch.Generator().manual_seed(7)
    arrays: dict[str, torch.Tensor] = {}
    for kind, cell in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        model = cell(8, 4, num_layers=2, bidirectional=True, batch_first=True)
        randomize(model, draw, 0.6)
        x = torch.randn((3, 7, 8), generator=draw)
        lengths = torch.tensor([7, 3, 5])
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        out, last = model(packed)
        shown, _ = torch.nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        states = (
            torch.stack(last) if kind == "lstm" else last[None]
        )  # [n, layers * directions, B, H]
        arrays |= {f"{kind}:{key}": value for key, value in model.named_parameters()}
        arrays |= {
            f"{kind}:x": x,
            f"{kind}:lengths": lengths,
            f"{kind}:shown": shown,
            f"{kind}:last": states,
        }
    save("recurrent", **arrays)


def transformer() -> None:
    """Stacks of torch's own layers, behind the embedding: two that encode, two that decode, with
    masks.
    """
    draw = torch.Generator().manual_seed(8)
    arrays = {}
    for pre in (False, True):
        options = {
            "dim_feedforward": 12,
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": pre,
            "layer_norm_eps": 1e-3,
        }
        last = lambda pre=pre: torch.nn.LayerNorm(8, eps=1e-3) if pre else None
        encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(8, 2, **options),
            2,
            norm=last(),
            enable_nested_tensor=False,
        )
        decoder = torch.nn.TransformerDecoder(
            torch.nn.TransformerDecoderLayer(8, 2, **options), 2, norm=last()
        )
        for part in (encoder, decoder):
            randomize(part, draw)
        source, target = (torch.randn((2, n, 8), generator=draw) for n in (6, 5))
        padding = torch.arange(6)[None] >= torch.tensor([[6], [4]])
        memory = encoder(source, src_key_padding_mask=padding)
        causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
        out = decoder(target, memory, tgt_mask=causal, memory_key_padding_mask=padding)
        form = "pre" if pre else "post"
        arrays |= {f"{form}:encoder.{key}": value for key, value in encoder.named_parameters()}
        arrays |= {f"{form}:decoder.{key}": value for key, value in decoder.named_parameters()}
        named = {"source": source, "target": target, "mask": ~padding, "memory": memory, "out": out}
        arrays |= {f"{form}:{key}": value for key, value in named.items()}
    save("transformer", **arrays)


WRITE = """
import sys, dataclasses, pathlib
import jax, numpy as np
from jaxmodel import hub, tree
from jaxmodel.models import t5

out = pathlib.Path(sys.argv[1])
rng = np.random.default_rng(0)
for name, change in {
    "tiny": {},
    "tiny-gated": {"start": 3},
    "tiny-bf16": {"buckets": 32, "distance": 9999},
}.items():
    size = t5.SIZES[name.removesuffix("-bf16")]
    model = t5.model(dataclasses.replace(size, vocab=77, head_scale=None, dropout=0.1, **change))
    noise = lambda path, a: a + 0.1 * jax.random.normal(jax.random.key(len(path)), a.shape)
    params = tree.map_leaves(noise, model.init(jax.random.key(1)))
    if name.endswith("bf16"):
        params = tree.cast(params, "bfloat16")
    hub.Bundle(model, params, None, {"name": name}).save_pretrained(out / name)
    source, tokens = (rng.integers(0, 77, (2, n)).astype(np.int32) for n in (23, 18))
    mask = np.arange(23) < np.array([[23], [9]])
    inputs = {"source": source, "source_mask": mask, "tokens": tokens}
    logits = model.apply(tree.cast(params, "float32"), inputs).logits
    np.savez(out / (name + ".npz"), logits=logits, start=model.config.start, **inputs)
"""


def check(ours: str) -> None:
    """transformers loads the folders that we write, and gives the same logits."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([ours, "-c", WRITE, out], cwd=REPO, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        for file in sorted(Path(out).glob("*.npz")):
            stored = np.load(file)
            folder = file.with_suffix("")
            model, info = T5ForConditionalGeneration.from_pretrained(
                folder, output_loading_info=True
            )
            assert not any(info.values()), f"{file.stem}: {info}"
            assert next(model.parameters()).dtype == (
                torch.bfloat16 if "bf16" in file.stem else torch.float32
            )
            assert (
                model.config.decoder_start_token_id == int(stored["start"])
                and model.config.dropout_rate == 0.1
            )
            inputs = {
                key: torch.tensor(stored[key], dtype=torch.int64)
                for key in ("source", "source_mask", "tokens")
            }
            with torch.no_grad():
                logits = (
                    model.float()
                    .eval()(inputs["source"], inputs["source_mask"], inputs["tokens"])
                    .logits.numpy()
                )
            apart = np.abs(logits - stored["logits"]).max()
            assert apart < 2e-4 and np.abs(logits).max() > 1, (
                f"{file.stem}: logits differ by {apart}"
            )
            print(
                f"{file.stem}: {type(model).__name__}, logits within {apart:.1e} of "
                f"{np.abs(logits).max():.1f}"
            )


def save(name: str, **arrays: torch.Tensor) -> None:
    np.savez_compressed(
        HERE / f"{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()}
    )


def main() -> None:
    """Write the goldens, or check ours with transformers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="load folders that our save_pretrained writes; store nothing",
    )
    parser.add_argument(
        "--ours", default=str(REPO / ".venv/bin/python"), help="the Python that has jaxmodel"
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.check:
        check(options.ours)
        return
    HERE.mkdir(exist_ok=True)
    for name in MODELS:
        t5(name)
    heads()
    buckets()
    recurrent()
    transformer()


if __name__ == "__main__":
    main()
