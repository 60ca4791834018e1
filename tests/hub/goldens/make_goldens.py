"""What transformers computes, stored for `tests/hub/test_goldens.py`: run by hand, never by the
tests.

    make peers  # .peers/: torch, transformers 5.23.0, gguf
    .peers/bin/python -m pip install accelerate  # which transformers wants for reading GGUF
    # GPT-2 and SmolLM2: the folders and .npz beside this file
    .peers/bin/python tests/hub/goldens/make_goldens.py
    # the Llama family, and those that its config makes
    .peers/bin/python tests/hub/goldens/make_llama.py
    # transformers reads what our save_pretrained writes
    .peers/bin/python tests/hub/goldens/make_llama.py --check

Each takes about half a minute on two cores; `make_goldens.py --check` does the same for GPT-2.
Names of models behind the command write those alone. `--ours` names the Python that has jaxmodel
(default .venv/bin/python): it says where the SmolLM2 GGUF is, and writes the folders that `--check`
and the golden NLL read.

Each tiny model (random weights, biases and norms too) is a folder as transformers writes it and a
`.npz`:

    tokens, mask, logits              [2, T]: a full row (of the whole context where short), one
                                      padded on the right
    positions, apart, apart_logits    one row of tokens `apart` at positions with gaps, up to the
                                      last of the context
    loss, grad:NAME                   mean cross entropy of the next token over what is not padding;
                                      its gradients
    prompt, continued                 of a dynamic rotation: greedy tokens beyond its context
    load_balance                      where there are experts: transformers' loss of each layer by
                                      itself, summed

`smollm2.npz` has the tokens of text.txt in windows and the negative log-likelihood of each by
SmolLM2 in float32.

With torch 2.13.0: the NLL by the GGUF and by our folder is equal bit for bit, both tokenizers give
the same ids. `--check` finds logits within 3e-5 for every kind, tied and untied, float32 and
bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GPT2Config,
)

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[2]
TEXT = HERE / "text.txt"
WINDOW = 128


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One model to write.

    Attributes:
      seed: of its weights and tokens.
      config: of transformers.
      length: of the full row.
      short: tokens of the padded row.
      gradients: regular expression of the tensors whose gradients are kept.
      dtype: of the stored weights; all is computed in float32.
      shard: how many bytes a file of weights has.
    """

    seed: int
    config: transformers.PretrainedConfig
    length: int
    short: int
    gradients: str
    dtype: str = "bfloat16"
    shard: str = "1GB"


_GPT2: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
_KEPT = (
    r"transformer\.(wte\.weight|wpe\.weight|h\.1\.attn\.c_attn\.weight|h\.0\.attn\.c_attn\.bias)"
)
MODELS = {
    "gpt2-a": Tiny(
        0,
        GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=4, n_positions=24, **_GPT2),
        24,
        15,
        _KEPT,
        "float32",
    ),
    "gpt2-b": Tiny(
        1,
        GPT2Config(
            vocab_size=64,
            n_embd=12,
            n_layer=3,
            n_head=1,
            n_positions=32,
            layer_norm_epsilon=1e-2,
            tie_word_embeddings=False,
            **_GPT2,
        ),
        *(32, 9, _KEPT + r"|lm_head\.weight", "float32"),
    ),
    "gpt2-c": Tiny(
        29,
        GPT2Config(
            **{
                "vocab_size": 53,
                "n_embd": 12,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 24,
                "n_inner": 20,
                **_GPT2,
            },
            activation_function="gelu",
        ),
        *(17, 9, _KEPT),
    ),
}

# family, size and changes of what --check writes
WRITTEN = {"gpt2": ("gpt2", "tiny", {}), "gpt2-bf16": ("gpt2", "tiny", {"norm_eps": 1e-2})}

AROUND_ONE = r"(?!.*gemma).*(norm|ln_.)\.weight"  # Gemma's norms stand around zero


def tiny(name: str, spec: Tiny) -> None:
    """One model: its folder and its `.npz`."""
    config = spec.config
    kind = spec.config.model_type
    dtype = getattr(torch, spec.dtype)
    draw = torch.Generator().manual_seed(spec.seed)
    torch.manual_seed(spec.seed)
    auto = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
    model = auto.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():  # norms at 1 and biases at 0 would hide a wrong name
        for key, value in model.named_parameters():
            noise = 0.3 * torch.randn(value.shape, generator=draw)
            drawn = 1 + noise if re.fullmatch(AROUND_ONE, f"{kind}.{key}") else noise
            value.copy_(drawn.to(dtype).float())
    copy.deepcopy(model).to(dtype).save_pretrained(HERE / name, max_shard_size=spec.shard)
    (HERE / name / "generation_config.json").unlink()

    text = config.get_text_config()
    context, vocab = (
        text.max_position_embeddings,
        text.vocab_size - (3 if kind == "gemma3" else 0),
    )  # without those of images
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":  # which begins behind it
        context = int(context * rope["factor"])
    tokens = torch.randint(vocab, (2, spec.length), generator=draw)
    mask = torch.ones_like(tokens)
    tokens[1, spec.short :], mask[1, spec.short :] = 0, 0
    experts = {"output_router_logits": True} if kind in ("mixtral", "qwen3_moe") else {}
    out = model(input_ids=tokens, attention_mask=mask, **experts)
    losses = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    loss = (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()
    loss.backward()

    gaps = torch.tensor(
        [
            [
                0,
                1,
                context // 3,
                context // 3 + 1,
                context // 2,
                context - 3,
                context - 2,
                context - 1,
            ]
        ]
    )
    apart = torch.randint(vocab, gaps.shape, generator=draw)
    with (
        torch.no_grad()
    ):  # with a mask, else transformers takes a gap for the start of another document
        apart_logits = model(
            input_ids=apart, position_ids=gaps, attention_mask=torch.ones_like(apart)
        ).logits
    more = {"load_balance": load_balance(config, out, mask)} if experts else {}
    if rope.get("rope_type") == "dynamic":
        more |= grown(model, text.max_position_embeddings, draw)
    save(
        name,
        tokens=tokens.to(torch.int32),
        mask=mask.bool(),
        logits=out.logits,
        positions=gaps.to(torch.int32),
        apart=apart.to(torch.int32),
        apart_logits=apart_logits,
        loss=loss,
        **more,
        **{
            f"grad:{key}": grad
            for key, grad in gradients(model).items()
            if re.fullmatch(spec.gradients, key)
        },
    )
    print(f"{name}: logits from {out.logits.min():.2f} to {out.logits.max():.2f}, loss {loss:.4f}")


def grown(model: Any, trained: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """A text that almost fills the context of the training, and its greedy continuation."""
    prompt = torch.randint(model.config.vocab_size, (1, trained - 3), generator=draw)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}
    with torch.no_grad():
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    found = {"prompt": prompt, "continued": text[:, prompt.shape[1] :]}
    return {name: tokens.to(torch.int32) for name, tokens in found.items()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of the files: experts are one tensor in memory, and one each there."""
    found: dict[str, torch.Tensor] = {}
    mixtral = model.config.model_type == "mixtral"
    gate_name, up_name, down_name = (
        ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    )
    for key, value in model.named_parameters():
        grad = value.grad
        if grad is None:  # of the images
            continue
        stem = (
            key.replace(".mlp.", ".block_sparse_moe.")
            if mixtral
            else key.replace(".language_model.", ".")
        )
        if model.config.model_type == "gpt_oss":  # in files as in memory
            found[key] = grad
        elif key.endswith("experts.gate_up_proj"):
            for e, both in enumerate(grad):
                gate, up = both.chunk(2)
                found |= {
                    stem.replace("gate_up_proj", f"{e}.{gate_name}.weight"): gate,
                    stem.replace("gate_up_proj", f"{e}.{up_name}.weight"): up,
                }
        elif key.endswith("experts.down_proj"):
            found |= {
                stem.replace("down_proj", f"{e}.{down_name}.weight"): down
                for e, down in enumerate(grad)
            }
        else:
            found[stem] = grad
    return found


def load_balance(config: Any, out: Any, mask: torch.Tensor) -> torch.Tensor:
    """The sum of transformers' loss over the layers, each by itself."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_layers

    total = torch.zeros(())
    for logits in out.router_logits:
        best = torch.sort(logits.softmax(-1), descending=True).values
        gap = best[:, config.num_experts_per_tok - 1] - best[:, config.num_experts_per_tok]
        assert gap.min() > 1e-4, (
            f"a token stands between two experts ({gap.min():.1e}); take another seed"
        )
        total = total + of_layers((logits,), logits.shape[-1], config.num_experts_per_tok, mask)
    return total


def smollm2(ours: str) -> None:
    """The NLL of text.txt: by the GGUF as transformers reads it, and by the folder that we write;
    they must agree.
    """
    gguf_path = Path(
        run(ours, "from jaxmodel.hub.gguf import find_smollm2; print(find_smollm2())").strip()
    )
    with tempfile.TemporaryDirectory() as folder:
        run(
            ours,
            "import sys, jaxmodel; "
            "jaxmodel.from_pretrained('smollm2-135m').save_pretrained(sys.argv[1])",
            folder,
        )
        tokenizers = {
            "gguf": AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
        }
        tokenizers["folder"] = AutoTokenizer.from_pretrained(folder)
        ids = {
            key: tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
            for key, tokenizer in tokenizers.items()
        }
        assert ids["gguf"] == ids["folder"], "the two tokenizers differ"
        count = len(ids["folder"]) // WINDOW
        windows = torch.tensor(ids["folder"][: count * WINDOW]).reshape(count, WINDOW)
        nll = {
            "gguf": token_nll(
                AutoModelForCausalLM.from_pretrained(
                    gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
                ),
                windows,
            ),
            "folder": token_nll(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), windows
            ),
        }
    apart = (nll["gguf"] - nll["folder"]).abs().max().item()
    assert apart < 2e-4, f"the GGUF and our folder differ by {apart}"
    mean = nll["gguf"].mean()
    save("smollm2", windows=windows.to(torch.int32), token_nll=nll["gguf"].float(), nll=mean)
    print(
        f"smollm2: {windows.numel()} tokens, mean NLL {mean:.6f}; GGUF and folder differ by at "
        f"most {apart:.1e} a token"
    )


def token_nll(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """[N, T-1], in nats."""
    with torch.no_grad():
        logits = (
            model.eval()(input_ids=windows).logits[:, :-1].double()
        )  # the sum over V in float32 is off by 3e-4
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), windows[:, 1:], reduction="none"
    )


WRITE = """
import sys, dataclasses, json, pathlib
import jax, numpy as np
from jaxmodel import hub, ops, tree
from jaxmodel.models import families

out, text = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_text(encoding="utf-8")
processor = hub.train_bpe([text], vocab_size=300)
tokens = np.array([processor.encode(text)[:60], processor.encode(text)[60:120]], np.int32)
for name, (family, size, change) in json.loads(sys.argv[3]).items():
    module = families()[family]
    if "rope_scaling" in change:
        scaling = {
            key: tuple(v) if isinstance(v, list) else v for key, v in change["rope_scaling"].items()
        }
        change["rope_scaling"] = ops.RopeScaling(**scaling)
    change = {
        key: tuple(value) if isinstance(value, list) else value for key, value in change.items()
    }
    change = {"vocab": processor.vocab_size, "init_scale": 0.2, **change}
    model = module.model(dataclasses.replace(module.SIZES[size], **change))
    params = model.init(jax.random.key(1))
    noise = lambda path, a: a + 0.1 * jax.random.normal(jax.random.key(len(path)), a.shape)
    params = tree.map_leaves(noise, params)
    if name.endswith("bf16"):
        params = tree.cast(params, "bfloat16")
    hub.Bundle(model, params, processor, {"name": name}).save_pretrained(out / name)
    logits = model.apply(tree.cast(params, "float32"), tokens).logits
    np.savez(out / (name + ".npz"), tokens=tokens, logits=logits, eos=processor.eos_ids[0])
"""


def check(ours: str, written: Mapping[str, tuple[str, str, dict[str, Any]]]) -> None:
    """transformers loads the folders that we write as the kind that their names begin with, and
    gives the same logits and tokens.
    """
    with tempfile.TemporaryDirectory() as out:
        run(ours, WRITE, out, str(TEXT), json.dumps(written))
        for file in sorted(Path(out).glob("*.npz")):
            stored = np.load(file)
            folder = file.with_suffix("")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), f"{file.stem}: {info}"
            assert model.config.model_type == file.stem.split("-")[0], (
                f"{file.stem}: {model.config.model_type}"
            )
            assert next(model.parameters()).dtype == (
                torch.bfloat16 if "bf16" in file.stem else torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
            text = TEXT.read_text(encoding="utf-8")
            ids = tokenizer(text)["input_ids"]
            assert (
                ids[:120] == stored["tokens"].ravel().tolist() and tokenizer.decode(ids) == text
            ), f"{file.stem}: tokens"
            assert (
                tokenizer.eos_token_id == model.generation_config.eos_token_id == int(stored["eos"])
            ), f"{file.stem}: end"
            model.set_attn_implementation("eager")  # the others leave soft caps out
            with torch.no_grad():
                logits = (
                    model.float()
                    .eval()(input_ids=torch.tensor(stored["tokens"], dtype=torch.int64))
                    .logits.numpy()
                )
            apart = np.abs(logits - stored["logits"]).max()
            assert apart < 2e-4, f"{file.stem}: logits differ by {apart}"
            print(
                f"{file.stem}: {type(model).__name__}, logits within {apart:.1e}, {len(ids)} "
                f"tokens the same"
            )


def run(python: str, program: str, *args: str) -> str:
    done = subprocess.run([python, "-c", program, *args], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def save(name: str, **arrays: torch.Tensor) -> None:
    np.savez_compressed(
        HERE / f"{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()}
    )


def main(
    models: Mapping[str, Tiny],
    written: Mapping[str, tuple[str, str, dict[str, Any]]],
    others: Mapping[str, Callable[[str], None]] | None = None,
) -> None:
    """Write the goldens, or check ours with transformers."""
    makers = {
        name: lambda ours, name=name, spec=spec: tiny(name, spec) for name, spec in models.items()
    } | dict(others or {})
    parser = argparse.ArgumentParser(
        description="What transformers computes, stored for tests/hub/test_goldens.py."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(makers)}; default all"
    )
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
    transformers.logging.disable_progress_bar()
    if options.check:
        check(options.ours, written)
        return
    for name in options.names or makers:
        makers[name](options.ours)


if __name__ == "__main__":
    main(MODELS, WRITTEN, {"smollm2": smollm2})
