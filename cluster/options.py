"""Settings of a service: what it serves, on how many workers, and where it listens.

One frozen dataclass, from which the command line takes its defaults. Knows nothing about Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import PlacementError
from cluster.service import Limits
from homer.config import PlanKind
from homer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompressionOverrides:
    """Settings that take the place of the model's own where they are not None.

    The fields are those of `homer.HomerConfig`.
    """

    max_chunk_len: int | None = None
    target_len: int | None = None
    warmup_layers: int | None = None
    max_initial_chunk_len: int | None = None
    plan: PlanKind | None = None
    fan_in: int | None = None
    refresh_suffix: bool | None = None

    def given(self) -> dict[str, int | bool | str]:
        """The settings that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a model is served.

    Parameters
    ----------
    model : str
        A folder in Hugging Face format, or a model id; the same on every node.
    workers : int
        Worker processes.
    cpu : bool
        Workers compute on the CPU, with `threads` threads each. Otherwise each takes one GPU.
    threads : int
    dtype : str
        "auto" (the checkpoint's own), float32, bfloat16 or float16.
    bias : str, optional
        A calibration bias file; by default the one beside the model, where there is one.
    worker_host : str, optional
        Where workers listen; by default on their node's own address.
    host, port
        Where the gRPC door listens; port 0 is any free one.
    name : str
        The coordinator actor's name in Ray's namespace "homer".
    placement_timeout_seconds : float
        How long to wait for the Ray cluster to make room for the workers.
    start_timeout_seconds : float
        How long a worker may take to load the model.
    """

    model: str
    workers: int = 1
    cpu: bool = False
    threads: int = 1
    dtype: str = "auto"
    bias: str | None = None
    worker_host: str | None = None
    host: str = "127.0.0.1"
    port: int = 50051
    name: str = "homer"
    compression: CompressionOverrides = field(default_factory=CompressionOverrides)
    limits: Limits = field(default_factory=Limits)
    placement_timeout_seconds: float = 120.0
    start_timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 1 or more")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; use 0 (any free one) to 65535")

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker takes of a Ray node."""
        return {"CPU": self.threads} if self.cpu else {"CPU": 1, "GPU": 1}


def placement_problem(
    options: ServeOptions, total: dict[str, float], free: dict[str, float], nodes: int
) -> PlacementError:
    """Says what is missing for the workers."""
    need = ", ".join(f"{amount:g} {kind}" for kind, amount in options.bundle.items())
    has = ", ".join(
        f"{total.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind in options.bundle
    )
    advice = "" if options.cpu or total.get("GPU") else ", or use --cpu"
    fewer = "--workers or --threads" if options.cpu else "--workers"
    return PlacementError(
        f"no room for {options.workers} worker(s) of {need} each: the Ray cluster of "
        f"{nodes} node(s) has {has}. Add nodes, or lower {fewer}{advice}"
    )
