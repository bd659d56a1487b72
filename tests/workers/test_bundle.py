"""Reports that come fast travel together; none is lost, and the last one does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cluster.sim.loop import run_virtual
from homer.v1 import worker_pb2
from workers.bundle import bundled


def report(index: int) -> worker_pb2.RunSubtreeResponse:
    return worker_pb2.RunSubtreeResponse(node=worker_pb2.NodeId(height=0, index=index))


async def every_second(count: int) -> AsyncIterator[worker_pb2.RunSubtreeResponse]:
    for index in range(count):
        await asyncio.sleep(1)
        yield report(index)


def messages(seconds: float, count: int = 8) -> list[tuple[float, list[int]]]:
    async def run() -> list[tuple[float, list[int]]]:
        loop = asyncio.get_running_loop()
        return [
            (loop.time(), [one.node.index for one in (*message.before, message)])
            async for message in bundled(every_second(count), report(count - 1).node, seconds)
        ]

    return run_virtual(run())


def test_each_report_is_a_message_by_default() -> None:
    assert messages(0.0) == [(index + 1, [index]) for index in range(8)]


def test_fast_reports_travel_together() -> None:
    assert messages(3.0) == [(3, [0, 1, 2]), (6, [3, 4, 5]), (8, [6, 7])]


def test_the_last_report_does_not_wait() -> None:
    assert messages(100.0) == [(8, list(range(8)))]


def test_reports_are_left_as_they_were() -> None:
    reports = [report(index) for index in range(3)]

    async def given() -> AsyncIterator[worker_pb2.RunSubtreeResponse]:
        for one in reports:
            yield one

    async def run() -> int:
        return len([one async for one in bundled(given(), reports[-1].node, 10.0)])

    assert run_virtual(run()) == 1
    assert not any(one.before for one in reports)
