"""Tensors as a stream of frames: a typed header, raw little-endian data, a trailer with a checksum.

The frames are `homer.v1.TensorFrame` on the wire. Data frames are written and read by hand, because
generated code would copy every byte twice more; the bytes are the same. Nothing here unpickles, and
a receiver checks everything that a header announces before it takes memory. Knows nothing about
gRPC, and nothing about what the tensors mean.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
import xxhash
from google.protobuf.message import DecodeError

from homer.v1 import tensor_pb2
from workers.errors import TensorLimitError, TensorStreamError

if sys.byteorder != "little":
    raise ImportError(
        "workers.tensor_stream sends memory as it is and needs a little-endian machine"
    )

FRAME_BYTES = 1 << 21
MAX_RANK = 8
MAX_SIZE = 1 << 40

_DTYPE_OF_WIRE = {
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_INT32: torch.int32,
}
_WIRE_OF_DTYPE = {dtype: wire for wire, dtype in _DTYPE_OF_WIRE.items()}
# Field 2 of TensorFrame, wire type 2 (length-delimited).
_DATA_TAG = 0x12


class NamedTensor(NamedTuple):
    """A tensor and the name under which it travels."""

    name: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Spec:
    """Name, type and shape of a tensor of a stream."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, named: NamedTensor) -> Spec:
        """The spec of an existing tensor."""
        return cls(named.name, named.tensor.dtype, tuple(named.tensor.shape))


@dataclass(frozen=True)
class Limits:
    """The most that a receiver accepts in one stream."""

    total_bytes: int
    tensors: int


def encode_stream(
    specs: Sequence[Spec],
    tensors: Iterable[torch.Tensor],
    frame_bytes: int = FRAME_BYTES,
) -> Iterator[bytes]:
    """Frames of a stream, each ready to be sent as one message.

    `tensors` is consumed as frames are taken, so that a tensor may be made, or copied from an
    accelerator, when its turn comes.

    Raises
    ------
    TensorStreamError
        When a tensor is not what its spec announces.
    """
    header = tensor_pb2.TensorHeader(total_bytes=sum(spec.nbytes for spec in specs))
    for spec in specs:
        wire = _WIRE_OF_DTYPE.get(spec.dtype)
        if wire is None:
            raise TensorStreamError(f"tensor {spec.name!r} has type {spec.dtype}: cannot be sent")
        header.tensors.add(name=spec.name, dtype=wire, shape=spec.shape)
    yield tensor_pb2.TensorFrame(header=header).SerializeToString()

    checksum = xxhash.xxh3_64(header.SerializeToString())
    pieces: list[memoryview] = []
    held = 0
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise TensorStreamError(
                f"tensor {spec.name!r} was announced as {spec.dtype} {spec.shape} "
                f"but is {tensor.dtype} {tuple(tensor.shape)}"
            )
        view = tensor_bytes(tensor)
        while view:
            piece = view[: frame_bytes - held]
            view = view[len(piece) :]
            checksum.update(piece)
            pieces.append(piece)
            held += len(piece)
            if held == frame_bytes:
                yield encode_data(pieces)
                pieces, held = [], 0
    if held:
        yield encode_data(pieces)
    trailer = tensor_pb2.TensorTrailer(checksum=checksum.intdigest())
    yield tensor_pb2.TensorFrame(trailer=trailer).SerializeToString()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; not copied where contiguous and in main memory."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def encode_data(pieces: Sequence[memoryview]) -> bytes:
    """A data frame as protobuf would write it, in one copy."""
    length = sum(len(piece) for piece in pieces)
    head = bytearray((_DATA_TAG,))
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, *pieces))


def decode_frame(message: bytes) -> memoryview | tensor_pb2.TensorFrame:
    """A data frame's bytes, not copied; any other frame as the generated message.

    Raises
    ------
    TensorStreamError
        When the message is not a TensorFrame.
    """
    start = _data_start(message)
    if start:
        return memoryview(message)[start:]
    try:
        frame = tensor_pb2.TensorFrame.FromString(message)
    except DecodeError as error:
        raise TensorStreamError(
            "a frame of a tensor stream cannot be read: it is damaged"
        ) from error
    return memoryview(frame.data) if frame.WhichOneof("frame") == "data" else frame


def _data_start(message: bytes) -> int:
    """Where the data begins in a message that is one data field and nothing else; otherwise 0."""
    if len(message) < 2 or message[0] != _DATA_TAG:
        return 0
    length = 0
    for position in range(1, min(len(message), 6)):
        byte = message[position]
        length |= (byte & 0x7F) << 7 * (position - 1)
        if byte < 0x80:
            return position + 1 if length == len(message) - position - 1 else 0
    return 0


class StreamReader:
    """Takes the frames of one stream and fills tensors with them.

    Parameters
    ----------
    limits : Limits
        The most that is accepted.
    check : callable, optional
        Called with the announced specs before memory is taken; raises what it thinks of them.

    `feed` returns the tensors that a frame completed. The last tensor is held back until the
    checksum agrees, so that whoever waits for all of them never goes on with damaged data.
    """

    def __init__(
        self, limits: Limits, check: Callable[[Sequence[Spec]], None] | None = None
    ) -> None:
        self._limits = limits
        self._check = check
        self._specs: list[Spec] | None = None
        self._tensors: list[torch.Tensor | None] = []
        self._view = memoryview(b"")
        self._current = 0
        self._filled = 0
        self._released = 0
        self._checksum = xxhash.xxh3_64()
        self._done = False

    def feed(self, frame: memoryview | tensor_pb2.TensorFrame) -> list[NamedTensor]:
        """Take the next frame; returns the tensors that can be used from now on.

        Raises
        ------
        TensorLimitError
            When the header announces more than the limits.
        TensorStreamError
            When frames are out of order, damaged, or do not add up.
        """
        if self._done:
            raise TensorStreamError("a frame came after the end of a tensor stream")
        if isinstance(frame, memoryview):
            self._fill(frame)
        else:
            kind = frame.WhichOneof("frame")
            if kind == "header" and self._specs is None:
                self._open(frame.header)
            elif kind == "trailer" and self._specs is not None:
                self._close(frame.trailer)
            else:
                raise TensorStreamError(
                    f"a tensor stream has a {kind or 'empty'} frame out of place"
                )
        return self._release()

    def finish(self) -> None:
        """Say that no more frames come.

        Raises
        ------
        TensorStreamError
            When the stream ended before its trailer.
        """
        if not self._done:
            raise TensorStreamError("a tensor stream ended before its trailer: it was cut short")

    def _open(self, header: tensor_pb2.TensorHeader) -> None:
        if len(header.tensors) > self._limits.tensors:
            raise TensorLimitError(
                f"a tensor stream announces {len(header.tensors)} tensors; "
                f"at most {self._limits.tensors} are accepted"
            )
        specs = [_read_spec(spec) for spec in header.tensors]
        total = sum(spec.nbytes for spec in specs)
        if total != header.total_bytes:
            raise TensorStreamError(
                f"a tensor stream announces {header.total_bytes} bytes, "
                f"but the shapes of its tensors make {total}"
            )
        if total > self._limits.total_bytes:
            raise TensorLimitError(
                f"a tensor stream announces {total} bytes; "
                f"at most {self._limits.total_bytes} are accepted"
            )
        if self._check is not None:
            self._check(specs)
        self._checksum.update(header.SerializeToString())
        self._specs = specs
        self._tensors = [_allocate(spec) for spec in specs]
        self._begin(0)

    def _begin(self, number: int) -> None:
        """Go on with the first tensor from `number` on that has bytes to fill."""
        while number < len(self._tensors):
            tensor = self._tensors[number]
            if tensor is not None and tensor.numel():
                self._view = tensor_bytes(tensor)
                break
            number += 1
        self._current, self._filled = number, 0

    def _fill(self, data: memoryview) -> None:
        if self._specs is None:
            raise TensorStreamError("a tensor stream begins with data instead of a header")
        self._checksum.update(data)
        while data:
            if self._current == len(self._tensors):
                raise TensorStreamError("a tensor stream brings more data than it announced")
            count = min(len(data), len(self._view) - self._filled)
            self._view[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == len(self._view):
                self._begin(self._current + 1)

    def _close(self, trailer: tensor_pb2.TensorTrailer) -> None:
        if self._current < len(self._tensors):
            raise TensorStreamError(
                f"a tensor stream ended after {self._current} of {len(self._tensors)} tensors"
            )
        if self._checksum.intdigest() != trailer.checksum:
            raise TensorStreamError(
                "the checksum of a tensor stream does not agree: it was damaged on the way"
            )
        self._done = True

    def _release(self) -> list[NamedTensor]:
        ready = self._current if self._done else min(self._current, len(self._tensors) - 1)
        out: list[NamedTensor] = []
        while self._specs is not None and self._released < ready:
            tensor = self._tensors[self._released]
            if tensor is not None:
                out.append(NamedTensor(self._specs[self._released].name, tensor))
            # Whoever takes the tensor owns it: a reader that goes on must not keep it alive.
            self._tensors[self._released] = None
            self._released += 1
        return out


def _allocate(spec: Spec) -> torch.Tensor:
    """Memory for a tensor. numpy asks for huge pages, torch does not: far fewer page faults."""
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=spec.dtype)
    memory = numpy.empty(spec.nbytes, dtype=numpy.uint8)
    return torch.from_numpy(memory).view(spec.dtype).view(spec.shape)


def _read_spec(spec: tensor_pb2.TensorSpec) -> Spec:
    dtype = _DTYPE_OF_WIRE.get(spec.dtype)
    if dtype is None:
        raise TensorStreamError(f"tensor {spec.name!r} has the unknown type number {spec.dtype}")
    if len(spec.shape) > MAX_RANK:
        raise TensorLimitError(
            f"tensor {spec.name!r} has {len(spec.shape)} dimensions; at most {MAX_RANK} can be"
        )
    if any(size > MAX_SIZE for size in spec.shape):
        raise TensorLimitError(f"tensor {spec.name!r} has the impossible shape {list(spec.shape)}")
    return Spec(spec.name, dtype, tuple(spec.shape))
