"""Workers run leaves together where weights lie outside; what they give and tell is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from homer.bench.offload import count_moved
from homer.encode import TreeEncoder
from homer.errors import ConfigError
from homer.load_options import LoadOptions
from homer.loading import LoadReport
from homer.plan import MergePlan, NodeId
from homer.stack import LayerStack
from homer.state import NodeState
from homer.v1 import worker_pb2
from tests.homer.families.zoo import load_plain
from tests.homer.test_offload import CONFIG, PARTS, on_disk, plan_for
from tests.workers.processes import Prompt
from workers.__main__ import parse_options
from workers.budget import Budget
from workers.engine import Engine, LoadedModel
from workers.metrics import WorkerMetrics
from workers.options import WorkerOptions
from workers.peer import PeerPool
from workers.runs import Counters, Runner
from workers.store import HeldRequest
from workers.tracing import Tracing

PLAN = plan_for(CONFIG)
ROOT = PLAN.root.id


class Fixture:
    """What runs nodes in a worker, around a model, with a budget and without a server."""

    def __init__(self, model: Any, budget_bytes: int = 0) -> None:
        self.model = LoadedModel("", LayerStack(model), None, LoadReport(0.0, 0, 0))
        self.engine = Engine()
        self.held: list[HeldRequest] = []
        self.budget = Budget(lambda: sum(held.nbytes for held in self.held), budget_bytes)
        self.counters = Counters()

    def request(self, name: str, plan: MergePlan = PLAN) -> HeldRequest:
        spec = Prompt.of(name, plan, PARTS).spec
        encoder = self.model.encoder(spec, plan, PARTS[0], PARTS[2])
        # It is the same for all leaves.
        encoder.prefix_kv()
        self.held.append(HeldRequest(spec, encoder))
        return self.held[-1]

    def runner(self) -> Runner:
        return Runner(
            self.model,
            self.engine,
            self.budget,
            PeerPool(lambda _: None),
            self.counters,
            WorkerMetrics(),
            Tracing(),
        )


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Fixture]:
    made = Fixture(on_disk("llama3", tmp_path))
    yield made
    made.engine.close()


def run_root(made: Fixture, held: HeldRequest) -> list[worker_pb2.RunSubtreeResponse]:
    events: list[worker_pb2.RunSubtreeResponse] = []
    asyncio.run(made.runner().run_subtree(held, ROOT, PARTS[1], events.append))
    return events


def assert_as_one_by_one(held: HeldRequest) -> None:
    """The state and rows of the root are those of a model in memory that runs leaf by leaf."""
    resident = TreeEncoder(LayerStack(load_plain("llama3")), PLAN, PARTS[0], PARTS[2])
    expected: NodeState = resident.run_subtree(ROOT, PARTS[1])
    assert torch.equal(held.state(ROOT).hidden, expected.hidden)
    for shard, other in zip(held.shards[ROOT], expected.shards, strict=True):
        assert torch.equal(shard.context_indices, other.context_indices)
        assert all(map(torch.equal, shard.keys + shard.values, other.keys + other.values))


def test_a_worker_reads_weights_once_for_each_batch_and_tells_of_every_node(
    outside: Fixture,
) -> None:
    held = outside.request("one")
    footprint, encoder = outside.model.stack.footprint, held.encoder
    # Half of what the merges' room leaves is enough for three leaves, and not for four.
    three = footprint.subtree(PLAN, ROOT, 3)
    outside.budget.total_bytes = 2 * three + footprint.largest_merge(PLAN) + 2
    assert encoder.choose_batch_size(ROOT, three + 1) == 3
    reads, _ = count_moved(outside.model.stack.model)
    events = run_root(outside, held)

    assert_as_one_by_one(held)
    assert sorted((e.node.height, e.node.index) for e in events) == sorted(
        tuple(node.id) for node in PLAN.nodes
    )
    for event in events:
        node = PLAN.by_id[NodeId(event.node.height, event.node.index)]
        assert (event.context_tokens_in, event.context_tokens_out) == (
            node.context_in, node.context_out,
        )  # fmt: skip
    leaves = [event for event in events if not event.node.height]
    # One after the other, each with its part of the time.
    assert all(event.compute_seconds > 0 for event in events)
    ends = [event.started_unix_seconds + event.compute_seconds for event in leaves]
    begins = [event.started_unix_seconds for event in leaves]
    assert all(end <= begin + 1e-3 for end, begin in zip(ends, begins[1:], strict=False))
    assert outside.counters.leaves_done == len(PLAN.leaves) == len(leaves)
    assert outside.counters.merges_done == len(PLAN.merges)
    times = {times for name, times in reads.items() if name.startswith("model.layers.0.")}
    assert times == {-(-len(leaves) // 3)}
    assert outside.budget.reserved_bytes == 0


def test_where_there_is_room_for_one_leaf_they_run_one_by_one(outside: Fixture) -> None:
    held = outside.request("narrow")
    footprint = outside.model.stack.footprint
    need = footprint.subtree(PLAN, ROOT)
    outside.budget.total_bytes = need + footprint.largest_merge(PLAN)
    reads, _ = count_moved(outside.model.stack.model)
    run_root(outside, held)
    assert_as_one_by_one(held)
    times = {times for name, times in reads.items() if name.startswith("model.layers.0.")}
    assert times == {len(PLAN.leaves)}


def test_a_stopped_request_ends_behind_the_batch_that_runs_and_another_goes_on(
    outside: Fixture,
) -> None:
    stopped, other = outside.request("stopped"), outside.request("other")
    footprint = outside.model.stack.footprint
    outside.budget.total_bytes = total = 4 * footprint.subtree(PLAN, ROOT, 2)
    batch = stopped.encoder.choose_batch_size(ROOT, (total - footprint.largest_merge(PLAN)) // 2)
    assert 1 < batch < len(PLAN.leaves)
    order: list[str] = []

    async def scenario() -> None:
        runner = outside.runner()

        async def run(held: HeldRequest) -> None:
            def emit(event: worker_pb2.RunSubtreeResponse) -> None:
                order.append(held.spec.request_id)
                if held is stopped:
                    first.cancel()

            await runner.run_subtree(held, ROOT, PARTS[1], emit)

        first = asyncio.create_task(run(stopped))
        second = asyncio.create_task(run(other))
        await second
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(scenario())
    assert order[:batch] == ["stopped"] * batch
    assert set(order[batch:]) == {"other"}
    assert not stopped.states
    assert not stopped.shards
    assert_as_one_by_one(other)
    assert outside.budget.reserved_bytes == 0


def test_the_command_line_takes_device_maps() -> None:
    limits = '{"0": "20GiB", "cpu": "60GiB"}'
    given = ["--device-map", "auto", "--max-memory", limits, "--offload-folder", "/scratch"]
    load = parse_options(["--model", "m", *given]).load
    assert (load.device_map, load.max_memory, load.offload_folder) == ("auto", limits, "/scratch")
    assert load.memory_limits == {0: "20GiB", "cpu": "60GiB"}


def test_ranks_have_their_own_ways_to_keep_weights_outside() -> None:
    load = LoadOptions(device_map="auto")
    with pytest.raises(ConfigError, match="device_map is set"):
        WorkerOptions(model="m", load=load, engine="deepspeed-zero3")
