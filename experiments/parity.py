"""Every architecture that others trained against what transformers computed from the same files: logits and gradients.

Command:  python experiments/parity.py [--quick] [--seed N] --json -
Cost:     about 90 s on two cores; --quick half of it (logits only). Nothing but the repository is needed: the models are tiny,
          have random weights, and stand with their stored results in tests/hub/goldens (made by the scripts there).
Goals:    largest difference of a logit <= 2e-4, in float32, with padding masks and at positions with gaps up to the last of the
          context; of a gradient <= 1e-3 of its leaf's largest.
Measured: all met for 17 models of gpt2, llama (with three rope scalings), mistral, mixtral, qwen2, qwen3, gemma2 and gemma3_text:
          logits at most 6.4e-06 (llama-tied), gradients at most 3.3e-06 (gpt2-b), the least 2.0e-06 and 4.9e-07.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import hub, report, train, tree
from jaxmodel.hub.families import family_of
from jaxmodel.hub.names import Tensors, find, read_leaf

GOLDENS = Path(__file__).parent.parent / "tests" / "hub" / "goldens"


class Gradients(Tensors):
    """Stored gradients as the tensors of a file."""

    def __init__(self, stored: dict[str, np.ndarray]):
        self.where, self._stored = "goldens", stored

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        return self._stored[f"grad:{name}"][index]


def logits(bundle: hub.Bundle, want: dict[str, np.ndarray]) -> float:
    """The largest difference of a logit, over the masked rows and those with gaps."""
    apply = jax.jit(bundle.model.apply)
    rows = {"tokens": jnp.asarray(want["tokens"]), "mask": jnp.asarray(want["mask"])}
    apart = {"tokens": jnp.asarray(want["apart"]), "positions": jnp.asarray(want["positions"])}
    first = np.abs(np.asarray(apply(bundle.params, rows).logits) - want["logits"])[want["mask"]].max()
    return float(max(first, np.abs(np.asarray(apply(bundle.params, apart).logits) - want["apart_logits"]).max()))


def gradients(bundle: hub.Bundle, want: dict[str, np.ndarray]) -> float:
    """The largest difference of a gradient relative to the largest of its leaf."""
    tokens, weights = want["tokens"], want["mask"][:, 1:].astype(np.float32)
    batch = jax.tree.map(jnp.asarray, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    grads = jax.jit(jax.grad(lambda params: train.next_token(bundle.model, params, batch)[0]))(bundle.params)
    names, worst = tuple(family_of(bundle.model)[0].names(bundle.model.config)), 0.0
    for path, leaf in tree.flatten(tree.unstack(grads)).items():
        name, layer = find(names, path)
        if all(f"grad:{tensor}" in want for tensor in name.tensors(layer)):
            stored = read_leaf(Gradients(want), name, layer, leaf.shape, tuple(slice(0, n) for n in leaf.shape))
            size = max(np.abs(want[f"grad:{tensor}"]).max() for tensor in name.tensors(layer))
            worst = max(worst, float(np.abs(np.asarray(leaf) - stored).max() / size))
    return worst


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Compare every decoder that has a golden of this form."""
    entries: list[tuple] = []
    folders = [path for path in sorted(GOLDENS.iterdir()) if (path / "config.json").exists()]
    done = []
    for folder in report.progress(folders, "parity"):
        with np.load(GOLDENS / f"{folder.name}.npz") as file:
            want = dict(file)
        if "apart" not in want:
            continue
        bundle = hub.from_pretrained(folder)
        done.append(folder.name)
        entries.append((f"{folder.name} logits", logits(bundle, want), "", "<= 2e-4"))
        if not quick:
            entries.append((f"{folder.name} gradients", gradients(bundle, want), "of the largest", "<= 1e-3"))
    return entries, {"goldens": done}


if __name__ == "__main__":
    report.experiment(__doc__, "logits only", run)
