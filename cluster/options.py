"""Settings of a service: what it serves, on how many workers, and where it listens.

One frozen dataclass, from which the command line takes its defaults. Knows nothing about Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.placement import PLACEMENTS, Place, Placement, WorkerSpec
from cluster.service import Limits
from homer.config import PlanKind, ScoreKind
from homer.engines import Engine, check_engine
from homer.errors import ConfigError
from homer.load_options import LoadOptions
from workers.budget import parse_bytes
from workers.channels import Credentials
from workers.logs import LOG_FORMATS
from workers.options import WIRE_DTYPES, WorkerOptions
from workers.security import Security
from workers.tls import Tls


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
    score: ScoreKind | None = None

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
        Worker processes at the start.
    min_workers, max_workers : int, optional
        Between them the pool gives idle workers back and asks for more while all are busy; by
        default it keeps `workers`.
    cpu : bool
        Workers compute on the CPU, with `threads` threads each. Otherwise each takes
        `gpus_per_worker` GPUs.
    cpu_workers : int
        Workers on the CPU beside those on GPUs.
    leaf_workers : int
        Workers beside those that load only the lowest `leaf_layers`, run leaves that need no more,
        and are otherwise like `workers`. By default (0) as many layers as leaves run of a document
        that has a leaf for every worker.
    leaf_layers : int
    threads : int
    gpus_per_worker : float
        Below 1, several workers share a GPU. Above, layers are spread over so many.
    engine : Engine
        What runs the model of each worker.
    ranks : int
        Processes that together are one worker, on one node: each with a GPU of its own, or with
        `threads` threads.
    zero_offload : str
        Where engine deepspeed-zero3 keeps weights: "none" is on the device, "cpu" in main memory,
        anything else a folder on a fast disk.
    placement : Placement
        On as few nodes as possible or on as many; strict: on one, or on as many as workers.
    resources, labels : mapping
        What else the nodes of `workers` must have: resources by Ray's names with the amount that
        each worker takes, and labels. `cpu_workers` go anywhere.
    grow_after_seconds, idle_seconds : float
        The pool grows when all workers have been busy for so long, and gives back a worker that
        had nothing to do for so long.
    load : LoadOptions
        How workers load the model; each chooses its own device.
    wire_dtype : str
        The type in which floats travel between workers: "auto" (as they are), bfloat16, float16 or
        float8. Narrower costs accuracy.
    bias : str, optional
        A calibration bias file; by default the one beside the model, where there is one.
    memory_budget : str
        What requests may take of each worker's memory, like "4GiB"; "auto" is four fifths of what
        is free of its share, "0" is no limit.
    worker_host : str, optional
        Where workers listen and reach each other: an address, a network ("10.1.0.0/16") or an
        interface ("eth1"). By default the address of their node from which it reaches the
        coordinator.
    host, port
        Where the gRPC door listens; port 0 is any free one.
    reflection : bool
        Whether the door tells its services and messages to clients that ask.
    name : str
        The coordinator actor's name in Ray's namespace "homer".
    placement_timeout_seconds : float
        How long to wait for the Ray cluster to make room for the workers.
    start_timeout_seconds : float
        How long a worker may take to load the model.
    grace_seconds : float
        How long running requests may take to end when the service is told to end.
    log_format : str
        "text", or "json" for one object per line.
    metrics_port : int, optional
        Where the coordinator serves its metrics, on `host`; 0 is any free port, None is nowhere.
        Where it serves them, so do the workers, on any free port of theirs.
    otlp_endpoint : str
        The OpenTelemetry collector for spans; by default what OTEL_EXPORTER_OTLP_ENDPOINT names,
        or none.
    security : Security
        Which tokens callers of the door and of metrics must bring, and TLS for both.
    worker_tls : Tls, optional
        TLS between coordinator and workers and among workers: each uses the same files on its node.
    worker_token : str
        What workers ask of each other and of the coordinator; `running_service` makes a random one.
        In no repr.
    """

    model: str
    workers: int = 1
    min_workers: int | None = None
    max_workers: int | None = None
    cpu: bool = False
    cpu_workers: int = 0
    leaf_workers: int = 0
    leaf_layers: int = 0
    threads: int = 1
    gpus_per_worker: float = 1.0
    engine: Engine = "torch"
    ranks: int = 1
    zero_offload: str = "cpu"
    placement: Placement = "pack"
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    grow_after_seconds: float = 10.0
    idle_seconds: float = 300.0
    load: LoadOptions = field(default_factory=LoadOptions)
    wire_dtype: str = "auto"
    bias: str | None = None
    memory_budget: str = "auto"
    worker_host: str | None = None
    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = True
    name: str = "homer"
    compression: CompressionOverrides = field(default_factory=CompressionOverrides)
    limits: Limits = field(default_factory=Limits)
    placement_timeout_seconds: float = 120.0
    start_timeout_seconds: float = 600.0
    grace_seconds: float = 30.0
    log_format: str = "text"
    metrics_port: int | None = None
    otlp_endpoint: str = ""
    security: Security = field(default_factory=Security)
    worker_tls: Tls | None = None
    worker_token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "min_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; use 1 or more")
        for name in (
            "cpu_workers", "leaf_workers", "leaf_layers", "grow_after_seconds", "idle_seconds",
            "grace_seconds",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 0 or more")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; use 0 (any free one) to 65535")
        self.security.check_host(self.host)
        if self.wire_dtype not in WIRE_DTYPES:
            raise ConfigError(f"wire_dtype is {self.wire_dtype!r}; use {', '.join(WIRE_DTYPES)}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format is {self.log_format!r}; use {', '.join(LOG_FORMATS)}")
        if self.memory_budget != "auto":
            parse_bytes(self.memory_budget)
        check_engine(self.engine, self.ranks)
        if self.leaf_workers and self.engine != "torch":
            raise ConfigError(f"leaf_workers need engine torch, not {self.engine}")
        self._check_devices()
        self._check_placement()

    def _check_devices(self) -> None:
        if self.gpus_per_worker <= 0:
            raise ConfigError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; use more than 0, or cpu for none"
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ConfigError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; use whole GPUs, over which layers "
                "are spread, or a share like 0.5 of one that several workers use"
            )
        whole = self.gpus_per_worker if self.ranks > 1 else max(1, self.gpus_per_worker)
        if self.engine != "torch" and whole != 1 and not self.cpu:
            raise ConfigError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; each of {self.ranks} ranks needs a "
                "GPU of its own: leave it at 1"
            )
        if self.load.device_map is not None and self.cpu_workers:
            raise ConfigError("device_map is for workers of one kind; leave cpu_workers out")
        self._load_for(self.main_spec)
        if self.leaf_workers:
            self._load_for(replace(self.main_spec, leaf=True))
        if self.cpu and self.cpu_workers:
            raise ConfigError("cpu_workers go beside workers on GPUs; with cpu use workers alone")

    def _check_placement(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement is {self.placement!r}; use {', '.join(PLACEMENTS)}")
        for kind, amount in self.resources.items():
            if kind in ("CPU", "GPU") or amount <= 0:
                raise ConfigError(
                    f"resources ask for {amount:g} {kind}; name resources other than CPU and GPU "
                    "(those have threads and gpus_per_worker), and more than 0 of each"
                )
        if not self.fewest <= self.workers <= self.most:
            raise ConfigError(
                f"workers is {self.workers}; use one from min_workers, {self.fewest}, to "
                f"max_workers, {self.most}"
            )
        if self.grows and self.placement.startswith("strict"):
            raise ConfigError(
                f"placement is {self.placement!r}, which a pool that grows and shrinks cannot "
                "keep; use pack or spread, or leave min_workers and max_workers out"
            )

    @property
    def fewest(self) -> int:
        """The least number of workers, without `cpu_workers`."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def most(self) -> int:
        """The largest number of workers, without `cpu_workers`."""
        return self.workers if self.max_workers is None else self.max_workers

    @property
    def grows(self) -> bool:
        """Whether the number of workers changes."""
        return self.fewest < self.most

    @property
    def main_spec(self) -> WorkerSpec:
        """What each of `workers` is."""
        return WorkerSpec(
            gpus=0.0 if self.cpu else self.gpus_per_worker * self.ranks,
            cpus=(self.threads if self.cpu else 1) * self.ranks,
            resources=self.resources,
            labels=self.labels,
        )

    @property
    def initial(self) -> list[WorkerSpec]:
        """All workers at the start; those on the CPU beside GPUs, then leaf workers, last."""
        beside = WorkerSpec(cpus=self.threads * self.ranks)
        leaf = replace(self.main_spec, leaf=True)
        return (
            [self.main_spec] * self.workers
            + [beside] * self.cpu_workers
            + [leaf] * self.leaf_workers
        )

    def place(self, number: int) -> Place:
        """Where worker `number` goes.

        A pool of fixed size is one group. Where it grows and shrinks, each worker is placed for
        itself, so that its place can be given back.
        """
        if not self.grows:
            return Place("workers", number, self.initial, self.placement)
        if self.placement == "spread":
            return Place()
        return Place(f"worker-{number}", 0, [self.spec(number)], self.placement)

    def spec(self, number: int) -> WorkerSpec:
        """What worker `number` is; those that join later are like `workers`."""
        return self.initial[number] if number < len(self.initial) else self.main_spec

    def memory_share(self, spec: WorkerSpec, node_cpus: float) -> float:
        """The part of its memory that a worker may count on, whoever else comes beside it.

        On a GPU it is the worker's part of that GPU. On the CPU as many share a node's memory as
        there may be of them and the node's processors, `node_cpus`, have room for.
        """
        if spec.gpus:
            return min(1.0, spec.gpus / self.ranks)
        if self.placement == "strict-spread":
            return 1.0
        there_may_be = self.most + self.leaf_workers if self.cpu else self.cpu_workers
        return 1 / max(1, min(there_may_be, int(node_cpus // spec.cpus)))

    def _load_for(self, spec: WorkerSpec) -> LoadOptions:
        """How a worker loads the model: on its GPU, spread over all that it has, or on the CPU."""
        spread = self.load.device_map or ("auto" if spec.gpus / self.ranks > 1 else None)
        if spread is None:
            return replace(self.load, device="cuda:0" if spec.gpus else "cpu")
        device = "auto" if spec.gpus else "cpu"
        load = replace(self.load, device=device, device_map=spread)
        if spec.leaf:
            load.check_lower_layers()
        return load

    def worker_options(
        self, spec: WorkerSpec, *, name: str, host: str, node_cpus: float
    ) -> WorkerOptions:
        """The settings of one worker, which listens on `host` of a node with `node_cpus`."""
        return WorkerOptions(
            model=self.model,
            host=host,
            load=self._load_for(spec),
            role="leaf" if spec.leaf else "full",
            leaf_layers=self.leaf_layers if spec.leaf else 0,
            wire_dtype=self.wire_dtype,
            threads=0 if spec.gpus else spec.cpus // self.ranks,
            engine=self.engine,
            ranks=self.ranks,
            zero_offload=self.zero_offload,
            bias=self.bias,
            memory_budget=self.memory_budget,
            memory_share=self.memory_share(spec, node_cpus),
            name=name,
            log_format=self.log_format,
            metrics_port=None if self.metrics_port is None else 0,
            otlp_endpoint=self.otlp_endpoint,
            security=self.worker_security,
            metrics_security=(
                None if self.metrics_port is None else replace(self.security, tls=self.worker_tls)
            ),
        )

    @property
    def worker_security(self) -> Security:
        """Who may call workers: whoever has this service's own token."""
        tokens = f"service={self.worker_token}" if self.worker_token else None
        return Security(
            tokens=tokens,
            tls=self.worker_tls,
            insecure_no_token=self.security.insecure_no_token,
        )

    @property
    def worker_credentials(self) -> Credentials:
        """What workers want to be shown."""
        return Credentials.of(self.worker_security)
