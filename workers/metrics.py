"""Prometheus metrics of one worker, in a registry of its own.

Knows nothing about what the numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from homer.v1 import worker_pb2

# From a leaf of a small model on a GPU to one of a large model on a CPU.
SECONDS_BUCKETS = tuple(base * 10**power for power in range(-3, 3) for base in (1, 2.5, 5))
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
# A tree of this height has two to the power of it leaves: levels above are counted together.
HIGHEST_LEVEL = 16

Stats = worker_pb2.GetWorkerStatsResponse


def level_label(level: int) -> str:
    """The label of a level of the tree; there are few, whatever the trees are."""
    return str(level) if level < HIGHEST_LEVEL else f"{HIGHEST_LEVEL}+"


class WorkerMetrics:
    """What one worker has done since it started.

    Parameters
    ----------
    stats : callable, optional
        What it holds and has counted, asked for at each scrape, from the scrape's own thread.
    """

    def __init__(self, stats: Callable[[], Stats] | None = None) -> None:
        self.registry = CollectorRegistry()
        if stats is not None:
            self.registry.register(_StatsCollector(stats))
        self._leaf_seconds = Histogram(
            "homer_worker_leaf_seconds",
            "Computing a leaf.",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._merge_seconds = Histogram(
            "homer_worker_merge_seconds",
            "Computing a merge, by its height above the leaves.",
            ["level"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._leaf_tokens = Counter(
            "homer_worker_leaf_tokens",
            "Context tokens that leaves have read.",
            registry=self.registry,
        )
        self._decode_batch_size = Histogram(
            "homer_worker_decode_batch_size",
            "Answers that got a token in the same decode step.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )

        self._load_seconds = Gauge(
            "homer_worker_load_seconds", "Loading the model.", registry=self.registry
        )
        self._loaded_layers = Gauge(
            "homer_worker_loaded_layers",
            "Layers of the model that are loaded.",
            registry=self.registry,
        )

    def model_loaded(self, layers: int, seconds: float) -> None:
        """The model is there, with so many of its layers."""
        self._loaded_layers.set(layers)
        self._load_seconds.set(seconds)

    def leaf_done(self, tokens: int, seconds: float) -> None:
        """A leaf of `tokens` context tokens was computed."""
        self._leaf_seconds.observe(seconds)
        self._leaf_tokens.inc(tokens)

    def merge_done(self, level: int, seconds: float) -> None:
        """A merge of this height above the leaves was computed."""
        self._merge_seconds.labels(level_label(level)).observe(seconds)

    def decode_step(self, answers: int) -> None:
        """Each of `answers` answers got a token in one step."""
        self._decode_batch_size.observe(answers)


class _StatsCollector(Collector):
    """What a worker counts anyhow, as metrics."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily(
            "homer_worker_requests", "Requests of which something is held.", stats.requests
        )
        yield GaugeMetricFamily(
            "homer_worker_running_calls", "Calls that are being answered.", stats.running_calls
        )
        yield CounterMetricFamily(
            "homer_worker_generation_tokens", "Tokens generated.", stats.generated_tokens
        )
        yield CounterMetricFamily(
            "homer_worker_sent_bytes", "Bytes of tensor streams sent.", stats.sent_bytes
        )
        by = ["peer", "transport"]
        received = CounterMetricFamily(
            "homer_worker_transfer_bytes",
            "Bytes of tensor streams received, by the worker that sent them and how they came.",
            labels=by,
        )
        seconds = CounterMetricFamily(
            "homer_worker_transfer_seconds",
            "Seconds from asking for a tensor stream to its end; streams at once count each.",
            labels=by,
        )
        for one in stats.transfers:
            received.add_metric([one.peer, one.transport], one.received_bytes)
            seconds.add_metric([one.peer, one.transport], one.seconds)
        yield received
        yield seconds
        memory = GaugeMetricFamily(
            "homer_worker_memory_bytes",
            "Memory: resident and accelerator are the process's own, kv_shards and states parts of "
            "them, budget is what requests may take, reserved what is promised to those that run.",
            labels=["kind"],
        )
        for kind, value in memory_kinds(stats).items():
            memory.add_metric([kind], value)
        yield memory


def memory_kinds(stats: Any) -> dict[str, int]:
    """The kinds of memory of a worker's statistics, in bytes."""
    return {
        "resident": stats.resident_bytes,
        "accelerator": stats.accelerator_bytes,
        "kv_shards": stats.kv_shard_bytes,
        "states": stats.state_bytes,
        "budget": stats.memory_budget_bytes,
        "reserved": stats.reserved_bytes,
    }
