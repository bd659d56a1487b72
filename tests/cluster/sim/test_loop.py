"""Virtual time: the order of real time, and none of its waiting."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.sim.loop import DeadlockError, run_virtual


def test_hours_pass_at_once_and_in_order() -> None:
    seen: list[tuple[float, str]] = []

    async def sleeper(name: str, *seconds: float) -> None:
        for one in seconds:
            await asyncio.sleep(one)
            seen.append((asyncio.get_running_loop().time(), name))

    async def both() -> None:
        await asyncio.gather(sleeper("a", 3600, 7200), sleeper("b", 5400, 1800))

    started = time.perf_counter()
    run_virtual(both())
    assert time.perf_counter() - started < 5
    assert seen == [(3600, "a"), (5400, "b"), (7200, "b"), (10800, "a")]


def test_timeouts_and_locks_work_in_virtual_time() -> None:
    async def run() -> float:
        lock = asyncio.Lock()
        loop = asyncio.get_running_loop()

        async def hold(seconds: float) -> None:
            async with lock:
                await asyncio.sleep(seconds)

        first = asyncio.create_task(hold(10))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hold(1), 4)
        assert loop.time() == 4
        await asyncio.gather(first, hold(5))
        return loop.time()

    assert run_virtual(run()) == 15


def test_waiting_for_what_never_comes_is_an_error() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="for ever"):
        run_virtual(wait())
