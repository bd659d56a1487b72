"""The options that `homer serve` and `homer generate` share, and what they mean.

Defaults come from the settings' own dataclasses, so that the two cannot drift apart.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any

import typer

from cluster.options import ServeOptions
from cluster.placement import PLACEMENTS
from homer.engines import ENGINES
from workers.logs import LOG_FORMATS
from workers.options import WIRE_DTYPES

DEFAULTS = ServeOptions(model="")

_CLUSTER = "Cluster"
_PLACEMENT = "Where workers go, and how many"
_SEEING = "Seeing it"

Workers = Annotated[int, typer.Option(help="Worker processes.", min=1, rich_help_panel=_CLUSTER)]
Cpu = Annotated[
    bool,
    typer.Option(
        "--cpu/--no-cpu", help="Compute on the CPU; else one GPU each.", rich_help_panel=_CLUSTER
    ),
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
        autocompletion=lambda: ["auto", os.environ.get("RAY_ADDRESS", "127.0.0.1:6379")],
        rich_help_panel=_CLUSTER,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json/--no-json",
        help="Results on stdout as JSON, for scripts.",
        # One variable for all commands.
        envvar="HOMER_JSON",
        allow_from_autoenv=False,
    ),
]
Context = Annotated[
    str,
    typer.Option(
        help="File with the document: text, Markdown, HTML or PDF; - is stdin.",
        # Shells complete files where a completion gives none.
        metavar="<path>",
    ),
]
DEFAULT_SERVER = f"{DEFAULTS.host}:{DEFAULTS.port}"
Server = Annotated[
    str,
    typer.Option(help="The running service: host:port.", autocompletion=lambda: [DEFAULT_SERVER]),
]
WireDtype = Annotated[
    str,
    typer.Option(
        help="Type in which floats travel between workers: auto (as they are), bfloat16, float16 "
        "or float8. Narrower costs accuracy.",
        autocompletion=lambda: WIRE_DTYPES,
        rich_help_panel=_CLUSTER,
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help=f"What runs the model of each worker: {', '.join(ENGINES)}; docs/parallel.md.",
        autocompletion=lambda: ENGINES,
        rich_help_panel=_CLUSTER,
    ),
]
Ranks = Annotated[
    int,
    typer.Option(
        help="Processes that together are one worker, each with its own GPU or --threads.",
        min=1,
        rich_help_panel=_CLUSTER,
    ),
]
ZeroOffload = Annotated[
    str,
    typer.Option(
        help="Where deepspeed-zero3 keeps weights: none (on the GPU), cpu, or a folder.",
        rich_help_panel=_CLUSTER,
    ),
]
Bias = Annotated[
    str | None,
    typer.Option(
        help="Calibration bias file; else bias.safetensors beside the model, if it is there.",
        rich_help_panel=_CLUSTER,
    ),
]
MemoryBudget = Annotated[
    str,
    typer.Option(
        "--memory-budget",
        help="What requests may take of each worker's memory, like 4GiB; auto: 4/5 of what is free "
        "of its share; 0: no limit.",
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


def _mapping(text: str | dict[str, Any]) -> dict[str, Any]:
    # A configuration file has a table.
    if isinstance(text, dict):
        return text
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object; write it like {{'name': value}}")
    return read


def _amounts(text: str) -> dict[str, float]:
    read = _mapping(text)
    if not all(type(amount) in (int, float) for amount in read.values()):
        raise typer.BadParameter(f"{text!r} has an amount that is no number")
    return read


def _labels(text: str) -> dict[str, str]:
    read = _mapping(text)
    if not all(isinstance(value, str) for value in read.values()):
        raise typer.BadParameter(f"{text!r} has a label whose value is no text")
    return read


MinWorkers = Annotated[
    int | None,
    typer.Option(
        help="Give idle workers back, down to so many.", min=1, rich_help_panel=_PLACEMENT
    ),
]
MaxWorkers = Annotated[
    int | None,
    typer.Option(
        help="Ask for more workers while all are busy, up to so many.",
        min=1,
        rich_help_panel=_PLACEMENT,
    ),
]
GrowAfterSeconds = Annotated[
    float,
    typer.Option(
        "--grow-after-seconds",
        help="How long all workers are busy before more are asked for.",
        min=0,
        rich_help_panel=_PLACEMENT,
    ),
]
IdleSeconds = Annotated[
    float,
    typer.Option(
        "--idle-seconds",
        help="Give back a worker that had nothing to do for so long.",
        min=0,
        rich_help_panel=_PLACEMENT,
    ),
]
CpuWorkers = Annotated[
    int,
    typer.Option(
        help="Workers on the CPU beside those on GPUs, with --threads each.",
        min=0,
        rich_help_panel=_PLACEMENT,
    ),
]
LeafWorkers = Annotated[
    int,
    typer.Option(
        help="Further workers that load only the lowest layers: they run leaves, and never answer.",
        min=0,
        rich_help_panel=_PLACEMENT,
    ),
]
LeafLayers = Annotated[
    int,
    typer.Option(
        help="Layers of leaf workers; 0: what leaves run of a document with one for every worker.",
        min=0,
        rich_help_panel=_PLACEMENT,
    ),
]
GpusPerWorker = Annotated[
    float,
    typer.Option(
        help="1; several, to spread layers over; or a share, like 0.5.",
        rich_help_panel=_PLACEMENT,
    ),
]
PlacementOption = Annotated[
    str,
    typer.Option(
        "--placement",
        help="On few nodes (pack) or many (spread); strict: one node, or a node each. "
        f"One of {', '.join(PLACEMENTS)}.",
        autocompletion=lambda: PLACEMENTS,
        rich_help_panel=_PLACEMENT,
    ),
]
Resources = Annotated[
    dict | None,
    typer.Option(
        parser=_amounts,
        metavar="JSON",
        help="""Resources of Ray that nodes must have, like '{"accelerator_type:A100": 0.01}'.""",
        rich_help_panel=_PLACEMENT,
    ),
]
Labels = Annotated[
    dict | None,
    typer.Option(
        parser=_labels,
        metavar="JSON",
        help="""Labels that nodes must have, like '{"ray.io/market-type": "!spot"}'.""",
        rich_help_panel=_PLACEMENT,
    ),
]
WorkerHost = Annotated[
    str | None,
    typer.Option(
        help="Network (10.1.0.0/16) or interface (eth1) on which workers are reached; else the "
        "address of their node that routes to the coordinator.",
        rich_help_panel=_PLACEMENT,
    ),
]
LogFormat = Annotated[
    str,
    typer.Option(
        help="Log lines as text, or json: one object per line.",
        autocompletion=lambda: LOG_FORMATS,
        rich_help_panel=_SEEING,
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        help="Serve Prometheus metrics on this port of --host, 0: any free one; and let each "
        "worker serve its own on any free port. By default there are none.",
        min=0,
        max=65535,
        rich_help_panel=_SEEING,
    ),
]
OtlpEndpoint = Annotated[
    str,
    typer.Option(
        help="OpenTelemetry collector for spans, like http://127.0.0.1:4317.",
        envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
        rich_help_panel=_SEEING,
    ),
]


@dataclass
class Signals:
    """What came so far. An exception would not tell: Ray turns each into a KeyboardInterrupt."""

    terminated: bool = False


@contextmanager
def ended_by_signals() -> Iterator[Signals]:
    """Let SIGTERM end a command like Ctrl-C: everything that it started is stopped first."""
    signals = Signals()

    def interrupt(number: int, frame: FrameType | None) -> None:
        signals.terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)
