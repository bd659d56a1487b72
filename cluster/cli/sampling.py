"""The options of every command that has an answer drawn: how its tokens are chosen.

One home for names, defaults and help, so that commands cannot drift apart.
"""

from __future__ import annotations

from typing import Any

from cluster.cli.option_group import option, option_group


def _sampling(max_tokens: int | None, **given: Any) -> dict[str, Any]:
    """Fields of `homer.v1.SamplingParams`."""
    return {"max_tokens": max_tokens or 0, **given}


samples = option_group(
    "sampling",
    [
        option("max_tokens", int | None, None, "longest answer; 256 by default", min=1),
        option("temperature", float, 0.0, "0 is greedy", min=0),
        option("top_p", float, 0.0, "0 is off", min=0, max=1),
        option("top_k", int, 0, "0 is off", min=0),
        option(
            "stop", list[str] | None, None, "end an answer before this text; may be repeated"
        ),
        option("seed", int | None, None, "same seed, same answer", min=0),
        option("n", int, 1, "answers to draw from the one compressed document", min=1),
        option(
            "logprobs", int | None, None,
            "show each token's log-probability, and those of so many likeliest (0: none)", min=0,
        ),
    ],
    _sampling,
)  # fmt: skip
"""Give a command these options, as its parameter `sampling`."""
