"""Variants of a model side by side: bytes, loss on the same tokens, speed and greedy text."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmodel import generation, report, tree
from jaxmodel.evaluate.perplexity import bootstrap, summarize, token_nll
from jaxmodel.hub import Bundle, from_pretrained
from jaxmodel.progress import bar, step
from jaxmodel.report.table import rate, size

COLUMNS = (
    report.Column("name", "version"),
    report.Column("resident_bytes", "resident", size),
    report.Column("packed_bytes", "packed", size),
    report.Column("file_bytes", "file", size),
    report.Column("bits_per_weight", "bits per\nweight", "{:.2f}".format),
    report.Column("nll", "NLL", "{:.4f}".format),
    report.Column("nll_change", "change", "{:+.4f}".format),
    report.Column("perplexity", "perplexity", "{:.2f}".format),
    report.Column("prefill_tps", "prefill\ntok/s", rate),
    report.Column("decode_tps_1", "decode\n1 stream", rate),
    report.Column("decode_tps_8", "decode\n8 streams", rate),
)
"""The columns of a table of variants."""

type Versions = Mapping[str, Callable[[], Bundle]]


def compare(
    versions: Versions,
    windows: Int[np.ndarray, "N T"],
    *,
    keep: Mapping[str, Path] | None = None,
    speed: bool = False,
    prompt: str = "",
    max_new_tokens: int = 16,
    seed: int = 0,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure variants of a model one at a time; each is made for its turn and then dropped.

    Args:
      versions: name -> a function that makes the bundle (see `compress.variants`). All are compared
        with the first.
      windows: tokens to score; see `perplexity`.
      keep: name -> a folder to save the variant in. The bundle is then loaded back, and its logits
        are compared with those of the bundle in memory.
      speed: measure the speed too (see `generation.measure_speed`).
      prompt: a text that each continues greedily; empty for none.
      max_new_tokens: length of that continuation.
      seed: seed of the bootstrap intervals.
      on_row: called with each row as soon as it is complete.

    Returns:
      A row for each variant: `name`; `resident_bytes` of the weights while it runs, `packed_bytes`
      of its stored form, `file_bytes` on disk, `bits_per_weight` (stored); `nll` (nats per token),
      `nll_interval`, `perplexity`; `nll_change`, the mean difference from the first variant on the
      same tokens, and `nll_change_interval`; if asked for also `loads_back`, tokens per second and
      `continuation`.

    Raises:
      InputError: windows that cannot be scored, a folder of `keep` that cannot be written, or a
        prompt that cannot be tokenised.
    """
    rows: list[dict[str, Any]] = report.Rows((), COLUMNS)
    first: np.ndarray | None = None
    with bar(len(versions), "versions", unit="version") as shown:
        for name, make in versions.items():
            bundle = make()
            row = {"name": name, **_stored(bundle, (keep or {}).get(name), windows[:1, :64])}
            # From here on only what a server would hold counts, without the stored form and without
            # the plain bundle from which other variants are made. A leaf that both forms share is
            # counted once.
            bundle = generation.for_inference(bundle)
            row["resident_bytes"] = resident_bytes(bundle.params, bundle.for_inference())
            nll = token_nll(bundle.model, bundle.params, windows)
            first = nll if first is None else first
            row |= _quality(nll, nll - first, seed)
            if speed:
                with step(f"{name}: speed"):
                    row |= generation.measure_speed(bundle)
            if prompt:
                row["continuation"] = generation.generate(
                    bundle, prompt, max_new_tokens=max_new_tokens
                )
            rows.append(row)
            shown.advance(1, done=name)
            if on_row is not None:
                on_row(row)
    return rows


def resident_bytes(*trees: Any) -> int:
    """Return the bytes of all buffers that these trees keep alive; shared buffers count once."""
    return tree.nbytes(list({id(array): array for array in jax.tree.leaves(trees)}.values()))


def _stored(bundle: Bundle, keep: Path | None, tokens: np.ndarray) -> dict[str, Any]:
    """Measure the stored form in memory and on disk."""
    packed = tree.nbytes(bundle.params)
    row: dict[str, Any] = {
        "packed_bytes": packed,
        "bits_per_weight": 8 * packed / tree.count(bundle.params),
    }
    with tempfile.TemporaryDirectory() as room:
        folder = bundle.save_pretrained(keep or Path(room) / "bundle")
        row["file_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if keep is not None:
            row["loads_back"] = _same_logits(bundle, from_pretrained(folder), tokens)
    return row


def _same_logits(one: Bundle, other: Bundle, tokens: np.ndarray) -> bool:
    """Return whether two bundles give the same logits bit for bit."""
    inputs = jnp.asarray(tokens)
    first, second = (
        np.asarray(jax.jit(b.model.apply)(b.params, inputs).logits) for b in (one, other)
    )
    return bool(np.array_equal(first, second))


def _quality(
    nll: Float[np.ndarray, "N P"], change: Float[np.ndarray, "N P"], seed: int
) -> dict[str, Any]:
    score = dataclasses.asdict(summarize(nll, seed=seed))
    return {
        "nll": score["nll"],
        "nll_interval": score["interval"],
        "perplexity": score["perplexity"],
        "nll_change": float(np.mean(change, dtype=np.float64)),
        "nll_change_interval": bootstrap(change, seed=seed),
    }
