"""The rows of the final cache on their way from other workers, layer by layer.

The event loop pulls from all peers at once; the compute thread takes one layer after the other when
it has come, and does other work until then. Where it is slow, what waits for it is bounded, and
the peers have to wait. Knows nothing about what the rows are used for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import aclosing

import torch

from homer.context import KVRows
from homer.errors import Cancelled
from homer.stack import LayerStack
from homer.v1 import worker_pb2
from workers.errors import TensorStreamError
from workers.peer import PeerPool
from workers.staging import Places
from workers.tensor_stream import Limits
from workers.wire import LayerRows, gather_check

# Rows that may wait for the compute thread; of the layer that it waits for there may be any number.
AHEAD_BYTES = 256 << 20


class Gather:
    """Pulls the rows for `request` from every worker of `addresses`.

    Use it as an async context manager; leaving it early stops the pulls and whoever waits for them.
    """

    def __init__(
        self,
        peers: PeerPool,
        addresses: Sequence[str],
        request: worker_pb2.GatherKvRequest,
        stack: LayerStack,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._ahead_bytes = ahead_bytes
        self._loop = asyncio.get_running_loop()
        self._wanted_layer = -1
        self._waiting_bytes = 0
        self._room = asyncio.Event()
        self._peers = peers
        self._request = request
        self._stack = stack
        self._rows: list[list[Future[KVRows] | None]] = [
            [Future() for _ in range(stack.num_layers)] for _ in addresses
        ]
        self._addresses = addresses
        self._tasks: list[asyncio.Task[None]] = []
        self.received_bytes = 0
        # When the last row came, by time.perf_counter().
        self.ended = time.perf_counter()

    async def __aenter__(self) -> Gather:
        self._tasks = [
            # A copy, made before anybody can ask for a layer: asking takes it out of the list.
            asyncio.create_task(self._pull(address, list(futures)))
            for address, futures in zip(self._addresses, self._rows, strict=True)
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def arrived(self, layer: int) -> bool:
        """Whether the rows of `layer` are there, or will not come."""
        return all(future.done() for future in self._waiting(layer))

    async def wait(self, layer: int) -> None:
        """Wait until the rows of `layer` have come from every peer.

        Raises
        ------
        PeerError, TensorStreamError
            When they will not come.
        """
        self._want(layer)
        for future in self._waiting(layer):
            # Who stops waiting does not stop the pull, and does not hear how it ended.
            coming = asyncio.wrap_future(future)
            coming.add_done_callback(_retrieve)
            await asyncio.shield(coming)

    def _waiting(self, layer: int) -> list[Future[KVRows]]:
        return [future for futures in self._rows if (future := futures[layer]) is not None]

    def layer(self, layer: int) -> list[KVRows]:
        """Rows of `layer` from every peer; waits for them. Not for the event loop.

        Each layer can be asked for once: nothing is kept.
        """
        self._loop.call_soon_threadsafe(self._want, layer)
        out: list[KVRows] = []
        for futures in self._rows:
            future, futures[layer] = futures[layer], None
            if future is not None:
                out.append(future.result())
        self._loop.call_soon_threadsafe(self._took, sum(_nbytes(rows) for rows in out))
        return out

    def _want(self, layer: int) -> None:
        self._wanted_layer = max(self._wanted_layer, layer)
        self._room.set()

    def _took(self, taken_bytes: int) -> None:
        self._waiting_bytes -= taken_bytes
        self._room.set()

    async def _wait_for_room(self, layer: int, rows_bytes: int) -> None:
        """Wait until rows may wait for the compute thread beside those that do already."""
        while layer > self._wanted_layer and self._waiting_bytes + rows_bytes > self._ahead_bytes:
            self._room.clear()
            await self._room.wait()
        self._waiting_bytes += rows_bytes

    def _count(self, message_bytes: int) -> None:
        self.received_bytes += message_bytes

    async def _pull(self, address: str, waiting: list[Future[KVRows] | None]) -> None:
        stack, max_rows = self._stack, len(self._request.context_indices)
        row_bytes = stack.cache_row.numbers * stack.dtype.itemsize
        limits = Limits(
            total_bytes=stack.num_layers * max_rows * (row_bytes + torch.int32.itemsize),
            # Keys and values, each perhaps with scales, and indices.
            tensors=5 * stack.num_layers,
        )

        places = Places.of(stack)

        async def attempt() -> None:
            layers = LayerRows(places)
            check = gather_check(stack, max_rows, self._peers.wire)
            pulling = self._peers.pull(
                address,
                "GatherKv",
                self._request,
                limits,
                check,
                on_received=self._count,
                dtype=stack.dtype,
                places=places,
            )
            async with aclosing(pulling) as pulled:
                async for named in pulled:
                    complete = layers.take(named)
                    # An attempt before this one may have brought the layer.
                    if complete is not None and waiting[complete[0]] is not None:
                        await self._hand_over(*complete, waiting)

        try:
            await self._peers.retried(attempt)
            error: BaseException = TensorStreamError(f"worker {address} left layers out")
        except asyncio.CancelledError:
            error = Cancelled("the gather was stopped")
            raise
        except Exception as failure:
            error = failure
        finally:
            self.ended = time.perf_counter()
            for future in waiting:
                _settle(future, error=error)

    async def _hand_over(
        self, layer: int, rows: KVRows, waiting: list[Future[KVRows] | None]
    ) -> None:
        await self._wait_for_room(layer, _nbytes(rows))
        # Rows that were handed over are not held on to.
        future, waiting[layer] = waiting[layer], None
        _settle(future, rows=rows)


def _retrieve(future: asyncio.Future[KVRows]) -> None:
    """Keep asyncio from reporting an error that somebody was told already, or nobody waits for."""
    if not future.cancelled():
        future.exception()


def _nbytes(rows: KVRows) -> int:
    return sum(tensor.nbytes for tensor in (rows.keys, rows.values))


def _settle(
    future: Future[KVRows] | None,
    rows: KVRows | None = None,
    error: BaseException | None = None,
) -> None:
    if future is None or future.done():
        return
    if rows is not None:
        future.set_result(rows)
    else:
        future.set_exception(error)
