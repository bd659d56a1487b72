"""How the pieces of a tensor stream get from one process to another: the interface, and its plain
implementation, which puts them into the messages of the call.

A stream's call, header and trailer go by gRPC whatever the carrier. Knows nothing about tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from homer.v1 import tensor_pb2
from workers.frames import FRAME_BYTES, Packed, Piece, decode_frame, pack_data


class Opened(NamedTuple):
    """What came with a message, and the bytes that crossed between the processes for it."""

    frame: Piece | tensor_pb2.TensorFrame
    crossing_bytes: int


class Outlet(Protocol):
    """The sender's end of a carrier, for one stream."""

    @property
    def piece_bytes(self) -> int:
        """The most that a piece may have."""

    async def room(self) -> None:
        """Wait until the receiver has room for one more piece."""

    def pack(self, parts: Sequence[memoryview], checksum: int) -> Packed:
        """Bring a piece across, given in parts; returns the message that announces it."""


class Inlet(Protocol):
    """The receiver's end of a carrier, for one stream."""

    @property
    def name(self) -> str:
        """How pieces came, for metrics."""

    @property
    def shares_memory(self) -> bool | None:
        """Whether the sender uses shared memory; None where it did not come to that."""

    def offer(self, options: tensor_pb2.TransferOptions) -> None:
        """Write down what the sender needs to know."""

    def open(self, message: bytes) -> Opened:
        """What came with a message.

        Raises
        ------
        DamagedStreamError
            When it is not a frame, or announces what cannot be.
        """

    def taken(self) -> None:
        """Say that the piece that was opened last is not needed any more."""

    def close(self) -> None:
        """Give up what the carrier holds."""


class MessageOutlet:
    """Pieces within messages. HTTP/2's flow control is what waits for the receiver."""

    piece_bytes = FRAME_BYTES

    async def room(self) -> None:
        return

    def pack(self, parts: Sequence[memoryview], checksum: int) -> Packed:
        return pack_data(parts, checksum)


class MessageInlet:
    """Pieces within messages."""

    name = "grpc"
    shares_memory = None

    def offer(self, options: tensor_pb2.TransferOptions) -> None:
        return

    def open(self, message: bytes) -> Opened:
        return Opened(decode_frame(message), len(message))

    def taken(self) -> None:
        return

    def close(self) -> None:
        return
