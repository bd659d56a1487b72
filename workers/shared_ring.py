"""Pieces of a tensor stream through memory that both processes see: a ring of slots.

The receiver makes the ring and names it in its request; a sender that can open it puts its pieces
there, and any other sends them in messages, without having to be asked again. The memory is a
memfd: it has no name that could be guessed or left behind, goes away with the processes however
they end, does not count against a container's small /dev/shm, and is sealed, so that neither end
can cut it off under the other. Knows nothing about tensors.
"""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import mmap
import os
import secrets
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from homer.v1 import tensor_pb2
from workers.carrier import Opened
from workers.errors import DamagedStreamError
from workers.frames import FRAME_BYTES, Packed, Piece, copy_bytes, decode_frame, pack_frame

SLOTS = 8
MAX_RING_BYTES = 256 << 20

_NAME = "homer-ring"
_NONCE_BYTES = 32
# Before the slots: the nonce, then how many pieces the receiver has taken.
_COUNTER_AT = 64
_SLOTS_AT = mmap.PAGESIZE
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.0001, 0.005


def can_share() -> bool:
    """Whether this system has what a ring needs."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class RingInlet:
    """The receiver's end. Also takes pieces within messages, from a sender that cannot share.

    Raises
    ------
    OSError
        When there is no memory or descriptor left for it.
    """

    def __init__(self, slots: int = SLOTS, slot_bytes: int = FRAME_BYTES) -> None:
        self._slots, self._slot_bytes = slots, slot_bytes
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self._descriptor, 0o600)
            size = _SLOTS_AT + slots * slot_bytes
            os.ftruncate(self._descriptor, size)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _seals())
            memory = mmap.mmap(self._descriptor, size)
        except OSError:
            os.close(self._descriptor)
            raise
        memory[:_NONCE_BYTES] = self._nonce
        self._memory = memoryview(memory)
        self._counter = _counter_of(self._memory)
        self._taken = 0
        self._opened = False
        self.shares_memory: bool | None = None

    @property
    def name(self) -> str:
        return "shared_memory" if self.shares_memory else "grpc"

    def offer(self, options: tensor_pb2.TransferOptions) -> None:
        ring = options.shared_ring
        ring.process_id, ring.descriptor = os.getpid(), self._descriptor
        ring.slots, ring.slot_bytes, ring.nonce = self._slots, self._slot_bytes, self._nonce

    def open(self, message: bytes) -> Opened:
        frame = decode_frame(message)
        if isinstance(frame, Piece):
            self.shares_memory = False
            return Opened(frame, len(message))
        if frame.WhichOneof("frame") != "shared":
            return Opened(frame, len(message))
        size = frame.shared.bytes
        if size > self._slot_bytes:
            raise DamagedStreamError(
                f"a piece of {size} bytes is announced in shared memory; "
                f"a slot has {self._slot_bytes}"
            )
        start = _SLOTS_AT + self._taken % self._slots * self._slot_bytes
        self._opened = self.shares_memory = True
        piece = Piece(self._memory[start : start + size], frame.checksum)
        return Opened(piece, len(message) + size)

    def taken(self) -> None:
        if self._opened:
            self._opened = False
            self._taken += 1
            if self._counter is not None:
                self._counter[0] = self._taken

    def close(self) -> None:
        # The mapping goes when the last view of it does: a copy may be at it still.
        self._memory = memoryview(b"")
        self._counter = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class RingOutlet:
    """The sender's end; made by `open_ring`."""

    def __init__(self, memory: mmap.mmap, ring: tensor_pb2.SharedRing) -> None:
        self._memory = memoryview(memory)
        self._counter = _counter_of(self._memory)
        self._slots = ring.slots
        self.piece_bytes = ring.slot_bytes
        self._sent = 0

    async def room(self) -> None:
        seconds = _FIRST_WAIT_SECONDS
        while self._sent - int(self._counter[0]) >= self._slots:
            await asyncio.sleep(seconds)
            seconds = min(2 * seconds, _LONGEST_WAIT_SECONDS)

    def pack(self, parts: Sequence[memoryview], checksum: int) -> Packed:
        start = at = _SLOTS_AT + self._sent % self._slots * self.piece_bytes
        for part in parts:
            copy_bytes(self._memory[at : at + len(part)], part)
            at += len(part)
        self._sent += 1
        shared = tensor_pb2.SharedPiece(bytes=at - start)
        packed = pack_frame(tensor_pb2.TensorFrame(shared=shared, checksum=checksum))
        return Packed(packed.message, packed.crossing_bytes + at - start)


def open_ring(ring: tensor_pb2.SharedRing) -> RingOutlet | None:
    """The sender's end of a receiver's ring; None when it is not on this machine, or not for us.

    What a request names is opened only when it is a ring, and used only when it holds the nonce
    of the request: on another machine the same numbers may mean anything.
    """
    size = _SLOTS_AT + ring.slots * ring.slot_bytes
    sane = ring.slots and ring.slot_bytes > 0 and size <= MAX_RING_BYTES
    if not (sane and can_share() and len(ring.nonce) == _NONCE_BYTES):
        return None
    path = Path(f"/proc/{ring.process_id}/fd/{ring.descriptor}")
    try:
        if not str(path.readlink()).startswith(f"/memfd:{_NAME} "):
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return None
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _seals() != _seals():
            return None
        memory = mmap.mmap(descriptor, size)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if not hmac.compare_digest(memory[:_NONCE_BYTES], ring.nonce):
        return None
    return RingOutlet(memory, ring)


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _counter_of(memory: memoryview) -> Any:
    return numpy.frombuffer(memory, dtype=numpy.uint64, count=1, offset=_COUNTER_AT)
