"""Real worker processes for tests, and a small driver that runs one prompt across them."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from homer import MergePlan
from homer.plan import NodeId
from homer.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from tests.forked import ForkedProgram
from workers.channels import NO_CREDENTIALS, Credentials
from workers.plan_wire import write_node, write_plan
from workers.transport import CHANNEL_OPTIONS

START_SECONDS = 120.0
CALL_SECONDS = 120.0


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `condition` holds; fails when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


class WorkerProcess:
    """`python -m workers` in a process of its own, and a client to it."""

    def __init__(
        self,
        model: Path,
        *options: str,
        log: Path | None = None,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self.log = log
        self._credentials = credentials
        arguments = ["--model", str(model), "--threads", "1", "--device", "cpu"]
        with nullcontext() if log is None else log.open("w") as stderr:
            self.process = ForkedProgram(
                "workers.__main__",
                [*arguments, "--dtype", "float32", *options],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stderr=stderr,
            )

    def wait_until_ready(self) -> WorkerProcess:
        """Wait for the line that it prints, and connect to it."""
        self.ready_line = self._first_line()
        words = dict(word.split("=") for word in self.ready_line.split()[2:])
        self.address = f"{words['host']}:{words['port']}"
        self.reported_pid = int(words["pid"])
        self.channel = self._credentials.channel(self.address, CHANNEL_OPTIONS)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)
        return self

    def stats(self) -> worker_pb2.GetWorkerStatsResponse:
        return self.stub.GetWorkerStats(worker_pb2.GetWorkerStatsRequest(), timeout=CALL_SECONDS)

    def holds_nothing(self) -> bool:
        stats = self.stats()
        return not (
            stats.requests
            or stats.node_states
            or stats.kv_shards
            or stats.state_bytes
            or stats.kv_shard_bytes
            or stats.running_calls
        )

    def stop(self) -> int:
        """Ask it to end, as a process manager does; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _first_line(self) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                self.process.kill()
                raise TimeoutError("the worker did not start in time")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        return line.strip()


@contextmanager
def running_workers(
    model: Path, *options: str, count: int = 1, **settings: Any
) -> Iterator[list[WorkerProcess]]:
    """Workers that start side by side, and are stopped at the end."""
    workers = [WorkerProcess(model, *options, **settings) for _ in range(count)]
    try:
        yield [worker.wait_until_ready() for worker in workers]
    finally:
        for worker in workers:
            worker.stop()


@dataclass
class Prompt:
    """One prompt and the calls that it takes."""

    request_id: str
    plan: MergePlan
    prefix_ids: list[int]
    context_ids: list[int]
    suffix_ids: list[int]

    @classmethod
    def of(cls, request_id: str, plan: MergePlan, parts: Sequence[torch.Tensor]) -> Prompt:
        return cls(request_id, plan, *(part.flatten().tolist() for part in parts))

    @property
    def spec(self) -> worker_pb2.RequestSpec:
        return worker_pb2.RequestSpec(
            request_id=self.request_id,
            plan=write_plan(self.plan),
            prefix_ids=self.prefix_ids,
            suffix_ids=self.suffix_ids,
        )

    def subtree(self, node_id: NodeId, attempt: int = 0) -> worker_pb2.RunSubtreeRequest:
        node = self.plan.by_id[node_id]
        return worker_pb2.RunSubtreeRequest(
            request=self.spec,
            node=write_node(node_id),
            attempt=attempt,
            context_ids=self.context_ids[node.context_start : node.context_end],
        )

    def merge(
        self, node_id: NodeId, addresses: Sequence[str], attempt: int = 0
    ) -> worker_pb2.MergeRequest:
        children = self.plan.by_id[node_id].children
        return worker_pb2.MergeRequest(
            request=self.spec,
            node=write_node(node_id),
            attempt=attempt,
            children=[
                worker_pb2.NodeLocation(node=write_node(child), address=address)
                for child, address in zip(children, addresses, strict=True)
            ],
        )

    def prune(self, node_id: NodeId, kept: Sequence[int]) -> worker_pb2.PruneRequest:
        node = self.plan.by_id[node_id]
        return worker_pb2.PruneRequest(
            request_id=self.request_id,
            node=write_node(node_id),
            context_indices=kept,
            context_start=node.context_start,
            context_end=node.context_end,
        )

    def drop(self, node_id: NodeId, attempt: int = 0) -> worker_pb2.DropRequest:
        return worker_pb2.DropRequest(
            request_id=self.request_id, node=write_node(node_id), attempt=attempt
        )

    def generate(
        self,
        addresses: Sequence[str],
        max_tokens: int,
        attempt: int = 0,
        resume: Sequence[int] = (),
        ignore_eos: bool = True,
        **sampling: Any,
    ) -> worker_pb2.GenerateTokensRequest:
        return worker_pb2.GenerateTokensRequest(
            request=self.spec,
            node=write_node(self.plan.root.id),
            attempt=attempt,
            shard_addresses=addresses,
            sampling=sampling_pb2.SamplingParams(
                max_tokens=max_tokens, ignore_eos=ignore_eos, **sampling
            ),
            delivered=[worker_pb2.DeliveredTokens(token_ids=resume)],
        )


@dataclass
class Answer:
    """What came out of a prompt, and where its parts ran."""

    ready: worker_pb2.CacheReady
    tokens: list[int]
    summary: worker_pb2.GenerateTokensSummary
    places: dict[NodeId, int] = field(default_factory=dict)
    merges: dict[NodeId, worker_pb2.MergeResponse] = field(default_factory=dict)


def run_below_root(
    prompt: Prompt, workers: Sequence[WorkerProcess], cut_height: int
) -> tuple[dict[NodeId, int], dict[NodeId, worker_pb2.MergeResponse]]:
    """Run every subtree of `cut_height`, on one worker after the other in turn, and merge them.

    Each merge runs where its last child is. Returns the worker of each node above the cut, and what
    the merges answered.
    """
    places: dict[NodeId, int] = {}
    merges: dict[NodeId, worker_pb2.MergeResponse] = {}
    for node in prompt.plan.nodes:
        if node.id.height == cut_height:
            where = len(places) % len(workers)
            events = list(
                workers[where].stub.RunSubtree(prompt.subtree(node.id), timeout=CALL_SECONDS)
            )
            assert [(e.node.height, e.node.index) for e in events] == [
                tuple(below.id) for below in prompt.plan.subtree(node.id)
            ]
            places[node.id] = where
        elif node.id.height > cut_height:
            where = places[node.children[-1]]
            addresses = [
                "" if places[child] == where else workers[places[child]].address
                for child in node.children
            ]
            request = prompt.merge(node.id, addresses)
            merged = workers[where].stub.Merge(request, timeout=CALL_SECONDS)
            for other in set(places.values()) - {where}:
                workers[other].stub.Prune(
                    prompt.prune(node.id, merged.context_indices), timeout=CALL_SECONDS
                )
            places[node.id], merges[node.id] = where, merged
    return places, merges


def run_across(
    prompt: Prompt,
    workers: Sequence[WorkerProcess],
    cut_height: int,
    max_tokens: int = 8,
    **sampling: Any,
) -> Answer:
    """Run a prompt to its answer across `workers`; nothing is released."""
    # A worker that ran nothing of the request knows nothing of it.
    holders = workers[: sum(node.id.height == cut_height for node in prompt.plan.nodes)]
    places, merges = run_below_root(prompt, holders, cut_height)
    root = holders[places[prompt.plan.root.id]]
    addresses = [worker.address for worker in holders if worker is not root]
    request = prompt.generate(addresses, max_tokens, **sampling)
    events = list(root.stub.GenerateTokens(request, timeout=CALL_SECONDS))
    assert [event.WhichOneof("event") for event in events] == [
        "cache_ready",
        *["token"] * (len(events) - 2),
        "summary",
    ]
    return Answer(
        ready=events[0].cache_ready,
        tokens=[event.token.token_id for event in events[1:-1]],
        summary=events[-1].summary,
        places=places,
        merges=merges,
    )


def release(prompt: Prompt, workers: Sequence[WorkerProcess]) -> int:
    """Release a prompt everywhere; returns the bytes freed."""
    request = worker_pb2.ReleaseRequest(request_id=prompt.request_id)
    return sum(w.stub.Release(request, timeout=CALL_SECONDS).freed_bytes for w in workers)
