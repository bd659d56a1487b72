"""Settings of one worker process. The command line takes its options and defaults from here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from homer.checkpoint import FileWatch
from homer.engines import Engine, check_engine, check_loading
from homer.errors import ConfigError
from homer.load_options import LoadOptions
from workers.budget import parse_bytes
from workers.security import Security

TRANSPORTS = ("auto", "grpc")
WIRE_DTYPES = ("auto", "bfloat16", "float16", "float8")
ROLES = ("full", "leaf")
STALL_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Settings of one worker.

    Parameters
    ----------
    model : str
        A folder in Hugging Face format, or a model id.
    host : str
        Address to listen on, which other workers must be able to reach; or a network
        ("10.1.0.0/16") or an interface ("eth1"), for this machine's address in it.
    port : int
        0 takes a free one.
    load : LoadOptions
        How the model is loaded, and on which device. Each of its fields is an option of the
        command line.
    role : str
        "full" loads all layers; "leaf" only the lowest `leaf_layers`, which is enough for leaves
        that run no more, and never gives an answer.
    leaf_layers : int
    threads : int
        Threads of a model run on the CPU. 0 leaves it to torch.
    engine : Engine
        What runs the model: "torch" in this process, "deepspeed-tp" or "transformers-tp" by tensor
        parallelism on `ranks` processes of this machine, "deepspeed-zero3" with weights in parts.
    ranks : int
        Processes that together are this worker; on GPUs each has one, from `device` on.
    zero_offload : str
        Where deepspeed-zero3 keeps weights: "none" is on the device, "cpu" in main memory, anything
        else a folder on a fast disk.
    bias : str, optional
        Calibration bias file. By default the one beside the model, if there is one.
    memory_budget : str
        What all requests together may take, like "4GiB"; "auto" is four fifths of what is free when
        the model is loaded, "0" is no limit. Work that does not fit is refused.
    memory_share : float
        The part of the machine's or the GPU's memory that "auto" counts on, where several workers
        share it.
    idle_seconds : float
        A request of which nothing is heard for so long is dropped: whoever asked for it is gone.
    grace_seconds : float
        How long running calls may take to end when the worker is asked to stop.
    name : str
        What it is called in logs and spans; by default nothing, and then its process tells.
    log_format : str
        "text", or "json" for one object per line.
    metrics_port : int, optional
        Where Prometheus finds its metrics; 0 is any free port, None is nowhere.
    transport : str
        How tensors come from workers of the same machine: "auto" is through shared memory where
        both ends can, "grpc" never.
    wire_dtype : str
        In which type the floats travel that this worker gets from others: "auto" as they are;
        bfloat16, float16 or float8 (with a scale for each row) where they are wider. Answers then
        depend a little on which worker ran what.
    peer_stall_seconds : float
        How long another worker may send nothing while it is waited for.
    otlp_endpoint : str
        The OpenTelemetry collector that gets its spans; by default the one that
        OTEL_EXPORTER_OTLP_ENDPOINT names, or none.
    security : Security
        Which tokens callers must bring, and TLS. All workers of a cluster have the same: they call
        each other with the first token, and with the same certificate.
    metrics_security : Security, optional
        The same for metrics; by default it is no other.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 0
    load: LoadOptions = field(default_factory=LoadOptions)
    role: str = "full"
    leaf_layers: int = 0
    threads: int = 0
    engine: Engine = "torch"
    ranks: int = 1
    zero_offload: str = "cpu"
    bias: str | None = None
    memory_budget: str = "auto"
    memory_share: float = 1.0
    idle_seconds: float = 3600.0
    grace_seconds: float = 30.0
    name: str = ""
    log_format: str = "text"
    metrics_port: int | None = None
    transport: str = "auto"
    wire_dtype: str = "auto"
    peer_stall_seconds: float = STALL_SECONDS
    otlp_endpoint: str = ""
    security: Security = field(default_factory=Security)
    metrics_security: Security | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; use 1 to 65535, or 0 for a free one")
        if self.threads < 0:
            raise ConfigError(f"threads is {self.threads}; use 1 or more, or 0 for the default")
        check_engine(self.engine, self.ranks)
        check_loading(self.engine, self.load)
        self._check_role()
        if self.memory_budget != "auto":
            parse_bytes(self.memory_budget)
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share is {self.memory_share:g}; use more than 0, at most 1")
        if self.idle_seconds <= 0:
            raise ConfigError(f"idle_seconds is {self.idle_seconds}; use more than 0")
        if self.grace_seconds < 0:
            raise ConfigError(f"grace_seconds is {self.grace_seconds}; use 0 or more")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport is {self.transport!r}; use one of {list(TRANSPORTS)}")
        if self.wire_dtype not in WIRE_DTYPES:
            raise ConfigError(f"wire_dtype is {self.wire_dtype!r}; use one of {list(WIRE_DTYPES)}")
        if self.peer_stall_seconds <= 0:
            raise ConfigError(f"peer_stall_seconds is {self.peer_stall_seconds}; use more than 0")

    def _check_role(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"role is {self.role!r}; use one of {list(ROLES)}")
        if (self.role == "leaf") != (self.leaf_layers > 0):
            raise ConfigError(
                f"role is {self.role} and leaf_layers is {self.leaf_layers}; role leaf needs the "
                "number of layers that leaves run, which `homer plan` shows, and no other role does"
            )
        if self.role == "leaf" and self.engine != "torch":
            raise ConfigError(f"role leaf needs engine torch, not {self.engine}")

    def watch_files(self) -> FileWatch:
        """Notices when files that the model is loaded from are others than now."""
        others = filter(None, (self.bias, self.load.adapter))
        return FileWatch(self.model, *others, revision=self.load.revision)

    @property
    def loading(self) -> LoadOptions:
        """How the model is loaded, as far as the role goes."""
        return dataclasses.replace(self.load, lower_layers=self.leaf_layers or None)
