"""What transformers computes with encoders, stored for `tests/hub/test_encoder_goldens.py`: run by
hand, never by the tests.

    make peers  # .peers/: torch, transformers 5.23.0
    .peers/bin/python -m pip install pillow                        # for the image processors only
    # writes the folders and .npz beside this file
    .peers/bin/python tests/hub/goldens/make_encoders.py
    # transformers reads what our save_pretrained writes
    .peers/bin/python tests/hub/goldens/make_encoders.py --check

Both take about half a minute on two cores. `--ours` names the Python that has jaxmodel and
all-MiniLM-L6-v2.

Each tiny model (random weights, biases and norms too) is a folder as transformers writes it and a
`.npz`:

    in:NAME          inputs of our `apply`: tokens, types, mask (a full row, a padded one), pixels
                     `[B, Y, X, C]`
    logits           what `apply` gives: of tokens, of classes, pooled vectors, images by texts
    targets, weights of a cross entropy over the last axis of the logits
    loss, grad:NAME  that, and its gradients by the tensors of the file

`encoder-images.npz` has uint8 images and the pixels that the image processors of `vit-a` and
`clip-a` make of them. `encoder-minilm.npz` has the embeddings of the lines of sentences.txt, and of
all of them as one text (cut at 256 tokens), by all-MiniLM-L6-v2: the mean over the mask, of length
one; and the token ids.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_encoder_models import MODELS, SEEDS, Tiny
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[2]
MAX_TOKENS = 256  # of sentence_bert_config.json
TEXTS = [
    *(HERE / "sentences.txt").read_text(encoding="utf-8").splitlines(),
    (HERE / "sentences.txt").read_text(encoding="utf-8"),
]


OF_SENTENCES = ("BertModel", "DistilBertModel", "ModernBertModel", "XLMRobertaModel")


def inputs_of(tiny: Tiny, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Inputs by our names: a full row of text and a padded one, images."""
    config = tiny.config
    found = {}
    text = getattr(config, "text_config", config)
    if tiny.kind == "SiglipModel":  # which reads the last position, so nothing is padding
        length = tiny.short or text.max_position_embeddings
        found["tokens"] = torch.randint(text.vocab_size, (2, length), generator=draw)
    elif tiny.short:
        roberta = config.model_type in (
            "roberta",
            "xlm-roberta",
        )  # positions begin behind the padding id
        length = text.max_position_embeddings - (text.pad_token_id + 1 if roberta else 0)
        tokens = torch.randint(3, text.vocab_size, (2, length), generator=draw)
        mask = torch.ones_like(tokens)
        tokens[1, tiny.short :], mask[1, tiny.short :] = 1, 0
        if config.model_type == "clip":
            end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
            tokens[tokens == end] = 3
            tokens[0, length - 2], tokens[1, tiny.short - 1] = end, end
        elif getattr(text, "type_vocab_size", 1) > 1:
            found["types"] = torch.randint(text.type_vocab_size, (2, length), generator=draw)
        found |= {"tokens": tokens, "mask": mask}
    image = getattr(config, "vision_config", config)
    if hasattr(image, "image_size"):
        shape = (2, *(tiny.sides or (image.image_size, image.image_size)), image.num_channels)
        found["pixels"] = torch.randn(shape, generator=draw)
    return found


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What our `apply` gives."""
    theirs = {
        "tokens": "input_ids",
        "types": "token_type_ids",
        "mask": "attention_mask",
        "pixels": "pixel_values",
    }
    given = {theirs[name]: value for name, value in inputs.items()}
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].permute(0, 3, 1, 2)
    out = model(**given)
    if type(model).__name__ in OF_SENTENCES:
        return mean(out.last_hidden_state, inputs["mask"])
    if type(model).__name__ in ("Dinov2Model", "SiglipVisionModel", "ViTModel"):
        return out.pooler_output
    return out.logits_per_image if hasattr(out, "logits_per_image") else out.logits


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over the tokens of each row that are no padding."""
    wide = mask[..., None].to(hidden.dtype)
    return (hidden * wide).sum(1) / wide.sum(1)


def tiny(name: str) -> None:
    """One model: its folder and its `.npz`."""
    one = MODELS[name]
    seed = SEEDS[name]
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    kind = getattr(transformers, one.kind)
    model = kind._from_config(one.config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():  # norms at 1 and biases at 0 would hide a wrong name
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            around = 1 if re.search(r"norm\w*\.weight|logit_scale", key, re.IGNORECASE) else 0
            value.copy_(around + 0.3 * noise)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    inputs = inputs_of(one, draw)
    logits = logits_of(model, inputs)
    targets = torch.randint(logits.shape[-1], logits.shape[:-1], generator=draw)
    weights = inputs["mask"].float() if logits.ndim == 3 else torch.ones(logits.shape[:-1])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction="none"
    )
    loss = (losses * weights.flatten()).sum() / weights.sum()
    loss.backward()
    grads = {f"grad:{k}": v for k, v in gradients(model).items() if re.fullmatch(one.gradients, k)}
    save(
        name,
        **{
            f"in:{key}": value.to(torch.int32) if key in ("tokens", "types") else value
            for key, value in inputs.items()
        },
        logits=logits,
        targets=targets.to(torch.int32),
        weights=weights,
        loss=loss,
        **grads,
    )
    print(
        f"{name}: {sum(p.numel() for p in model.parameters())} parameters, {len(grads)} "
        f"gradients, logits {tuple(logits.shape)}"
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of files, which are not those of modules: the model is saved with its gradients
    in place of its weights.
    """
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for value in model.parameters():
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def images() -> None:
    """Image processors, and what they make of a smooth and of a noisy image, wide and tall."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:37, :61] / 61
    smooth = np.stack([np.sin(5 * x + 3 * y), np.cos(7 * x * y), x - y], axis=-1) * 100 + 120
    given = {
        "smooth": smooth.astype(np.uint8),
        "noise": draw.integers(0, 256, (25, 40, 3), dtype=np.uint8),
    }
    given["tall"] = given["smooth"].swapaxes(0, 1).copy()
    processors = {
        "vit-a": transformers.ViTImageProcessorPil(
            size={"height": 12, "width": 12}, image_std=[0.5, 0.25, 1.0]
        ),
        "clip-a": transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12}
        ),
    }
    stored = {f"image:{name}": image for name, image in given.items()}
    for folder, processor in processors.items():
        processor.save_pretrained(HERE / folder)
        for name, image in given.items():
            pixels = processor(image, return_tensors="np")["pixel_values"][0]
            stored[f"{folder}:{name}"] = pixels.transpose(1, 2, 0).astype(np.float32)
    np.savez_compressed(HERE / "encoder-images.npz", **stored)


def embeddings(folder: Path) -> tuple[np.ndarray, list[list[int]]]:
    """Of `TEXTS`, as sentence-transformers computes them, each text by itself; and the
    token ids.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    out = []
    for text in TEXTS:
        given = tokenizer(text, max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**given).last_hidden_state
        rows.append(given["input_ids"][0].tolist())
        out.append(torch.nn.functional.normalize(mean(hidden, given["attention_mask"]))[0].numpy())
    return np.stack(out), rows


def minilm(ours: str) -> None:
    """The embeddings by the original."""
    found, rows = embeddings(
        Path(
            run(
                ours, "from jaxmodel.hub.pretrained import find_minilm; print(find_minilm())"
            ).strip()
        )
    )
    lengths = np.array([len(row) for row in rows], np.int32)
    assert lengths.max() == MAX_TOKENS
    np.savez_compressed(
        HERE / "encoder-minilm.npz", embeddings=found, ids=np.concatenate(rows), lengths=lengths
    )
    print(f"minilm: {found.shape}, {lengths.sum()} tokens")


WRITE = """
import sys, pathlib
import jax, numpy as np
from jaxmodel import tree
from jaxmodel.hub import from_pretrained

goldens, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
for name in sys.argv[3:]:
    bundle = from_pretrained(goldens / name)
    params = tree.map_leaves(
        lambda path, a: a * 1.1, bundle.params
    )  # other weights than those of the stored folder
    type(bundle)(bundle.model, params, bundle.processor).save_pretrained(out / name)
    inputs = {
        key[3:]: value
        for key, value in np.load(goldens / f"{name}.npz").items()
        if key.startswith("in:")
    }
    np.savez(
        out / f"{name}.npz",
        logits=bundle.model.apply(params, jax.tree.map(jax.numpy.asarray, inputs)).logits,
    )
from_pretrained("all-minilm-l6-v2").save_pretrained(out / "minilm")
"""


def check(ours: str, names: list[str]) -> None:
    """transformers loads the folders that we write, and gives the same logits, tokens and
    embeddings.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run(ours, WRITE, str(HERE), folder, *(names or MODELS))
        for name in names or MODELS:
            one = MODELS[name]
            model, info = getattr(transformers, one.kind).from_pretrained(
                out / name, output_loading_info=True
            )
            # we keep no pooler for means of all tokens
            missing = {
                key
                for key in info["missing_keys"]
                if not (one.kind in OF_SENTENCES and key.startswith("pooler."))
            }
            assert not missing and not any(info[key] for key in info if key != "missing_keys"), (
                f"{name}: {info}"
            )
            stored = {
                key[3:]: torch.tensor(v)
                for key, v in np.load(HERE / f"{name}.npz").items()
                if key.startswith("in:")
            }
            stored = {
                key: value if value.is_floating_point() else value.long()
                for key, value in stored.items()
            }
            with torch.no_grad():
                logits = logits_of(model.eval(), stored).numpy()
            told = (
                stored["mask"].numpy().astype(bool) if logits.ndim == 3 else slice(None)
            )  # RoBERTa: see the test
            apart = np.abs(logits - np.load(out / f"{name}.npz")["logits"])[told].max()
            assert apart < 2e-4, f"{name}: logits differ by {apart}"
            named = (
                getattr(model.config, "id2label", None) if "Classification" in one.kind else None
            )
            assert named in (None, one.config.id2label), f"{name}: {named}"
            print(f"{name}: {type(model).__name__}, logits within {apart:.1e}")
        found, rows = embeddings(out / "minilm")
        stored = np.load(HERE / "encoder-minilm.npz")
        assert np.abs(found - stored["embeddings"]).max() < 1e-6 and np.array_equal(
            np.concatenate(rows), stored["ids"]
        )
        tokenizer = AutoTokenizer.from_pretrained(out / "minilm")
        assert tokenizer.mask_token == "[MASK]" and tokenizer.pad_token_id == 0
        print("minilm: the same embeddings and tokens")


def run(python: str, program: str, *args: str) -> str:
    """What a program wrote; its errors end this one."""
    done = subprocess.run([python, "-c", program, *args], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def save(name: str, **arrays: torch.Tensor) -> None:
    """The `.npz` of a model."""
    np.savez_compressed(
        HERE / f"{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()}
    )


def main() -> None:
    """Write the goldens, or check ours with transformers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(MODELS)}; default all, and what else is stored",
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
    if options.check:
        check(options.ours, options.names)
        return
    for name in options.names or MODELS:
        tiny(name)
    if options.names:
        return
    images()
    minilm(options.ours)


if __name__ == "__main__":
    main()
