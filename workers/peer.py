"""Channels to other workers, what is pulled from them, and how what they pull is sent.

Knows nothing about models or trees.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any, TypeVar

import grpc
import torch

from homer.errors import HomerError
from homer.v1 import tensor_pb2
from workers.addresses import check_address
from workers.carrier import Inlet, MessageInlet, MessageOutlet, Opened, Outlet
from workers.channels import NO_CREDENTIALS, Credentials
from workers.errors import BrokenStreamError, DamagedStreamError, PeerError
from workers.frames import SMALL_BYTES, Packed
from workers.options import STALL_SECONDS
from workers.shared_ring import RingInlet, can_share, open_ring
from workers.staging import Places, Staging
from workers.tensor_stream import Limits, NamedTensor, Spec, StreamReader, encode_stream
from workers.transport import CHANNEL_OPTIONS, tensor_call
from workers.wire_format import Decoder, WireFormat

T = TypeVar("T")
_log = logging.getLogger(__name__)

# How often a stream is asked for that was damaged or broke off.
ATTEMPTS = 3
_RECEIVE_THREADS = 4
AS_IS = WireFormat()
IN_MAIN_MEMORY = Places()


@dataclass
class _Peer:
    channel: grpc.aio.Channel
    # Until it answers an offer of shared memory with messages.
    shares_memory: bool = field(default_factory=can_share)


class PeerPool:
    """One channel per peer, made on first use, in the event loop that uses it.

    Parameters
    ----------
    on_received : callable
        Told the bytes that each message of every tensor stream brought across, in it or beside it.
    on_transfer : callable, optional
        Told of every tensor stream that is over, well or not: the peer's address, the transport,
        the bytes received and the seconds since it was asked for.
    stall_seconds : float
        How long a peer may send nothing while it is waited for.
    share_memory : bool
        Use shared memory with peers on this machine.
    wire : WireFormat
        How floats travel.
    credentials : Credentials
        What peers are shown.
    """

    def __init__(
        self,
        on_received: Callable[[int], None],
        on_transfer: Callable[[str, str, int, float], None] | None = None,
        stall_seconds: float = STALL_SECONDS,
        share_memory: bool = True,
        wire: WireFormat = AS_IS,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self._credentials = credentials
        self.wire = wire
        self._peers: dict[str, _Peer] = {}
        self._stagings: dict[Places, Staging] = {}
        self._on_received = on_received
        self._on_transfer = on_transfer
        self._stall_seconds = stall_seconds
        self._share_memory = share_memory
        self._threads = ThreadPoolExecutor(_RECEIVE_THREADS, thread_name_prefix="homer-receive")

    async def pull(
        self,
        address: str,
        method: str,
        request: Any,
        limits: Limits,
        check: Callable[[Sequence[Spec]], None],
        on_received: Callable[[int], None] | None = None,
        dtype: torch.dtype = torch.float32,
        places: Places = IN_MAIN_MEMORY,
    ) -> AsyncGenerator[NamedTensor, None]:
        """Call a tensor stream of the worker at `address`; yields tensors as they are complete.

        While what came is copied in another thread, the next message is waited for; while nobody
        asks for the next tensor, nothing is read, and the peer has to wait.
        `on_received` is told the bytes that each message of this stream brought across. `check` and
        `limits` are for the tensors as they travel; they come out where `places` says, floats as
        `dtype`.

        Raises
        ------
        PromptError
            When the address is none.
        PeerError
            When the peer cannot be reached or refuses.
        BrokenStreamError
            When it began to answer, and then stopped or was cut off.
        DamagedStreamError
            When what came is damaged.
        TensorStreamError
            When the stream is not what `check` and `limits` accept.
        """
        peer = self._peer(address)
        inlet = self._inlet(peer)
        started, received = time.perf_counter(), 0
        asked = type(request)()
        asked.CopyFrom(request)
        inlet.offer(asked.transfer)
        self.wire.ask(asked.transfer)
        staging = self._staging(places)
        reader = StreamReader(limits, check, staging)
        take = _Take(reader, self.wire.decoder(dtype), staging, inlet)
        call = tensor_call(peer.channel, method, asked)
        loop = asyncio.get_running_loop()
        feeding: asyncio.Future[list[NamedTensor]] | None = None
        try:
            while True:
                message = await self._read(call, address, method, begun=received > 0)
                ready = await feeding if feeding is not None else []
                feeding = None
                for named in ready:
                    yield named
                if message is None:
                    break
                opened = [inlet.open(message)]
                crossing_bytes = opened[0].crossing_bytes
                received += crossing_bytes
                self._on_received(crossing_bytes)
                if on_received is not None:
                    on_received(crossing_bytes)
                if crossing_bytes > SMALL_BYTES:
                    feeding = loop.run_in_executor(self._threads, take, opened)
                else:
                    for named in take(opened):
                        yield named
            reader.finish()
        finally:
            call.cancel()
            if feeding is not None:
                feeding.cancel()
                feeding = None
            inlet.close()
            peer.shares_memory = peer.shares_memory and inlet.shares_memory is not False
            if self._on_transfer is not None:
                self._on_transfer(address, inlet.name, received, time.perf_counter() - started)

    async def retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns; it is made again, a few times, when a stream broke.

        Raises
        ------
        HomerError
            What the last attempt met.
        """
        for number in range(1, ATTEMPTS + 1):
            try:
                return await attempt()
            except (BrokenStreamError, DamagedStreamError) as error:
                if number == ATTEMPTS:
                    raise
                _log.warning("attempt %d of %d to get tensors: %s", number, ATTEMPTS, error)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def close(self) -> None:
        """Close all channels."""
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.channel.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _read(self, call: Any, address: str, method: str, begun: bool) -> bytes | None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                message = await call.read()
        except TimeoutError as error:
            raise BrokenStreamError(
                f"worker {address} sent nothing of {method} for {self._stall_seconds:g} s: "
                "it hangs, or the network does",
                grpc.StatusCode.UNAVAILABLE,
                address,
            ) from error
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code is grpc.StatusCode.CANCELLED:
                code = grpc.StatusCode.UNAVAILABLE
            broke = begun and code is grpc.StatusCode.UNAVAILABLE
            raise (BrokenStreamError if broke else PeerError)(
                f"worker {address} did not answer {method}: {error.details()}", code, address
            ) from error
        return None if message is grpc.aio.EOF else message

    def _peer(self, address: str) -> _Peer:
        if address not in self._peers:
            channel = self._credentials.aio_channel(check_address(address), CHANNEL_OPTIONS)
            self._peers[address] = _Peer(channel)
        return self._peers[address]

    def _staging(self, places: Places) -> Staging:
        if places not in self._stagings:
            self._stagings[places] = Staging(places)
        return self._stagings[places]

    def _inlet(self, peer: _Peer) -> Inlet:
        if self._share_memory and peer.shares_memory:
            try:
                return RingInlet()
            except OSError as error:
                _log.warning("no shared memory for a transfer, so messages carry it: %s", error)
        return MessageInlet()


@dataclass
class _Take:
    """Takes what came with a message; not on the event loop where that is much."""

    reader: StreamReader
    decoder: Decoder
    staging: Staging
    inlet: Inlet

    def __call__(self, opened: list[Opened]) -> list[NamedTensor]:
        """The tensors that the one thing in `opened` completes; takes it out."""
        try:
            ready = self.reader.feed(opened.pop().frame)
        except HomerError as error:
            # Errors are kept by whoever failed of them; what lies in shared memory must not be.
            clear_frames(error.__traceback__)
            raise
        self.inlet.taken()
        return [
            NamedTensor(name, self.staging.to_device(name, tensor))
            for name, tensor in self.decoder.take(ready)
        ]


def choose_outlet(options: tensor_pb2.TransferOptions) -> Outlet:
    """How to send to a receiver: through its shared memory where that can be, else in messages."""
    ring = open_ring(options.shared_ring) if options.HasField("shared_ring") else None
    return ring if ring is not None else MessageOutlet()


async def send_tensors(
    specs: Sequence[Spec],
    tensors: Iterable[torch.Tensor],
    outlet: Outlet,
    executor: Executor,
    on_sent: Callable[[int], None],
) -> AsyncGenerator[bytes, None]:
    """The messages of a tensor stream, made on `executor` one ahead of what is being sent.

    Keeps copies, also those from an accelerator, away from the event loop. The next piece is made
    when the receiver has room for it.
    """
    source = encode_stream(specs, tensors, outlet.piece_bytes, outlet.pack)
    loop = asyncio.get_running_loop()

    async def make() -> Packed | None:
        await outlet.room()
        return await loop.run_in_executor(executor, next, source, None)

    ahead = asyncio.create_task(make())
    try:
        while (packed := await ahead) is not None:
            ahead = asyncio.create_task(make())
            on_sent(packed.crossing_bytes)
            yield packed.message
    finally:
        ahead.cancel()
