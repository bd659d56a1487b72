"""While rows and states come over a slow link, a worker computes other requests, to their end.

By the times that workers give for timelines and spans. The link is slow for as long as the test
wants, so that nothing depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

from homer.v1 import worker_pb2
from tests.chaos.link import Link
from tests.golden_cases import GoldenCase
from tests.workers.processes import (
    CALL_SECONDS,
    Prompt,
    WorkerProcess,
    eventually,
    release,
    run_below_root,
    running_workers,
)
from tests.workers.test_across import plan_of
from tests.workers.test_recovery import SAMPLING, TOKENS, expected_answer

BYTES_PER_SECOND = 10_000
CASE = GoldenCase.load("a_16c")
PLAN = plan_of(CASE, "refreshed")
_numbers = count()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[WorkerProcess]]:
    """Two workers whose tensors go over a connection even on one machine."""
    with running_workers(CASE.model_dir, "--transport", "grpc", count=2) as workers:
        yield workers


@pytest.fixture
def prompts(pair: list[WorkerProcess]) -> Iterator[tuple[Prompt, Prompt]]:
    """One that has to wait for the link, and another."""
    two = [Prompt.of(f"overlap/{next(_numbers)}", PLAN, CASE.parts) for _ in range(2)]
    yield two[0], two[1]
    for prompt in two:
        release(prompt, pair)
    eventually(lambda: all(worker.holds_nothing() for worker in pair))


@asynccontextmanager
async def slow_link(worker: WorkerProcess) -> AsyncIterator[tuple[Link, str]]:
    """A slow link to `worker`, and its address."""
    link = Link(int(worker.address.rpartition(":")[2]), random.Random(0))
    address = await link.open()
    link.slow(BYTES_PER_SECOND)
    try:
        yield link, address
    finally:
        await link.close()


def run_whole(prompt: Prompt, worker: WorkerProcess) -> tuple[list[Any], list[int]]:
    """A prompt on one worker: what it says of the nodes, and the tokens."""
    root = prompt.subtree(prompt.plan.root.id)
    nodes = list(worker.stub.RunSubtree(root, timeout=CALL_SECONDS))
    return nodes, answer(prompt, worker, [])[1]


def answer(
    prompt: Prompt, worker: WorkerProcess, addresses: list[str]
) -> tuple[worker_pb2.CacheReady, list[int]]:
    request = prompt.generate(addresses, TOKENS, **SAMPLING)
    events = list(worker.stub.GenerateTokens(request, timeout=CALL_SECONDS))
    return events[0].cache_ready, [event.token.token_id for event in events[1:-1]]


def assert_inside(nodes: list[Any], began: float, seconds: float) -> None:
    """Every node was computed while the transfer went on."""
    assert len(nodes) == len(PLAN.nodes)
    for node in nodes:
        assert began < node.started_unix_seconds
        assert node.started_unix_seconds + node.compute_seconds < began + seconds


def test_others_are_computed_and_answered_while_a_gather_waits_for_its_rows(
    pair: list[WorkerProcess], prompts: tuple[Prompt, Prompt]
) -> None:
    waits, goes = prompts
    places, _ = run_below_root(waits, pair, 1)
    worker, peer = (pair[w] for w in (places[PLAN.root.id], 1 - places[PLAN.root.id]))
    _, tokens = expected_answer("a_16c", PLAN)

    async def check() -> None:
        async with slow_link(peer) as (link, address):
            sent = peer.stats().sent_bytes
            gather = asyncio.create_task(asyncio.to_thread(answer, waits, worker, [address]))
            await asyncio.to_thread(eventually, lambda: peer.stats().sent_bytes > sent)
            nodes, others_tokens = await asyncio.to_thread(run_whole, goes, worker)
            assert not gather.done()
            link.heal()
            ready, its_tokens = await gather
        assert_inside(nodes, ready.started_unix_seconds, ready.gather_seconds)
        assert its_tokens == others_tokens == tokens

    asyncio.run(check())


def test_others_are_computed_while_a_merge_waits_for_a_state(
    pair: list[WorkerProcess], prompts: tuple[Prompt, Prompt]
) -> None:
    waits, goes = prompts
    children = PLAN.root.children
    for child, where in zip(children, pair, strict=True):
        list(where.stub.RunSubtree(waits.subtree(child), timeout=CALL_SECONDS))
    peer, worker = pair

    async def check() -> None:
        async with slow_link(peer) as (link, address):
            sent = peer.stats().sent_bytes
            request = waits.merge(PLAN.root.id, [address, ""])
            merge = asyncio.create_task(
                asyncio.to_thread(worker.stub.Merge, request, timeout=CALL_SECONDS)
            )
            await asyncio.to_thread(eventually, lambda: peer.stats().sent_bytes > sent)
            nodes, _ = await asyncio.to_thread(run_whole, goes, worker)
            assert not merge.done()
            link.heal()
            done = await merge
        assert_inside(nodes, done.transfer_started_unix_seconds, done.transfer_seconds)
        # It is computed when all has come.
        arrived = done.transfer_started_unix_seconds + done.transfer_seconds
        assert done.started_unix_seconds > nodes[-1].started_unix_seconds
        assert done.started_unix_seconds >= arrived - 0.01
        assert len(done.context_indices) == PLAN.root.context_out

    asyncio.run(check())
