"""A port that forwards to another, and misbehaves when told to.

Stands between processes of one machine where there are no real cables to pull. Knows nothing about
what passes through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

LOOPBACK = "127.0.0.1"
PIECE_BYTES = 1 << 16
# Smaller pieces are headers and acknowledgements.
DAMAGED_PIECE_BYTES = 1 << 10


class Link:
    """Forwards every connection to its own port to `port`.

    A cut holds back what passes, as a network does that loses packets which are sent again: what
    was sent before arrives late when the cut is healed. Only what comes from `port` is damaged.
    """

    def __init__(self, port: int, draw: random.Random) -> None:
        self._port = port
        self._draw = draw
        self._whole = asyncio.Event()
        self._whole.set()
        self._bytes_per_second = 0.0
        self._quick = asyncio.Event()
        self._flips = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Listen; returns the address."""
        self._server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        return f"{LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._whole.clear()

    def slow(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._quick.clear()

    def damage(self, flips: int) -> None:
        """Turn over one bit in each of the next `flips` pieces of data."""
        self._flips = flips

    @property
    def damages(self) -> bool:
        """Whether damage is still to be done."""
        return self._flips > 0

    def heal(self) -> None:
        self._bytes_per_second = self._flips = 0
        self._quick.set()
        self._whole.set()

    def reset(self) -> None:
        """End all connections at once, as a machine does that starts anew."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._whole.wait()
            far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self._port)
        except OSError:
            self._drop(writer)
            return
        except asyncio.CancelledError:
            self._drop(writer)
            raise
        self._writers.add(far_writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, damaged=False))
                group.create_task(self._pump(far_reader, writer, damaged=True))
        except* OSError:
            pass
        finally:
            self._drop(writer)
            self._drop(far_writer)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, damaged: bool
    ) -> None:
        while piece := await reader.read(PIECE_BYTES):
            if self._bytes_per_second:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._quick.wait(), len(piece) / self._bytes_per_second)
            await self._whole.wait()
            if damaged and self._flips and len(piece) >= DAMAGED_PIECE_BYTES:
                self._flips -= 1
                piece = self._damaged(piece)
            writer.write(piece)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    def _damaged(self, piece: bytes) -> bytes:
        out = bytearray(piece)
        out[self._draw.randrange(len(out))] ^= 1 << self._draw.randrange(8)
        return bytes(out)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()
