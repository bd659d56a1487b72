"""Prometheus metrics of a service, in a registry of its own: an observer of the scheduler.

What workers hold and have moved comes from the statistics that `WorkerWatch` asks them for. Knows
nothing about how requests are run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.job import CacheReady, Job, JobSummary, NodeDone, Outcome
from cluster.observer import Observer
from cluster.watch import WorkerState, WorkerView, WorkerWatch
from homer.plan import NodeId
from workers.metrics import SECONDS_BUCKETS, level_label, memory_kinds

REQUEST_BUCKETS = (*SECONDS_BUCKETS, 1000.0, 2500.0)


@dataclass
class _Times:
    """When things happened to a request; `started` and tokens are None until then."""

    queued: float
    started: float | None = None
    token: float | None = None
    counted: bool = False


class ServiceMetrics(Observer):
    """What a service does.

    Parameters
    ----------
    watch : WorkerWatch
        Knows the workers.
    now : callable
        Seconds of a clock that never goes back.
    """

    def __init__(self, watch: WorkerWatch, now: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_WorkersCollector(watch))
        self._now = now
        self._jobs: dict[str, _Times] = {}

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, labels, registry=self.registry)

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(name, meaning, registry=self.registry)

        def seconds(name: str, meaning: str, *labels: str) -> Histogram:
            return Histogram(name, meaning, labels, buckets=REQUEST_BUCKETS, registry=self.registry)

        self._running = gauge(
            "homer_num_requests_running", "Requests of which something has started."
        )
        self._waiting = gauge(
            "homer_num_requests_waiting", "Requests of which nothing has started."
        )
        self._waiting_tokens = gauge(
            "homer_num_tokens_waiting", "Prompt tokens of the requests that wait."
        )
        self._first_token = seconds(
            "homer_time_to_first_token_seconds", "From a request's submission to its first token."
        )
        self._output_token = seconds(
            "homer_time_per_output_token_seconds", "From one token of an answer to the next."
        )
        self._latency = seconds(
            "homer_e2e_request_latency_seconds", "From submission to the end, of finished requests."
        )
        self._queue_time = seconds(
            "homer_request_queue_time_seconds", "From submission to the first piece of work."
        )
        self._prompt_tokens = counter(
            "homer_prompt_tokens", "Tokens of the prompts that were compressed."
        )
        self._retained_tokens = counter(
            "homer_retained_tokens", "Tokens that are left of them in the final caches."
        )
        self._generation_tokens = counter("homer_generation_tokens", "Tokens of answers.")
        self._leaf_seconds = seconds("homer_leaf_seconds", "Computing a leaf.")
        self._merge_seconds = seconds(
            "homer_merge_seconds", "Computing a merge, by its height above the leaves.", "level"
        )
        self._retries = counter("homer_retries", "Nodes that were run again.", "cause")
        self._lost = counter("homer_workers_lost", "Workers that were given up.")
        self._success = counter(
            "homer_request_success", "Finished requests, by what ended them.", "finished_reason"
        )
        self._requests = counter("homer_requests", "Requests that are over.", "outcome")

    def job_queued(self, job: Job) -> None:
        self._jobs[job.request_id] = _Times(self._now())
        self._waiting.inc()
        self._waiting_tokens.inc(job.plan.prompt_len)

    def job_started(self, job: Job) -> None:
        times = self._jobs[job.request_id]
        times.started = self._now()
        self._queue_time.observe(times.started - times.queued)
        self._leave_queue(job)
        self._running.inc()

    def node_done(self, job: Job, worker: str, done: NodeDone, level: int) -> None:
        if level:
            self._merge_seconds.labels(level_label(level)).observe(done.seconds)
        else:
            self._leaf_seconds.observe(done.seconds)

    def cache_ready(self, job: Job, worker: str, ready: CacheReady) -> None:
        times = self._jobs[job.request_id]
        # A cache that was lost and gathered again is no other prompt.
        if not times.counted:
            times.counted = True
            self._prompt_tokens.inc(job.plan.prompt_len)
            self._retained_tokens.inc(ready.cache_tokens)

    def token(self, job: Job) -> None:
        times, now = self._jobs[job.request_id], self._now()
        if times.token is None:
            self._first_token.observe(now - times.queued)
        else:
            self._output_token.observe(now - times.token)
        times.token = now
        self._generation_tokens.inc()

    def retried(self, job: Job, node: NodeId, cause: str) -> None:
        self._retries.labels(cause).inc()

    def job_ended(self, job: Job, outcome: Outcome, summary: JobSummary | None) -> None:
        self._requests.labels(outcome).inc()
        times = self._jobs.pop(job.request_id, None)
        if times is None:
            return
        if times.started is None:
            self._leave_queue(job)
        else:
            self._running.dec()
        if summary is not None:
            self._success.labels(summary.finish_reason).inc()
            self._latency.observe(self._now() - times.queued)

    def worker_lost(self, name: str, reason: str) -> None:
        self._lost.inc()

    def _leave_queue(self, job: Job) -> None:
        self._waiting.dec()
        self._waiting_tokens.dec(job.plan.prompt_len)


class _WorkersCollector(Collector):
    """Metrics of the workers as they were when they were last asked."""

    def __init__(self, watch: WorkerWatch) -> None:
        self._watch = watch

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        views: tuple[WorkerView, ...] = self._watch.views
        workers = GaugeMetricFamily("homer_workers", "Workers by state.", labels=["state"])
        for state in WorkerState:
            workers.add_metric([state], sum(view.state is state for view in views))
        yield workers
        memory = GaugeMetricFamily(
            "homer_worker_memory_bytes",
            "Memory of a worker: resident and accelerator are its process's own, kv_shards and "
            "states are parts of them, budget is what requests may take, reserved what is promised "
            "to those that run.",
            labels=["worker", "kind"],
        )
        moved = CounterMetricFamily(
            "homer_transfer_bytes",
            "Bytes of tensors that a worker has received, by who sent them and how they came.",
            labels=["worker", "peer", "transport"],
        )
        seconds = CounterMetricFamily(
            "homer_transfer_seconds",
            "Seconds from asking for tensors to their end; transfers at once count each.",
            labels=["worker", "peer", "transport"],
        )
        names = {view.address: view.name for view in views}
        for view in views:
            if view.stats is None:
                continue
            for kind, value in memory_kinds(view.stats).items():
                memory.add_metric([view.name, kind], value)
            for transfer in view.stats.transfers:
                peer = names.get(transfer.peer, transfer.peer)
                labels = [view.name, peer, transfer.transport]
                moved.add_metric(labels, transfer.received_bytes)
                seconds.add_metric(labels, transfer.seconds)
        yield memory
        yield moved
        yield seconds
