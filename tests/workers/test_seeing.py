"""What workers tell of their work: metrics as Prometheus reads them, log lines, spans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from homer.plan import NodeId
from homer.v1 import worker_pb2
from tests.golden_cases import GoldenCase
from tests.otlp import Collector, running_collector
from tests.scrape import Scrape
from tests.workers.processes import (
    Answer,
    Prompt,
    WorkerProcess,
    eventually,
    release,
    run_across,
)
from tests.workers.test_across import plan_of

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TOKENS = 9


@dataclass
class Seen:
    """One prompt that ran across two workers, and what was seen of it."""

    workers: list[WorkerProcess]
    prompt: Prompt
    answer: Answer
    before: list[Scrape]
    after: list[Scrape]
    collector: Collector

    def log(self, worker: int) -> list[dict[str, Any]]:
        path = self.workers[worker].log
        assert path is not None
        return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(worker: WorkerProcess) -> Scrape:
    words = dict(word.split("=") for word in worker.ready_line.split()[2:])
    return Scrape(f"127.0.0.1:{words['metrics_port']}")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("seeing")
    case = GoldenCase.load("a_16c")
    prompt = Prompt.of("seen", plan_of(case, "paper"), case.parts)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        collector = stack.enter_context(running_collector())
        options = ["--metrics-port", "0", "--log-format", "json"]
        options += ["--otlp-endpoint", collector.endpoint]
        workers = [
            WorkerProcess(
                case.model_dir, *options, "--name", f"w{number}", log=folder / f"{number}.log"
            )
            for number in range(2)
        ]
        for worker in workers:
            stack.callback(worker.stop)
        for worker in workers:
            worker.wait_until_ready()
            worker.stub = cast(Any, Traced(worker.stub))
        before = [metrics_of(worker) for worker in workers]
        answer = run_across(prompt, workers, 2, TOKENS)
        after = [metrics_of(worker) for worker in workers]
        release(prompt, workers)
        yield Seen(workers, prompt, answer, before, after, collector)


class Traced:
    """A stub whose calls belong to a trace."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Any:
        parent = ("traceparent", f"00-{TRACE_ID}-{CALLER_ID}-01")
        return partial(getattr(self._stub, name), metadata=[parent])


def test_a_scrape_has_every_metric_with_its_type(seen: Seen) -> None:
    assert seen.after[0].types == {
        "homer_worker_load_seconds": "gauge",
        "homer_worker_loaded_layers": "gauge",
        "homer_worker_leaf_seconds": "histogram",
        "homer_worker_merge_seconds": "histogram",
        "homer_worker_leaf_tokens": "counter",
        "homer_worker_generation_tokens": "counter",
        "homer_worker_decode_batch_size": "histogram",
        "homer_worker_transfer_bytes": "counter",
        "homer_worker_transfer_seconds": "counter",
        "homer_worker_sent_bytes": "counter",
        "homer_worker_requests": "gauge",
        "homer_worker_running_calls": "gauge",
        "homer_worker_memory_bytes": "gauge",
    }


def test_loading_is_told(seen: Seen) -> None:
    for before in seen.before:
        assert before.total("homer_worker_loaded_layers") == seen.prompt.plan.num_layers
        assert 0 < before.total("homer_worker_load_seconds") < 120


def test_counters_move_by_what_was_done(seen: Seen) -> None:
    plan, places = seen.prompt.plan, seen.answer.places

    def moved(sample: str, **labels: str) -> float:
        return sum(
            after.total(sample, **labels) - before.total(sample, **labels)
            for before, after in zip(seen.before, seen.after, strict=True)
        )

    assert moved("homer_worker_leaf_seconds_count") == len(plan.leaves)
    assert moved("homer_worker_leaf_tokens_total") == plan.context_len
    levels = Counter(node.id.height for node in plan.merges)
    for level, count in levels.items():
        assert moved("homer_worker_merge_seconds_count", level=str(level)) == count
    assert seen.after[0].labels("homer_worker_merge_seconds_count", "level") <= set(
        map(str, levels)
    )
    assert moved("homer_worker_generation_tokens_total") == TOKENS
    # The first token comes from the gathered cache's own logits.
    assert moved("homer_worker_decode_batch_size_sum") == TOKENS - 1
    # A worker is told by the other's address what it got, and it got what the other sent.
    for me, other in ((0, 1), (1, 0)):
        got = seen.after[me].total(
            "homer_worker_transfer_bytes_total", peer=seen.workers[other].address
        )
        assert got == seen.after[me].total("homer_worker_transfer_bytes_total")
        assert got == seen.after[other].total("homer_worker_sent_bytes_total")
    root = places[plan.root.id]
    told = seen.answer.ready.received_bytes + sum(
        m.received_bytes for m in seen.answer.merges.values()
    )
    assert moved("homer_worker_transfer_bytes_total") == told > 0
    assert seen.after[root].total("homer_worker_transfer_seconds_total") > 0


def test_memory_is_that_of_the_process(seen: Seen) -> None:
    kinds = seen.after[0].labels("homer_worker_memory_bytes", "kind")
    assert kinds >= {"resident", "accelerator", "kv_shards", "states"}
    root = seen.answer.places[seen.prompt.plan.root.id]
    assert seen.after[root].total("homer_worker_memory_bytes", kind="kv_shards") > 0
    assert seen.after[root].total("homer_worker_requests") == 1
    for worker, before in zip(seen.workers, seen.before, strict=True):
        assert before.total("homer_worker_memory_bytes", kind="kv_shards") == 0
        resident = before.total("homer_worker_memory_bytes", kind="resident")
        statm = Path(f"/proc/{worker.process.pid}/statm").read_text().split()
        assert resident == pytest.approx(int(statm[1]) * 4096, rel=0.5)


def test_every_line_about_a_request_names_it(seen: Seen) -> None:
    for number in range(2):
        lines = seen.log(number)
        assert {line["worker"] for line in lines} == {f"w{number}"}
        about = [line for line in lines if line["logger"] == "workers.call_context"]
        assert about
        assert {line.get("request_id") for line in about} == {"seen"}
        assert all("node" in line and "attempt" in line for line in about)
        others = [line for line in lines if line not in about]
        assert not any("request_id" in line for line in others)
    nodes = {line.get("node") for number in range(2) for line in seen.log(number)}
    assert nodes - {None} == {f"{n.height}/{n.index}" for n in seen.answer.places}


def test_a_failed_call_is_logged_with_its_request(seen: Seen) -> None:
    request = worker_pb2.RunSubtreeRequest(
        request=seen.prompt.spec, node=worker_pb2.NodeId(height=0, index=0)
    )
    request.request.request_id = "wrong"
    with pytest.raises(grpc.RpcError):
        list(seen.workers[0].stub.RunSubtree(request))

    def logged() -> bool:
        return any(
            line.get("request_id") == "wrong" and "fails" in line["message"] for line in seen.log(0)
        )

    eventually(logged)


def test_spans_of_a_subtree_are_its_tree(seen: Seen) -> None:
    plan, collector = seen.prompt.plan, seen.collector
    expected = len(plan.leaves) + sum(node.id.height <= 2 for node in plan.merges)

    def nodes() -> list[Any]:
        return [s for s in collector.spans if s.name in ("leaf", "merge")]

    eventually(lambda: len(nodes()) >= expected and len(collector.named("decode")) == 1)
    by_node = {NodeId(*span.node): span for span in nodes()}
    assert len(by_node) == len(nodes()) == expected
    for node_id, span in by_node.items():
        assert span.trace_id == TRACE_ID
        parent = plan.parents.get(node_id)
        if node_id.height < 2 and parent is not None:
            assert span.parent_id == by_node[parent].span_id
            assert by_node[parent].started <= span.started < span.ended <= by_node[parent].ended
        else:
            assert span.parent_id == CALLER_ID
        assert span.instance == f"w{seen.answer.places[top_of(plan, node_id)]}"
        assert span.attributes["homer.request_id"] == "seen"
        assert not span.failed
    names = Counter(span.name for span in collector.spans)
    assert names["compute"] == len(plan.merges)
    assert names["gather"] == names["refresh"] == names["decode"] == 1
    assert names["transfer"] == sum(m.received_bytes > 0 for m in seen.answer.merges.values())


def top_of(plan: Any, node: NodeId) -> NodeId:
    while node.height < 2 and node in plan.parents:
        node = plan.parents[node]
    return node
