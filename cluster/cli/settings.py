"""The options that `homer serve` and `homer generate` share, and what they mean.

Defaults come from the settings' own dataclasses, so that the two cannot drift apart.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from cluster.options import CompressionOverrides, ServeOptions

DEFAULTS = ServeOptions(model="")

_CLUSTER = "Cluster"
_COMPRESSION = "Compression (by default what homer.json beside the model says)"

Workers = Annotated[int, typer.Option(help="Worker processes.", min=1, rich_help_panel=_CLUSTER)]
Cpu = Annotated[
    bool,
    typer.Option("--cpu", help="Compute on the CPU; else one GPU each.", rich_help_panel=_CLUSTER),
]
Threads = Annotated[
    int,
    typer.Option(help="Threads of each CPU worker.", min=1, rich_help_panel=_CLUSTER),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="A running Ray cluster to use (host:port, or auto); else one is started here.",
        envvar="RAY_ADDRESS",
        rich_help_panel=_CLUSTER,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: the checkpoint's own.", rich_help_panel=_CLUSTER
    ),
]
Bias = Annotated[
    str | None,
    typer.Option(
        help="Calibration bias file; else bias.safetensors beside the model, if it is there.",
        rich_help_panel=_CLUSTER,
    ),
]
PlacementTimeout = Annotated[
    float,
    typer.Option(
        "--placement-timeout",
        help="Seconds to wait for room on the Ray cluster.",
        rich_help_panel=_CLUSTER,
    ),
]
MaxChunkLen = Annotated[
    int | None,
    typer.Option(help="Longest input of a node, in tokens.", rich_help_panel=_COMPRESSION),
]
TargetLen = Annotated[
    int | None,
    typer.Option(help="Most tokens in the final cache.", rich_help_panel=_COMPRESSION),
]
WarmupLayers = Annotated[
    int | None,
    typer.Option(help="Lower layers without merging.", rich_help_panel=_COMPRESSION),
]
MaxInitialChunkLen = Annotated[
    int | None,
    typer.Option(help="Longest leaf, where it should differ.", rich_help_panel=_COMPRESSION),
]
FanIn = Annotated[
    int | None,
    typer.Option(help="Most children per merge.", rich_help_panel=_COMPRESSION),
]
Paper = Annotated[
    bool,
    typer.Option("--paper", help="The authors' method.", rich_help_panel=_COMPRESSION),
]


def overrides(paper: bool, **given: Any) -> CompressionOverrides:
    """The compression options of a command line."""
    if paper:
        return CompressionOverrides(plan="paper", refresh_suffix=False, **given)
    return CompressionOverrides(**given)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end a command like Ctrl-C: everything that it started is stopped first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
