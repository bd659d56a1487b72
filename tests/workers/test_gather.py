"""Rows of the final cache on their way: bounded, and whole where a stream breaks."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from homer.families import CacheRow
from homer.v1 import worker_pb2
from workers.errors import DamagedStreamError
from workers.gather import Gather
from workers.peer import ATTEMPTS, PeerPool
from workers.tensor_stream import NamedTensor

LAYERS, ROWS, HEAD_DIM = 12, 32, 8
LAYER_BYTES = 2 * ROWS * HEAD_DIM * 4
STACK: Any = SimpleNamespace(
    num_layers=LAYERS,
    cache_row=CacheRow((1, HEAD_DIM), (1, HEAD_DIM)),
    dtype=torch.float32,
    device=torch.device("cpu"),
    layer_devices=[torch.device("cpu")] * LAYERS,
)
REQUEST = worker_pb2.GatherKvRequest(context_indices=range(ROWS))


class ScriptedPeers(PeerPool):
    """Peers that give layer N filled with N; attempt A of each breaks before layer `breaks[A]`."""

    def __init__(self, *breaks: int) -> None:
        super().__init__(lambda count: None)
        self._breaks = breaks
        self.attempts = 0
        self.given = 0

    async def pull(
        self, address: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[NamedTensor, None]:
        attempt, self.attempts = self.attempts, self.attempts + 1
        # Another order of rows each time: those of different attempts must not be mixed.
        indices = torch.arange(ROWS, dtype=torch.int32).roll(attempt)
        yield NamedTensor("indices.0", indices)
        for layer in range(LAYERS):
            await asyncio.sleep(0)
            if attempt < len(self._breaks) and layer == self._breaks[attempt]:
                raise DamagedStreamError("damaged")
            rows = (indices + ROWS * layer).float()[None, :, None].expand(1, ROWS, HEAD_DIM)
            self.given = max(self.given, layer + 1)
            yield NamedTensor(f"keys.{layer}", rows.clone())
            yield NamedTensor(f"values.{layer}", -rows)


class SilentPeers(ScriptedPeers):
    """Peers from which nothing comes."""

    async def pull(
        self, address: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[NamedTensor, None]:
        await asyncio.Event().wait()
        yield NamedTensor("indices.0", torch.empty(0))


async def take_all(gather: Gather) -> None:
    for layer in range(LAYERS):
        for rows in await asyncio.to_thread(gather.layer, layer):
            expected = (rows.context_indices + ROWS * layer).float()[None, :, None]
            assert sorted(rows.context_indices.tolist()) == list(range(ROWS))
            assert torch.equal(rows.keys, expected.expand_as(rows.keys))
            assert torch.equal(rows.values, -rows.keys)


@pytest.mark.parametrize("peers", [1, 3])
def test_rows_that_nobody_takes_are_bounded(peers: int) -> None:
    async def run() -> None:
        pool = ScriptedPeers()
        addresses = [f"peer-{number}" for number in range(peers)]
        async with Gather(pool, addresses, REQUEST, STACK, ahead_bytes=3 * LAYER_BYTES) as gather:
            deadline = time.monotonic() + 20
            while pool.given < 2 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            for _ in range(200):
                await asyncio.sleep(0)
            # Three layers wait, and each peer has one more in its hands.
            assert 2 <= pool.given <= 4
            await take_all(gather)
            assert pool.given == LAYERS

    asyncio.run(asyncio.wait_for(run(), 30))


def test_the_layer_that_is_waited_for_comes_whatever_else_waits() -> None:
    async def run() -> None:
        async with Gather(ScriptedPeers(), ["a", "b"], REQUEST, STACK, ahead_bytes=0) as gather:
            await take_all(gather)

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("breaks", [(0,), (5,), (3, 7)])
def test_a_gather_that_breaks_goes_on_with_the_layers_that_are_missing(
    breaks: tuple[int, ...],
) -> None:
    async def run() -> None:
        pool = ScriptedPeers(*breaks)
        async with Gather(pool, ["a"], REQUEST, STACK) as gather:
            await take_all(gather)
        assert pool.attempts == len(breaks) + 1

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_gather_that_always_breaks_says_so_to_whoever_waits() -> None:
    async def run() -> None:
        async with Gather(ScriptedPeers(*[4] * ATTEMPTS), ["a"], REQUEST, STACK) as gather:
            await take_all(gather)

    with pytest.raises(DamagedStreamError):
        asyncio.run(asyncio.wait_for(run(), 30))


def test_a_gather_that_is_stopped_leaves_no_error_that_nobody_hears_of() -> None:
    heard: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
        async with Gather(SilentPeers(), ["a", "b"], REQUEST, STACK) as gather:
            waiting = asyncio.create_task(gather.wait(0))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        del gather, waiting
        await asyncio.sleep(0.01)
        gc.collect()
        await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert heard == []
