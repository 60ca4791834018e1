"""The report of a compression: what was done to each leaf, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import report, tree
from jaxmodel.brief import briefly
from jaxmodel.compress.method import Chain
from jaxmodel.leaves import decode
from jaxmodel.ops.probe import top_share
from jaxmodel.report import html, plot, shown
from jaxmodel.report.table import percent, rate, size
from jaxmodel.text_form import write

TOP = 0.001
"""The share of the tokens, those of the largest inputs, whose share of the squares is reported."""


@briefly
@dataclasses.dataclass(frozen=True)
class Report:
    """The result of compression in numbers.

    Attributes:
      bytes_before: bytes of all buffers of the tree before compression.
      bytes_after: bytes of all buffers afterwards: codes, scales, masks and uncompressed leaves.
      bits_per_weight: stored bits per weight of the whole tree afterwards.
      leaves: one record for each leaf: path, method (text of its chain), shape (of one layer),
        layers (number of layers), bytes_before and bytes_after (of all layers), bits_per_weight,
        zeros (the fraction of weights that are 0), relative_error (root mean square of the change
        over that of the weights); what its methods note, such as `damping`; and if it was measured
        tokens (seen by the matrix that saw least), output_error (root mean square of the change of
        the output over that of the output, for held-out tokens), top_share (the share of the sum of
        squares of the input that the largest 0.1 % of its tokens have), fallback (why statistics
        were not used; "" if they were).
      loss: None, or the loss on the held-out tokens: `before`, `after` and `change`, each with
        `mean` and `interval` (95 %, None for a single batch), and `predictions`.
      protocol: what was measured: data (a fingerprint), context, tokens, held_out_tokens, order,
        cap, and text where one was chosen; {} without batches.
      file_bytes: None, or the bytes of the files of the weights (see `on_disk`).
      latency: None, or what `generation.compare_speed` measured.
    """

    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    leaves: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)
    loss: Mapping[str, Any] | None = None
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    file_bytes: int | None = None
    latency: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)

    def on_disk(self, folder: str | Path) -> Report:
        """Return the report with the bytes of the weights in a folder of the compressed bundle.

        They are `bytes_after` and a header with the names and shapes of the tensors.

        Args:
          folder: what `save_pretrained` of the compressed bundle returned.
        """
        files = Path(folder).expanduser().glob("*.safetensors")
        return dataclasses.replace(self, file_bytes=sum(file.stat().st_size for file in files))

    def plot(self, fmt: str = "svg") -> plot.Picture:
        """Plot the error of the outputs of each layer, or that of the weights if none was measured.

        Args:
          fmt: svg or png.

        Raises:
          InputError: nothing was compressed.
        """
        return draw(self, fmt)

    def _repr_html_(self) -> str:
        facts: dict[str, Any] = {
            "bytes": f"{size(self.bytes_before)} → {size(self.bytes_after)}",
            "bits per weight": self.bits_per_weight,
        }
        if self.file_bytes is not None:
            facts["bytes on disk"] = size(self.file_bytes)
        if self.latency is not None:
            facts["tokens/s"] = speeds(self.latency)
        if self.loss is not None:
            facts["loss"] = said(self.loss)
        return shown.card("Report", facts, [html.table(self.leaves, columns(self.leaves))])


COLUMNS = (
    report.Column("path"),
    report.Column("method", format=lambda method: method or "kept"),
    report.Column("shape", format=lambda shape: " x ".join(map(str, shape))),
    report.Column("layers"),
    report.Column("bytes_before", "before", size),
    report.Column("bytes_after", "after", size),
    report.Column("bits_per_weight", "bits per\nweight", "{:.2f}".format),
    report.Column("zeros", format=percent),
    report.Column("relative_error", "error", percent),
    report.Column("output_error", "error of\noutput", percent),
    report.Column("tokens"),
    report.Column("top_share", "of top\n0.1 %", percent),
    report.Column("fallback"),
)
"""The columns of a table of a report's leaves."""


def columns(rows: Sequence[Mapping[str, Any]]) -> list[report.Column]:
    """Return the columns in which some row of a table has something."""
    return [column for column in COLUMNS if any(row.get(column.key) for row in rows)]


def said(loss: Mapping[str, Any]) -> str:
    """Return the loss before and after in a few words."""

    def of(name: str, form: str) -> str:
        mean, interval = loss[name]["mean"], loss[name]["interval"]
        return format(mean, form) + (
            "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
        )

    change = of("change", "+.4f")
    return f"{loss['before']['mean']:.4f} → {loss['after']['mean']:.4f}, change {change}"


def sizes(of: Report) -> str:
    """Return the bytes before and after in a few words."""
    disk = "" if of.file_bytes is None else f", {size(of.file_bytes)} on disk"
    return (
        f"{size(of.bytes_before)} → {size(of.bytes_after)}, {of.bits_per_weight:.3f} bits a weight"
        + disk
    )


def speeds(latency: Mapping[str, Any]) -> str:
    """Return the tokens per second before and after in a few words."""

    def name(key: str) -> str:
        streams = key.removeprefix("decode_tps_")
        return "prefill" if streams == key else f"{streams} stream{'s' * (streams != '1')}"

    was, now, ratio = (latency[key] for key in ("before", "after", "ratio"))
    return ", ".join(
        f"{name(key)} {rate(was[key])} → {rate(now[key])} ({ratio[key]:.2f}x)" for key in was
    )


def draw(of: Report, fmt: str = "svg") -> plot.Picture:
    """Plot the errors of the rows of a report, above what became of the whole."""
    done = [row for row in of.leaves if row["method"]]
    whole = f"\n{sizes(of)}"
    if of.latency is not None:
        whole += "\ntokens/s: " + speeds(of.latency).replace("), ", "),\n")  # a line for each
    key = "output_error" if any("output_error" in row for row in done) else "relative_error"
    label = "error of the output" if key == "output_error" else "error of the weights"
    lines: dict[str, dict[int, float]] = {}
    for row in done:
        for layer in tree.layer_paths(row["path"]):
            keys = layer.split("/")
            at = next((i for i, one in enumerate(keys) if one.isdigit()), None)
            if at is not None and row.get(key) is not None:
                name = "/".join([*keys[: at - 1], *keys[at + 1 :]])
                lines.setdefault(name, {})[int(keys[at])] = 100 * row[key]
    if lines:
        series = {name: (list(of), list(of.values())) for name, of in lines.items()}
        return plot.curves(series, f"layer{whole}", f"{label}, %", "What compression changes", fmt)
    groups = {row["path"]: {label: 100 * row[key]} for row in done if row.get(key) is not None}
    return plot.bars(groups, f"{label}, %{whole}", "What compression changes", fmt)


def row_of(
    path: str,
    chain: Chain,
    before: Any,
    after: Any,
    notes: Mapping[str, jax.Array],
    stats: Mapping[str, jax.Array] | None = None,
    held: Mapping[str, jax.Array] | None = None,
    fallback: str = "",
) -> dict[str, Any]:
    """Return the record of a leaf; see `Report`.

    Args:
      path: of the leaf.
      chain: what was done to it.
      before: the leaf before.
      after: the leaf after.
      notes: what the methods had to say.
      stats: as measured; None if nothing was.
      held: the statistics of held-out tokens, or None.
      fallback: why statistics were not used.
    """
    row = {
        "path": path,
        "method": write(chain),
        "shape": list(tree.layer_shape(path, after)),
        "layers": len(tree.layer_paths(path)),
        "bytes_before": tree.nbytes(before),
        "bytes_after": tree.nbytes(after),
        "bits_per_weight": 8 * tree.nbytes(after) / max(math.prod(after.shape), 1),
        "zeros": 0.0,
        "relative_error": 0.0,
    }
    if not chain:
        return row
    row["relative_error"], row["zeros"] = map(float, _changes(before, after))
    row |= {name: float(jnp.max(note)) for name, note in notes.items()}
    stats = stats or {}
    if "count" in stats:
        row["tokens"] = int(jnp.min(stats["count"]))
    if "norms" in stats and row["tokens"]:
        row["top_share"] = top_share(np.asarray(stats["norms"]), TOP)
    gram = (held or stats).get("gram")
    if gram is not None and np.all(np.isfinite(np.asarray(jnp.sum(gram)))):
        row["output_error"] = float(_output_error(before, after, gram))
    if stats or fallback:
        row["fallback"] = fallback
    return row


@jax.jit
def _changes(before: Any, after: Any) -> tuple[jax.Array, jax.Array]:
    was = decode(before, jnp.float32)
    now = decode(after, jnp.float32)
    error = jnp.sqrt(jnp.sum((was - now) ** 2) / jnp.maximum(jnp.sum(was**2), 1e-30))
    return error, jnp.mean((now == 0).astype(jnp.float32))


ROWS = 1024
"""Rows of a matrix whose outputs are compared at once."""


@jax.jit
def _output_error(before: Any, after: Any, gram: jax.Array) -> jax.Array:
    def sums(was: jax.Array, now: jax.Array, gram: jax.Array) -> jax.Array:
        """Return the squares of the output, of its change and of itself, of one matrix."""
        size = lambda row: jnp.maximum(jnp.sum((row[None] @ gram)[0] * row), 0.0)
        each = lambda pair: jnp.stack([size(pair[0] - pair[1]), size(pair[0])])
        return jnp.sum(jax.lax.map(each, (was, now), batch_size=ROWS), axis=0)

    for _ in range(gram.ndim - 2):
        sums = jax.vmap(sums)
    found = sums(decode(before, jnp.float32), decode(after, jnp.float32), gram)
    change, whole = jnp.sum(found.reshape(-1, 2), axis=0)
    return jnp.sqrt(change / jnp.maximum(whole, 1e-30))
