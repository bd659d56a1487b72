"""Channels to other workers, and what is pulled from them.

Knows nothing about models or trees.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import grpc

from workers.errors import PeerError
from workers.tensor_stream import Limits, NamedTensor, Spec, StreamReader, decode_frame
from workers.transport import CHANNEL_OPTIONS, tensor_call


class PeerPool:
    """One channel per peer, made on first use, in the event loop that uses it.

    Parameters
    ----------
    on_received : callable
        Told the size in bytes of each message of every tensor stream.
    on_transfer : callable, optional
        Told of every tensor stream that is over, well or not: the peer's address, the transport,
        the bytes received and the seconds since it was asked for.
    """

    def __init__(
        self,
        on_received: Callable[[int], None],
        on_transfer: Callable[[str, str, int, float], None] | None = None,
    ) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._on_received = on_received
        self._on_transfer = on_transfer

    async def pull(
        self,
        address: str,
        method: str,
        request: Any,
        limits: Limits,
        check: Callable[[Sequence[Spec]], None],
        on_received: Callable[[int], None] | None = None,
    ) -> AsyncGenerator[NamedTensor, None]:
        """Call a tensor stream of the worker at `address`; yields tensors as they are complete.

        `on_received` is told the size in bytes of each message of this stream.

        Raises
        ------
        PeerError
            When the peer cannot be reached or refuses.
        TensorStreamError
            When the stream is damaged or not what `check` and `limits` accept.
        """
        reader = StreamReader(limits, check)
        started, received = time.perf_counter(), 0
        call = tensor_call(self._channel(address), method, request)
        try:
            async for message in call:
                received += len(message)
                self._on_received(len(message))
                if on_received is not None:
                    on_received(len(message))
                for named in reader.feed(decode_frame(message)):
                    yield named
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code is grpc.StatusCode.CANCELLED:
                code = grpc.StatusCode.UNAVAILABLE
            raise PeerError(
                f"worker {address} did not answer {method}: {error.details()}", code, address
            ) from error
        finally:
            call.cancel()
            if self._on_transfer is not None:
                self._on_transfer(address, "grpc", received, time.perf_counter() - started)
        reader.finish()

    async def close(self) -> None:
        """Close all channels."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._channels[address]


async def send_frames(
    frames: Iterable[bytes], executor: Executor, on_sent: Callable[[int], None]
) -> AsyncIterator[bytes]:
    """Frames of `encode_stream`, made on `executor` one ahead of what is being sent.

    Keeps copies, also those from an accelerator, away from the event loop.
    """
    source: Iterator[bytes] = iter(frames)
    loop = asyncio.get_running_loop()
    ahead = loop.run_in_executor(executor, next, source, b"")
    while frame := await ahead:
        ahead = loop.run_in_executor(executor, next, source, b"")
        on_sent(len(frame))
        yield frame
