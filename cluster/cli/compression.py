"""The options of every command that may have prompts compressed otherwise than their model says.

One home for names and help, so that commands cannot drift apart.
"""

from __future__ import annotations

from typing import Any

from cluster.cli.option_group import option, option_group
from cluster.options import CompressionOverrides
from homer.config import ScoreKind

_PANEL = "Compression (by default what homer.json beside the model says)"


def _compression(paper: bool, **given: Any) -> CompressionOverrides:
    if paper:
        return CompressionOverrides(plan="paper", refresh_suffix=False, **given)
    return CompressionOverrides(**given)


compresses = option_group(
    "compression",
    [
        option("max_chunk_len", int | None, None, "longest input of a node, in tokens", _PANEL),
        option("target_len", int | None, None, "most tokens in the final cache", _PANEL),
        option("warmup_layers", int | None, None, "lower layers without merging", _PANEL),
        option(
            "max_initial_chunk_len", int | None, None, "longest leaf, where it should differ",
            _PANEL,
        ),
        option("fan_in", int | None, None, "most children per merge", _PANEL),
        option("score", ScoreKind | None, None, "what decides which tokens are kept", _PANEL),
        option("paper", bool, False, "the authors' method", _PANEL),
    ],
    _compression,
)  # fmt: skip
"""Give a command these options, as its parameter `compression`."""
