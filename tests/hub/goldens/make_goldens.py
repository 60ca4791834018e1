"""What transformers computes, stored for `tests/hub/test_goldens.py`: run by hand, never by the tests.

    make peers                                             # .peers/: torch, transformers 5.23.0, gguf
    .peers/bin/python -m pip install accelerate            # which transformers wants for reading GGUF
    .peers/bin/python tests/hub/goldens/make_goldens.py            # writes the folders and .npz beside this file
    .peers/bin/python tests/hub/goldens/make_goldens.py --check    # transformers reads what our save_pretrained writes

Both take about half a minute on two cores. `--ours` names the Python that has jaxmodel (default .venv/bin/python): it
says where the SmolLM2 GGUF is, and writes the folders that `--check` and the golden NLL read.

Each tiny model (random weights, biases and norms too) is a folder as transformers writes it and a `.npz`:

    tokens, mask, logits              [2, T]: a full row (of the whole context where short), one padded on the right
    positions, apart, apart_logits    one row of tokens `apart` at positions with gaps, up to the last of the context
    loss, grad:NAME                   mean cross entropy of the next token over what is not padding; its gradients

`smollm2.npz` has the tokens of text.txt in windows and the negative log-likelihood of each by SmolLM2 in float32.

With torch 2.13.0: the NLL by the GGUF and by our folder is equal bit for bit, both tokenizers give the same ids, and
`--check` finds logits within 2e-5 for both families, tied and untied, float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[2]
TEXT = HERE / "text.txt"
WINDOW = 128

# name -> config, length of the padded row, how many bytes a shard has
MODELS = {
    "gpt2-a": (
        GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=4, n_positions=24, bos_token_id=0, eos_token_id=0),
        15,
        "1GB",
    ),
    "gpt2-b": (
        GPT2Config(
            vocab_size=64,
            n_embd=12,
            n_layer=3,
            n_head=1,
            n_positions=32,
            layer_norm_epsilon=1e-2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        9,
        "1GB",
    ),
    "llama-untied": (
        LlamaConfig(
            vocab_size=97,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            rms_norm_eps=1e-2,
        ),
        11,
        "1GB",
    ),
    "llama-tied": (
        LlamaConfig(
            vocab_size=101,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,  # not hidden_size / heads
            intermediate_size=24,
            max_position_embeddings=24,
            tie_word_embeddings=True,
        ),
        17,
        "12KB",  # several files and an index
    ),
}
GRADIENTS = {
    "gpt2": (
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
    ),
    "llama": (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ),
}


def tiny(name: str) -> None:
    """One model: its folder and its `.npz`."""
    config, short, shard = MODELS[name]
    seed = sorted(MODELS).index(name)
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():  # norms at 1 and biases at 0 would hide a wrong name
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            value.copy_(
                1 + 0.3 * noise if key.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.3 * noise
            )
    model.save_pretrained(HERE / name, max_shard_size=shard)
    (HERE / name / "generation_config.json").unlink()

    context = config.max_position_embeddings
    length = min(context, 24 if config.model_type == "llama" else 32)
    tokens = torch.randint(config.vocab_size, (2, length), generator=draw)
    mask = torch.ones_like(tokens)
    tokens[1, short:], mask[1, short:] = 0, 0
    logits = model(input_ids=tokens, attention_mask=mask).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()
    loss.backward()
    named = dict(model.named_parameters())

    gaps = torch.tensor([[0, 1, context // 3, context // 3 + 1, context // 2, context - 3, context - 2, context - 1]])
    apart = torch.randint(config.vocab_size, gaps.shape, generator=draw)
    with torch.no_grad():  # with a mask, else transformers takes a gap for the start of another document
        apart_logits = model(input_ids=apart, position_ids=gaps, attention_mask=torch.ones_like(apart)).logits
    save(
        name,
        tokens=tokens.to(torch.int32),
        mask=mask.bool(),
        logits=logits,
        positions=gaps.to(torch.int32),
        apart=apart.to(torch.int32),
        apart_logits=apart_logits,
        loss=loss,
        **{f"grad:{key}": named[key].grad for key in GRADIENTS[config.model_type]},
    )
    print(f"{name}: logits from {logits.min():.2f} to {logits.max():.2f}, loss {loss:.4f}")


def smollm2(ours: str) -> None:
    """The NLL of text.txt: by the GGUF as transformers reads it, and by the folder that we write; they must agree."""
    gguf_path = Path(run(ours, "from jaxmodel.hub.gguf import find_smollm2; print(find_smollm2())").strip())
    with tempfile.TemporaryDirectory() as folder:
        run(ours, "import sys, jaxmodel; jaxmodel.from_pretrained('smollm2-135m').save_pretrained(sys.argv[1])", folder)
        tokenizers = {"gguf": AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)}
        tokenizers["folder"] = AutoTokenizer.from_pretrained(folder)
        ids = {key: tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"] for key, tokenizer in tokenizers.items()}
        assert ids["gguf"] == ids["folder"], "the two tokenizers differ"
        count = len(ids["folder"]) // WINDOW
        windows = torch.tensor(ids["folder"][: count * WINDOW]).reshape(count, WINDOW)
        nll = {
            "gguf": token_nll(
                AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32),
                windows,
            ),
            "folder": token_nll(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), windows),
        }
    apart = (nll["gguf"] - nll["folder"]).abs().max().item()
    assert apart < 2e-4, f"the GGUF and our folder differ by {apart}"
    mean = nll["gguf"].mean()
    save("smollm2", windows=windows.to(torch.int32), token_nll=nll["gguf"].float(), nll=mean)
    print(f"smollm2: {windows.numel()} tokens, mean NLL {mean:.6f}; GGUF and folder differ by at most {apart:.1e} a token")


def token_nll(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """[N, T-1], in nats."""
    with torch.no_grad():
        logits = model.eval()(input_ids=windows).logits[:, :-1].double()  # the sum over V in float32 is off by 3e-4
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


WRITE = """
import sys, dataclasses, json, pathlib
import jax, numpy as np
from jaxmodel import hub, tree
from jaxmodel.models import families

out, text = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_text(encoding="utf-8")
LLAMA = {"tied": True, "head_width": 12, "rope_base": 500.0, "norm_eps": 1e-2}
processor = hub.train_bpe([text], vocab_size=300)
tokens = np.array([processor.encode(text)[:60], processor.encode(text)[60:120]], np.int32)
for name, change in {"gpt2": {}, "llama": {}, "llama-tied": LLAMA, "gpt2-bf16": {"norm_eps": 1e-2}}.items():
    module = families()[name.split("-")[0]]
    change = {"vocab": processor.vocab_size, "init_scale": 0.2, **change}
    model = module.model(dataclasses.replace(module.SIZES["tiny"], **change))
    params = model.init(jax.random.key(1))
    noise = lambda path, a: a + 0.1 * jax.random.normal(jax.random.key(len(path)), a.shape)
    params = tree.map_leaves(noise, params)
    if name.endswith("bf16"):
        params = tree.cast(params, "bfloat16")
    hub.Bundle(model, params, processor, {"name": name}).save_pretrained(out / name)
    logits = model.apply(tree.cast(params, "float32"), tokens).logits
    np.savez(out / (name + ".npz"), tokens=tokens, logits=logits, eos=processor.eos_ids[0])
"""


def check(ours: str) -> None:
    """transformers loads the folders that we write, and gives the same logits and tokens."""
    with tempfile.TemporaryDirectory() as out:
        run(ours, WRITE, out, str(TEXT))
        for file in sorted(Path(out).glob("*.npz")):
            stored, folder = np.load(file), file.with_suffix("")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), f"{file.stem}: {info}"
            assert next(model.parameters()).dtype == (torch.bfloat16 if "bf16" in file.stem else torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            text = TEXT.read_text(encoding="utf-8")
            ids = tokenizer(text)["input_ids"]
            assert ids[:120] == stored["tokens"].ravel().tolist() and tokenizer.decode(ids) == text, f"{file.stem}: tokens"
            assert tokenizer.eos_token_id == model.generation_config.eos_token_id == int(stored["eos"]), f"{file.stem}: end"
            with torch.no_grad():
                logits = model.float().eval()(input_ids=torch.tensor(stored["tokens"], dtype=torch.int64)).logits.numpy()
            apart = np.abs(logits - stored["logits"]).max()
            assert apart < 2e-4, f"{file.stem}: logits differ by {apart}"
            print(f"{file.stem}: {type(model).__name__}, logits within {apart:.1e}, {len(ids)} tokens the same")


def run(python: str, program: str, *args: str) -> str:
    done = subprocess.run([python, "-c", program, *args], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def save(name: str, **arrays: torch.Tensor) -> None:
    np.savez_compressed(HERE / f"{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()})


def main() -> None:
    """Write the goldens, or check ours with transformers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="load folders that our save_pretrained writes; store nothing")
    parser.add_argument("--ours", default=str(REPO / ".venv/bin/python"), help="the Python that has jaxmodel")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.check:
        check(options.ours)
        return
    for name in MODELS:
        tiny(name)
    smollm2(options.ours)


if __name__ == "__main__":
    main()
