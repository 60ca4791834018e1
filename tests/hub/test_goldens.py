"""What transformers computed (see goldens/make_goldens.py), against what we compute from the same files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.evaluate.perplexity import perplexity, token_nll
from jaxmodel.hub import Bundle, from_pretrained
from jaxmodel.hub.families import families, family_of
from jaxmodel.hub.names import Tensors, find, read_leaf
from jaxmodel.train.losses import next_token

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz") if path.stem != "smollm2")

type Golden = tuple[Bundle, dict[str, np.ndarray]]


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def logits_of(bundle: Bundle, params: tree.Params | None = None, **inputs: np.ndarray) -> jax.Array:
    inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
    return jax.jit(bundle.model.apply)(bundle.params if params is None else params, inputs).logits


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return from_pretrained(GOLDENS / request.param), read(request.param)


class Gradients(Tensors):
    """Stored gradients as the tensors of a file."""

    def __init__(self, stored: dict[str, np.ndarray]):
        self.stored = stored

    def read(self, name: str, index: tuple[Any, ...]) -> np.ndarray:
        return self.stored[f"grad:{name}"][index]


def near(found: Any, stored: np.ndarray, limit: float) -> None:
    """Goldens are of size 5; float32 in another order of sums gives some 1e-6."""
    found = np.asarray(found)
    assert found.shape == stored.shape and found.dtype == np.float32
    assert np.abs(found - stored).max() < limit


def test_every_folder_has_its_golden() -> None:
    folders = sorted(path.name for path in GOLDENS.iterdir() if (path / "config.json").exists())
    assert folders == NAMES and {name.split("-")[0] for name in NAMES} == set(families())
    assert (GOLDENS / "llama-tied" / "model.safetensors.index.json").exists()  # one is in several files
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()) < 300_000


def test_logits(golden: Golden) -> None:
    bundle, want = golden
    mask = want["mask"]
    assert mask[0].all() and not mask[1].all()
    logits = logits_of(bundle, tokens=want["tokens"], mask=mask)
    near(logits[mask], want["logits"][mask], 2e-5)
    near(logits, want["logits"], 2e-5)  # padded queries see the same valid keys there as here
    short = mask[1].sum()
    near(logits_of(bundle, tokens=want["tokens"][1:, :short]), want["logits"][1:, :short], 2e-5)


def test_running_form(golden: Golden) -> None:
    bundle, want = golden
    logits = logits_of(bundle, bundle.running(), tokens=want["tokens"], mask=want["mask"])
    near(logits, want["logits"], 2e-5)


def test_positions_with_gaps_up_to_the_last(golden: Golden) -> None:
    bundle, want = golden
    assert want["positions"][0, -1] == bundle.model.config.context - 1
    near(logits_of(bundle, tokens=want["apart"], positions=want["positions"]), want["apart_logits"], 1e-4)


def test_gradients(golden: Golden) -> None:
    bundle, want = golden
    mask = want["mask"]
    batch = {
        "tokens": want["tokens"][:, :-1],
        "targets": want["tokens"][:, 1:],
        "weights": mask[:, 1:].astype(np.float32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    loss = lambda params: next_token(bundle.model, params, batch)[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(bundle.params)
    near(value, want["loss"], 1e-5)
    family, _ = family_of(bundle.model)
    names, seen = tuple(family.names(bundle.model.config)), set()
    for path, leaf in tree.flatten(tree.unstack(grads)).items():
        name, layer = find(names, path)
        key = f"grad:{name.tensors(layer)[0]}"
        if key in want:
            seen.add(key)
            size = np.abs(want[key]).max()  # of q, k, v together: the gradient of k's bias is zero by the softmax
            whole = tuple(slice(0, n) for n in leaf.shape)
            near(leaf / size, read_leaf(Gradients(want), name, layer, leaf.shape, whole) / size, 1e-4)
    assert seen == {key for key in want if key.startswith("grad:")} and len(seen) >= 3


def test_decoding_with_a_cache(golden: Golden) -> None:
    """Rows of unequal length are prefilled together, and the rest of the longer one is fed a token at a time."""
    bundle, want = golden
    tokens, mask, params = jnp.asarray(want["tokens"]), want["mask"], bundle.params
    start = int(mask[1].sum())
    apply = jax.jit(bundle.model.apply)
    head = mask[:, :start] & np.array([[True] * start, [True] * (start - 3) + [False] * 3])  # the second row three behind
    out = apply(params, {"tokens": tokens[:, :start], "mask": head}, bundle.model.init_cache(2, mask.shape[1]))
    near(out.logits[head], want["logits"][:, :start][head], 2e-5)
    for step in range(mask.shape[1] - start):
        at = np.array([start + step, min(start - 3 + step, start - 1)])
        live = np.array([[True], [step < 3]])
        out = apply(params, {"tokens": tokens[[0, 1], at][:, None], "mask": live}, out.cache)
        near(out.logits[:, 0][live[:, 0]], want["logits"][[0, 1], at][live[:, 0]], 2e-5)
    assert out.cache.length.tolist() == [mask.shape[1], start]


def test_dtype_of_a_foreign_folder() -> None:
    """float32 unless said otherwise; bfloat16 stays within its rounding."""
    bundle, want = from_pretrained(GOLDENS / "gpt2-a", dtype="bfloat16"), read("gpt2-a")
    assert {leaf.dtype for leaf in jax.tree.leaves(bundle.params)} == {jnp.dtype("bfloat16")}
    assert bundle.model.policy.compute == "bfloat16"
    near(logits_of(bundle, tokens=want["tokens"][:1]), want["logits"][:1], 0.1)


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """Older GPT-2 files say `wte.weight`, and carry masks and a copy of the embedding."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(GOLDENS / "gpt2-a" / "model.safetensors")
    renamed = {re.sub(r"^transformer\.", "", key): value for key, value in tensors.items()}
    renamed |= {"h.0.attn.bias": np.ones((1, 1, 24, 24), np.float32), "lm_head.weight": renamed["wte.weight"].copy()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDENS / "gpt2-a" / "config.json").read_bytes())
    assert tree.fingerprint(from_pretrained(tmp_path).params) == tree.fingerprint(from_pretrained(GOLDENS / "gpt2-a").params)


# ------------------------------------------------------------------------------------------------------ SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Golden:
    return from_pretrained("smollm2-135m"), read("smollm2")


def test_smollm2_tokens(smollm2: Golden) -> None:
    """The ids are those of transformers' tokenizer."""
    bundle, want = smollm2
    assert bundle.processor is not None
    ids = bundle.processor.encode((GOLDENS / "text.txt").read_text(encoding="utf-8"))
    assert ids[: want["windows"].size] == want["windows"].ravel().tolist()


def test_smollm2_nll(smollm2: Golden) -> None:
    bundle, want = smollm2
    assert float(want["nll"]) == pytest.approx(3.92870, abs=1e-5)  # the number, for a reader
    nll = token_nll(bundle.model, bundle.params, want["windows"])
    near(nll, want["token_nll"], 2e-4)
    assert abs(nll.mean(dtype=np.float64) - want["nll"]) < 2e-5
    score = perplexity(bundle.model, bundle.running(), want["windows"][:1])
    assert score.nll == pytest.approx(want["token_nll"][0].mean(dtype=np.float64), abs=5e-4)
    assert score.predictions == want["token_nll"].shape[1] and score.interval[0] < score.nll < score.interval[1]
