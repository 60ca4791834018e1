"""Where factors of units may move in these layers: `Axes.feeds`, shared by the models."""

from __future__ import annotations

type Feeds = tuple[tuple[str, str], ...]

_BLOCK = r"((?:.*/)?blocks/\d+)"

NORMS_BEFORE: Feeds = (
    (f"{_BLOCK}/attn_norm/(weight|bias)", r"\1/attn/(q|k|v)"),
    (f"{_BLOCK}/mlp_norm/(weight|bias)", r"\1/(mlp/(gate|up)|moe/(router|gate|up))"),
)
"""The norms before the parts of a block. A norm after a sum feeds the next sum too, and is none."""

VALUES: Feeds = ((f"{_BLOCK}/attn/v(_bias)?", r"\1/attn/o"),)
"""The values of a head, which attention only averages."""

CROSS_VALUES: Feeds = ((f"{_BLOCK}/cross/memory_v(_bias)?", r"\1/cross/o"),)
"""The values that are read from a memory."""

UP: Feeds = ((r"((?:.*/)?blocks/\d+/(?:mlp|moe))/up(_bias)?", r"\1/down"),)
"""The map beside a gate, or in front of a ReLU, which positive factors pass."""


def block_feeds(*, norms_before: bool = True, up: bool = False) -> Feeds:
    """Return the feeds of blocks of attention and a feed-forward part.

    Args:
      norms_before: whether the norms come before the parts.
      up: whether the feed-forward part has a gate, or a ReLU.
    """
    return (*(NORMS_BEFORE if norms_before else ()), *VALUES, *(UP if up else ()))
