"""What PEFT computes with adapters on the tiny models of this folder, stored for
`tests/hub/test_adapters.py`: run by hand.

    .peers/bin/python -m pip install peft
    # adapters/NAME: PEFT's folder, and logits.npz beside it
    .peers/bin/python tests/hub/goldens/make_adapters.py
    # PEFT reads what our save_adapters writes
    .peers/bin/python tests/hub/goldens/make_adapters.py --check

`--ours` names the Python that has jaxmodel (default .venv/bin/python).

With PEFT 0.21.2, transformers 5.24.0 and torch 2.13.0 the check finds logits within 1e-5 of each
other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[2]

# name -> the model, the class that reads it, settings of `LoraConfig`
KINDS = {
    "llama": (
        "llama-untied",
        "CausalLM",
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
    "patterns": (
        "llama-untied",
        "CausalLM",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"],
            "rank_pattern": {"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 3},
            "alpha_pattern": {"q_proj": 5},
            "use_rslora": True,
            "modules_to_save": ["norm"],
        },
    ),
    "gpt2": (
        "gpt2-a",
        "CausalLM",
        {"r": 3, "lora_alpha": 9, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "phi3": (
        "phi3-a",
        "CausalLM",
        {"r": 3, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
    ),
    "some_layers": (
        "qwen2-a",
        "CausalLM",
        {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1], "r": 2},
    ),
    "bert": ("bert-a", "", {"r": 2, "target_modules": ["query", "output.dense"]}),
    "vit": (
        "vit-a",
        "ImageClassification",
        {"r": 2, "target_modules": ["query", "projection"], "modules_to_save": ["classifier"]},
    ),
}

OURS = """
import sys, jax, jax.numpy as jnp, numpy as np
from jaxmodel import adapt, hub, train, tree

where, rules, out = sys.argv[1], sys.argv[2], sys.argv[3]
bundle = hub.from_pretrained(where)
model, params = adapt.lora(
    bundle.model, bundle.params, [(rules, adapt.LoRA(3, 5.0)), (".*", None)], jax.random.key(0)
)
rng = np.random.default_rng(0)
some = lambda p, a: (
    jnp.asarray(0.2 * rng.normal(size=a.shape), a.dtype) if p.endswith("_lora/up") else a
)
params = tree.map_leaves(some, params)
bundle = hub.Bundle(model, params, bundle.processor)
hub.save_adapters(bundle, out, base=where)
tokens = np.load(sys.argv[4])["tokens"]
np.save(out + "/../ours.npy", model.apply(params, {"tokens": jnp.asarray(tokens)}).logits)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ours", default=str(REPO / ".venv/bin/python"))
    options = parser.parse_args()
    if options.check:
        rules = {
            "llama-untied": ".*/(q|v|down)|head",
            "gpt2-a": ".*/(q|v|up)",
            "qwen3-a": "blocks/1/.*/(gate|k)",
        }
        rules["phi3-a"] = ".*/(q|v|gate)"
        for name, rule in rules.items():
            check(name, rule, options.ours)
        return
    for name, (of, kind, settings) in KINDS.items():
        write(name, of, kind, settings)


def read(of: str, kind: str) -> torch.nn.Module:
    cls = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    return cls.from_pretrained(HERE / of, dtype=torch.float32, attn_implementation="eager").eval()


def write(name: str, of: str, kind: str, settings: dict) -> None:
    """A folder of PEFT's, with random weights, and what it computes."""
    torch.manual_seed(0)
    model = peft.get_peft_model(read(of, kind), peft.LoraConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.3)
    model.peft_config["default"].base_model_name_or_path = of
    folder = HERE / "adapters" / name
    model.eval().save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    with torch.no_grad():
        if name == "vit":
            pixels = torch.randn(2, 3, *(2 * [model.config.image_size]))
            given = {"pixels": pixels.permute(0, 2, 3, 1).numpy()}
            logits = model(pixel_values=pixels).logits
        else:
            tokens = torch.randint(0, model.config.vocab_size, (2, 7))
            out = model(input_ids=tokens)
            given = {"tokens": tokens.numpy()}
            logits = out[0]
    np.savez(folder / "logits.npz", logits=logits.numpy(), **given)
    print(name, sorted(path.name for path in folder.iterdir()), logits.abs().max())


def check(of: str, rules: str, ours: str) -> None:
    """Our folder in PEFT."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/adapters"
        subprocess.run(
            [ours, "-c", OURS, str(HERE / of), rules, folder, str(HERE / f"{of}.npz")], check=True
        )
        model = peft.PeftModel.from_pretrained(read(of, "CausalLM"), folder)
        with torch.no_grad():
            logits = model(
                input_ids=torch.as_tensor(np.load(HERE / f"{of}.npz")["tokens"]).long()
            ).logits.numpy()
        wanted = np.load(f"{scratch}/ours.npy")
    print(
        of,
        "largest difference of the logits",
        np.abs(logits - wanted).max(),
        "of",
        np.abs(wanted).max(),
    )
    if np.abs(logits - wanted).max() > 1e-4:
        sys.exit(1)


if __name__ == "__main__":
    main()
