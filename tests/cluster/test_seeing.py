"""A running service as somebody sees it who looks after it: metrics, logs, spans, status, traces.

The coordinator's parts run in this process, two workers in their own.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import signal
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cluster.chrome_trace import chrome_trace
from cluster.cli import app
from cluster.client import HomerClient
from cluster.door import GrpcDoor
from cluster.errors import ServiceError
from cluster.http.app import HttpDoor, build_http
from cluster.scheduler import Scheduler
from cluster.seeing import Seeing
from cluster.service import Limits, LongContextService
from cluster.worker_client import GrpcWorkerClient
from homer import HomerConfig, MergePlan
from homer.plan import NodeId
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import Run, poll
from tests.cluster.processes import BIN
from tests.deploy.promql import asked_series, expressions
from tests.golden_cases import model_dir
from tests.otlp import Collector, Span, running_collector
from tests.scrape import Scrape
from tests.trace_checks import check_trace
from tests.workers.processes import WorkerProcess
from workers.logs import make_formatter
from workers.tracing import connect_tracing

CONFIG = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=3)
# No other number that is logged looks like these.
CONTEXT = [200 + n % 57 for n in range(1500)]
QUESTION = [291, 292, 293]
TOKENS = 9
PLAN = MergePlan.build(0, len(CONTEXT), len(QUESTION), 12, CONFIG)


@dataclass
class Seen:
    """A service, one request that it has answered, and what was seen before and after."""

    client: HomerClient
    workers: list[WorkerProcess]
    collector: Collector
    scheduler: Scheduler
    seeing: Seeing
    log_text: io.StringIO
    trace_id: str = ""
    caller_id: str = ""
    summary: pb.Summary = field(default_factory=pb.Summary)
    before: Scrape | None = None
    after: Scrape | None = None

    def ask(self, **request: Any) -> list[Any]:
        request = {"context": CONTEXT, "question": QUESTION, **request}
        return list(self.client.generate(**request))

    def moved(self, sample: str, **labels: str) -> float:
        assert self.before is not None
        assert self.after is not None
        return self.after.total(sample, **labels) - self.before.total(sample, **labels)

    def scrape(self) -> Scrape:
        return Scrape(self.seeing.metrics_address)

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_text.getvalue().splitlines()]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, run: Run[Any]) -> Iterator[Seen]:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        collector = stack.enter_context(running_collector())
        one = stack.enter_context(service_with(tmp_path_factory.mktemp("logs"), collector, run))
        one.before = one.scrape()
        ask_in_a_span(one)
        # The last span is sent, and the workers' statistics are asked for, in the background.
        run(one.seeing.watch.look())
        one.after = one.scrape()
        yield one


class service_with:  # noqa: N801 - a context manager
    """A service of two workers that sends its spans to `collector`."""

    def __init__(self, folder: Path, collector: Collector, run: Run[Any]) -> None:
        self._folder, self._collector, self._run = folder, collector, run
        self._stack = ExitStack()

    def __enter__(self) -> Seen:
        stack, run, collector = self._stack, self._run, self._collector
        options = ["--metrics-port", "0", "--log-format", "json"]
        options += ["--otlp-endpoint", collector.endpoint]
        workers = [
            WorkerProcess(
                model_dir("B"),
                *options,
                "--name",
                f"worker-{number}",
                log=self._folder / f"{number}.log",
            )
            for number in range(2)
        ]
        for worker in workers:
            stack.callback(worker.stop)
        for worker in workers:
            worker.wait_until_ready()
        log_text = io.StringIO()
        stack.enter_context(logging_to(log_text))
        tracing = connect_tracing(
            collector.endpoint, service_name="homer", service_instance_id="coordinator"
        )
        seeing = Seeing(tracing)

        async def start() -> tuple[Scheduler, GrpcDoor, int]:
            clients = [
                GrpcWorkerClient(f"worker-{n}", one.address) for n, one in enumerate(workers)
            ]
            scheduler = Scheduler(clients, observer=seeing.observer)
            info = await clients[0].info()
            service = LongContextService(scheduler, info, CONFIG, None, Limits(), seeing)
            door = GrpcDoor("127.0.0.1", 0, Limits())
            port = await door.listen()
            await door.serve(service)
            seeing.start("127.0.0.1", 0)
            return scheduler, door, port

        scheduler, door, port = run(start())

        async def stop() -> None:
            await door.stop()
            await scheduler.close()
            await seeing.stop()
            await asyncio.gather(*(client.close() for client in scheduler.workers))

        stack.callback(lambda: run(stop()))
        client = stack.enter_context(HomerClient(f"127.0.0.1:{port}"))
        return Seen(client, workers, collector, scheduler, seeing, log_text)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class logging_to:  # noqa: N801 - a context manager
    """Everything that the project logs in this process, as JSON lines."""

    def __init__(self, stream: io.StringIO) -> None:
        self._handler = logging.StreamHandler(stream)
        self._handler.setFormatter(make_formatter("json"))
        self._loggers = [logging.getLogger(name) for name in ("cluster", "workers", "homer")]

    def __enter__(self) -> None:
        for logger in self._loggers:
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)

    def __exit__(self, *error: Any) -> None:
        for logger in self._loggers:
            logger.removeHandler(self._handler)
            logger.setLevel(logging.NOTSET)


def ask_in_a_span(seen: Seen) -> None:
    """Ask as a program does that makes spans of its own."""
    provider, spans = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with provider.get_tracer("a program").start_as_current_span("asks"):
        events = seen.ask(
            request_id="mine",
            sampling={"max_tokens": TOKENS, "ignore_eos": True},
        )
    (caller,) = spans.get_finished_spans()
    seen.trace_id = format(caller.context.trace_id, "032x")
    seen.caller_id = format(caller.context.span_id, "016x")
    seen.summary = events[-1]


# Metrics


COORDINATOR_METRICS = {
    "homer_num_requests_running": "gauge",
    "homer_num_requests_waiting": "gauge",
    "homer_num_tokens_waiting": "gauge",
    "homer_time_to_first_token_seconds": "histogram",
    "homer_time_per_output_token_seconds": "histogram",
    "homer_e2e_request_latency_seconds": "histogram",
    "homer_request_queue_time_seconds": "histogram",
    "homer_prompt_tokens": "counter",
    "homer_retained_tokens": "counter",
    "homer_generation_tokens": "counter",
    "homer_leaf_seconds": "histogram",
    "homer_merge_seconds": "histogram",
    "homer_transfer_bytes": "counter",
    "homer_transfer_seconds": "counter",
    "homer_retries": "counter",
    "homer_request_success": "counter",
    "homer_requests": "counter",
    "homer_workers": "gauge",
    "homer_workers_lost": "counter",
    "homer_worker_memory_bytes": "gauge",
}


def test_a_scrape_of_the_service_has_every_metric_with_its_type(seen: Seen) -> None:
    assert seen.after is not None
    assert seen.after.types == COORDINATOR_METRICS


def test_the_documents_list_every_metric(seen: Seen) -> None:
    page = (Path(__file__).parents[2] / "docs" / "seeing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(homer_\w+)` \| (\w+) \|", page, flags=re.MULTILINE)
    words = dict(word.split("=") for word in seen.workers[0].ready_line.split()[2:])
    of_workers = Scrape(f"127.0.0.1:{words['metrics_port']}").types
    # The coordinator tells of each worker's memory under the name that the worker has for its own.
    expected = {**COORDINATOR_METRICS, **of_workers}
    as_scraped = {
        name + ("_total" if kind == "counter" else ""): kind for name, kind in expected.items()
    }
    assert dict(rows) == as_scraped
    assert len(rows) == len(COORDINATOR_METRICS) + len(of_workers)


def test_counters_move_by_what_was_done(seen: Seen) -> None:
    assert seen.moved("homer_prompt_tokens_total") == PLAN.prompt_len
    assert seen.moved("homer_retained_tokens_total") == seen.summary.kept_tokens == PLAN.kept_len
    assert seen.moved("homer_generation_tokens_total") == TOKENS
    assert seen.moved("homer_leaf_seconds_count") == len(PLAN.leaves)
    levels = Counter(str(node.id.height) for node in PLAN.merges)
    for level, count in levels.items():
        assert seen.moved("homer_merge_seconds_count", level=level) == count
    assert seen.moved("homer_merge_seconds_count") == len(PLAN.merges)
    assert seen.moved("homer_time_to_first_token_seconds_count") == 1
    assert seen.moved("homer_time_per_output_token_seconds_count") == TOKENS - 1
    assert seen.moved("homer_e2e_request_latency_seconds_count") == 1
    assert seen.moved("homer_request_success_total", finished_reason="length") == 1
    assert seen.moved("homer_requests_total", outcome="finished") == 1
    assert seen.moved("homer_transfer_bytes_total") == seen.summary.moved_bytes > 0
    assert seen.moved("homer_transfer_seconds_total") > 0
    first_token = seen.moved("homer_time_to_first_token_seconds_sum")
    assert first_token == pytest.approx(seen.summary.seconds.time_to_first_token, abs=0.2)
    assert first_token < seen.moved("homer_e2e_request_latency_seconds_sum")


def test_gauges_say_what_is_now(seen: Seen) -> None:
    assert seen.after is not None
    assert seen.after.total("homer_num_requests_running") == 0
    assert seen.after.total("homer_num_requests_waiting") == 0
    assert seen.after.total("homer_workers", state="idle") == 2
    assert seen.after.total("homer_workers") == 2
    for number in range(2):
        resident = seen.after.total(
            "homer_worker_memory_bytes", worker=f"worker-{number}", kind="resident"
        )
        assert resident > 50e6
    assert seen.after.labels("homer_transfer_bytes_total", "peer") <= {"worker-0", "worker-1"}


def test_prometheus_is_told_where_the_workers_are(seen: Seen) -> None:
    with urlopen(f"http://{seen.seeing.metrics_address}/targets", timeout=30) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        (group,) = json.load(answer)
    assert len(group["targets"]) == 2
    for target in group["targets"]:
        assert "homer_worker_leaf_seconds" in Scrape(target).types


def test_alerts_and_the_dashboard_ask_for_series_that_there_are(seen: Seen) -> None:
    """Metric by metric, with the labels and, of those that are always there, the values."""
    words = dict(word.split("=") for word in seen.workers[0].ready_line.split()[2:])
    assert seen.after is not None
    scrapes = [seen.after, Scrape(f"127.0.0.1:{words['metrics_port']}")]
    families = [family for one in scrapes for family in one.families.values()]
    families += text_string_to_metric_families(of_the_http_door())
    labels: defaultdict[str, set[str]] = defaultdict(set)
    values: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    samples = [sample for family in families for sample in family.samples]
    for sample in samples:
        labels[sample.name] |= set(sample.labels)
        for name, value in sample.labels.items():
            values[sample.name, name].add(value)
    # Series of these come with the first retry.
    labels["homer_retries_total"] |= {"cause"}
    metrics = {sample.name for sample in samples} | {"homer_retries_total", "up"}
    for place, expression in expressions().items():
        for asked in asked_series(expression):
            assert asked.metric in metrics, place
            assert asked.labels <= labels[asked.metric], place
            for label in ("state", "kind"):
                assert asked.values.get(label, set()) <= values[asked.metric, label], place


def of_the_http_door() -> str:
    async def build() -> FastAPI:
        # A client of gRPC is made in an event loop.
        return build_http(HttpDoor("127.0.0.1:1"))

    with TestClient(asyncio.run(build())) as client:
        assert client.get("/version").status_code == 200
        return client.get("/metrics").text


def test_a_cancelled_and_a_refused_request_are_counted(seen: Seen) -> None:
    before = seen.scrape()
    events = seen.client.generate(
        context=CONTEXT, question=QUESTION, sampling={"max_tokens": 20_000, "ignore_eos": True}
    )
    for event in events:
        if isinstance(event, pb.Token):
            break
    running = seen.scrape()
    assert running.total("homer_num_requests_running") == 1
    events.close()

    def cancelled() -> bool:
        now = seen.scrape()
        name = "homer_requests_total"
        more = now.total(name, outcome="cancelled") - before.total(name, outcome="cancelled")
        return more == 1 and now.total("homer_num_requests_running") == 0

    poll(cancelled, "the request is not counted as cancelled")
    now = seen.scrape()
    name = "homer_request_success_total"
    assert now.total(name) == before.total(name)


# Logs


def test_every_line_about_a_request_names_it(seen: Seen) -> None:
    job_id = seen.client.trace("mine").request_id
    about = [line for line in seen.log if line.get("request_id", "").startswith("mine")]
    assert {line["request_id"] for line in about} == {job_id}
    said = " ".join(line["message"] for line in about)
    assert "queued" in said
    assert "final cache" in said
    assert "ended: finished" in said
    without = [line for line in seen.log if "request_id" not in line]
    assert {line["logger"] for line in without} <= {"cluster.request_log", "cluster.seeing"}
    assert all(line["message"] in ("joined",) or "metrics" in line["message"] for line in without)
    for worker in seen.workers:
        assert worker.log is not None
        lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
        calls = [line for line in lines if line["logger"] == "workers.call_context"]
        assert {line["request_id"] for line in calls} >= {job_id}
        assert all(line.get("request_id") and line.get("node") for line in calls)
        assert {line["worker"] for line in lines} == {worker_name(seen, worker)}


def worker_name(seen: Seen, worker: WorkerProcess) -> str:
    return f"worker-{seen.workers.index(worker)}"


def test_why_a_request_was_not_answered_is_logged_with_its_id(seen: Seen) -> None:
    with pytest.raises(ServiceError):
        seen.ask(request_id="too-much", sampling={"max_tokens": 1 << 20})

    def reasons() -> list[str]:
        return [line["message"] for line in seen.log if line.get("request_id") == "too-much"]

    poll(lambda: bool(reasons()), "no line says why")
    (reason,) = reasons()
    assert reason.startswith("answered with INVALID_ARGUMENT: max_tokens is 1048576")


def test_no_line_holds_a_prompt_or_an_answer(seen: Seen) -> None:
    texts = [seen.log_text.getvalue()]
    texts += [worker.log.read_text() for worker in seen.workers if worker.log is not None]
    for text in texts:
        for ids in (CONTEXT[:3], QUESTION[:3], list(seen.summary.token_ids)[:3]):
            assert not re.search(r"\D+".join(map(str, ids)), text)


# Spans


def test_the_span_tree_of_a_request_is_its_merge_tree(seen: Seen) -> None:
    collector = seen.collector

    def of_request(name: str) -> list[Span]:
        return [span for span in collector.named(name) if span.trace_id == seen.trace_id]

    def nodes() -> list[Span]:
        return of_request("leaf") + of_request("merge")

    poll(
        lambda: (
            len(nodes()) >= len(PLAN.nodes)
            and len(of_request("request")) == len(of_request("decode")) == 1
        ),
        "spans are missing",
    )
    (request,) = of_request("request")
    assert request.parent_id == seen.caller_id
    assert request.service == "homer"
    by_node = {NodeId(*span.node): span for span in nodes()}
    assert len(by_node) == len(nodes()) == len(PLAN.nodes)
    for node in PLAN.nodes:
        span = by_node[node.id]
        assert span.name == ("leaf" if node.is_leaf else "merge")
        parent = PLAN.parents.get(node.id)
        above = request if parent is None else by_node[parent]
        assert span.parent_id == above.span_id
        assert above.started <= span.started <= span.ended <= above.ended
        assert span.attributes["homer.tokens.in"] == node.context_in
        assert span.attributes["homer.tokens.out"] == node.context_out
        assert not span.failed
    instances = {span.instance for span in nodes()}
    assert instances == {"coordinator", "worker-0", "worker-1"}
    for name in ("gather", "refresh", "decode"):
        (span,) = of_request(name)
        assert span.parent_id == request.span_id
        assert span.instance.startswith("worker-")
    for span in of_request("compute"):
        (above,) = (one for one in nodes() if one.span_id == span.parent_id)
        assert above.name == "merge"
    assert len(of_request("compute")) == len(PLAN.merges)
    assert {span.attributes["homer.request_id"] for span in nodes()} == {
        seen.client.trace("mine").request_id
    }


# Status and traces


def test_the_trace_of_a_finished_request_holds_its_tree(seen: Seen, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    done = CliRunner().invoke(
        app, ["trace", "mine", "--server", seen.client.address, "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    trace = json.loads(out.read_text())
    check_trace(trace, PLAN)
    kinds = Counter(
        event["cat"] for event in trace["traceEvents"] if event["ph"] == "X" and "cat" in event
    )
    assert kinds["gather"] == kinds["refresh"] == kinds["decode"] == 1
    assert kinds["transfer"] >= 1
    rows = {
        event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"
    }
    assert rows == {"request", "worker-0", "worker-1"}


def test_the_trace_of_a_running_request_shows_what_is_done(seen: Seen) -> None:
    events = seen.client.generate(
        context=CONTEXT,
        question=QUESTION,
        request_id="running",
        sampling={"max_tokens": 20_000, "ignore_eos": True},
    )
    tokens = (event for event in events if isinstance(event, pb.Token))
    next(tokens)
    answer = seen.client.trace("running")
    assert answer.outcome == ""
    check_trace(chrome_trace(answer), PLAN)
    info = seen.client.server_info()
    (status,) = info.requests
    assert status.request_id == answer.request_id
    assert status.stage == pb.REQUEST_STAGE_DECODE
    assert (status.leaves_done, status.leaves_total) == (len(PLAN.leaves), len(PLAN.leaves))
    assert (status.merges_done, status.merges_total) == (len(PLAN.merges), len(PLAN.merges))
    assert status.generated_tokens >= 1
    states = [worker.state for worker in info.workers]
    assert pb.WORKER_STATE_BUSY in states
    events.close()
    poll(lambda: not seen.client.server_info().requests, "the request goes on")
    assert seen.client.trace("running").outcome == "cancelled"


def test_a_request_that_nobody_knows_has_no_trace(seen: Seen) -> None:
    with pytest.raises(ServiceError, match="not known") as caught:
        seen.client.trace("nobody")
    assert caught.value.code == "NOT_FOUND"


def test_status_as_table_and_as_json(seen: Seen) -> None:
    poll(lambda: not seen.client.server_info().requests, "a request goes on")
    shown = CliRunner().invoke(app, ["status", "--server", seen.client.address])
    assert shown.exit_code == 0, shown.output
    for number, worker in enumerate(seen.workers):
        assert re.search(rf"worker-{number}\s+{re.escape(worker.address)}\s+idle", shown.output)
    given = CliRunner().invoke(app, ["status", "--server", seen.client.address, "--json"])
    info = json.loads(given.stdout)
    assert info["metrics_address"] == seen.seeing.metrics_address
    assert info["queued_tokens"] == 0
    assert info["requests"] == []
    leaves = sum(worker["leaves_done"] for worker in info["workers"])
    assert leaves >= len(PLAN.leaves)
    for worker, process in zip(info["workers"], seen.workers, strict=True):
        assert worker["state"] == "idle"
        assert worker["resident_bytes"] > 50e6
        assert worker["device"] == "cpu"
        words = dict(word.split("=") for word in process.ready_line.split()[2:])
        assert worker["metrics_address"] == f"127.0.0.1:{words['metrics_port']}"
        assert Scrape(worker["metrics_address"]).types["homer_worker_requests"] == "gauge"
        assert abs(worker["clock_ahead_seconds"]) < 2


def test_a_worker_that_drains_is_shown(seen: Seen, run: Run[Any]) -> None:
    events = seen.client.generate(
        context=CONTEXT, question=QUESTION, sampling={"max_tokens": 20_000, "ignore_eos": True}
    )
    next(event for event in events if isinstance(event, pb.Token))
    client = seen.scheduler.workers[1]
    # What it holds for the request keeps it from leaving.
    assert not run(seen.scheduler.drain_worker(client.name, 0.1))
    shown = CliRunner().invoke(app, ["status", "--server", seen.client.address])
    assert re.search(rf"{client.name}\s+\S+\s+draining", shown.output), shown.output
    given = CliRunner().invoke(app, ["status", "--server", seen.client.address, "--json"])
    states = {worker["name"]: worker["state"] for worker in json.loads(given.stdout)["workers"]}
    assert states[client.name] == "draining"
    assert seen.scrape().total("homer_workers", state="draining") == 1
    events.close()
    poll(lambda: run(seen.scheduler.drain_worker(client.name, 0.1)), "it does not leave")
    names = [worker.name for worker in seen.client.server_info().workers]
    assert names == [worker.name for worker in seen.scheduler.workers]
    assert client.name not in names

    async def join() -> None:
        seen.scheduler.add_worker(client)

    run(join())
    poll(lambda: len(seen.client.server_info().workers) == 2, "it is not back")


def test_status_goes_on_with_watch(seen: Seen) -> None:
    command = [str(BIN / "homer"), "status", "--server", seen.client.address]
    process = subprocess.Popen(
        [*command, "--watch", "--json", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    looks = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert all(len(look["workers"]) == 2 for look in looks)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_a_lost_worker_is_seen_everywhere(tmp_path: Path, run: Run[Any]) -> None:
    with running_collector() as collector, service_with(tmp_path, collector, run) as seen:
        events = seen.client.generate(context=CONTEXT * 10, question=QUESTION, request_id="goes-on")
        kept = list(events_until_half(events))
        seen.workers[0].process.kill()
        kept += events
        assert isinstance(kept[-1], pb.Summary)
        run(seen.seeing.watch.look())
        now = seen.scrape()
        assert now.total("homer_workers_lost_total") == 1
        assert now.total("homer_retries_total", cause="lost") >= 1
        assert now.total("homer_workers") == now.total("homer_workers", state="idle") == 1
        assert now.labels("homer_worker_memory_bytes", "worker") == {"worker-1"}
        trace = seen.client.trace("goes-on")
        nodes = [
            one
            for one in trace.slices
            if one.kind in (pb.TraceSlice.KIND_LEAF, pb.TraceSlice.KIND_MERGE)
        ]
        valid = [(one.node.height, one.node.index) for one in nodes if not one.lost]
        assert len(valid) == len(set(valid)) == trace.leaves + trace.merges
        assert {one.worker for one in nodes if one.lost} == {"worker-0"}
        lines = [line for line in seen.log if line["message"].startswith("run again")]
        assert lines
        assert {line["request_id"] for line in lines} == {trace.request_id}
        assert all(line["node"] for line in lines)
        lost = [line for line in seen.log if line["message"].startswith("lost: ")]
        assert [line["worker"] for line in lost] == ["worker-0"]


def events_until_half(events: Iterator[Any]) -> Iterator[Any]:
    """Events until half of the leaves are done, some of them by the first worker."""
    workers = set()
    for event in events:
        yield event
        if isinstance(event, pb.Progress):
            workers.add(event.worker)
            if "worker-0" in workers and event.leaves_done >= event.leaves_total // 2:
                return
