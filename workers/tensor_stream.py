"""Tensors as a stream of frames: a typed header, raw little-endian pieces of data, a trailer.

The frames are `homer.v1.TensorFrame` on the wire. Nothing here unpickles, and a receiver checks
everything that a header announces before it takes memory, and every piece by its checksum. Knows
nothing about gRPC, about how pieces get across, or what the tensors mean.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash

from homer.v1 import tensor_pb2
from workers.errors import DamagedStreamError, TensorLimitError, TensorStreamError
from workers.frames import FRAME_BYTES, Packed, Piece, copy_bytes, pack_data, pack_frame
from workers.staging import Places, Staging

if sys.byteorder != "little":
    raise ImportError(
        "workers.tensor_stream sends memory as it is and needs a little-endian machine"
    )

MAX_RANK = 8
MAX_SIZE = 1 << 40
IN_MAIN_MEMORY = Staging(Places())

DTYPE_OF_WIRE = {
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_INT32: torch.int32,
    tensor_pb2.DTYPE_FLOAT8_E4M3: torch.float8_e4m3fn,
}
_WIRE_OF_DTYPE = {dtype: wire for wire, dtype in DTYPE_OF_WIRE.items()}


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
    pack: Callable[[Sequence[memoryview], int], Packed] = pack_data,
) -> Iterator[Packed]:
    """Frames of a stream, each ready to be sent as one message.

    `tensors` is consumed as frames are taken, so that a tensor may be made, or copied from an
    accelerator, when its turn comes. `pack` brings pieces of data across.

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
    yield pack_frame(tensor_pb2.TensorFrame(header=header))

    last = _header_checksum(header)
    parts: list[memoryview] = []
    held = 0
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise TensorStreamError(
                f"tensor {spec.name!r} was announced as {spec.dtype} {spec.shape} "
                f"but is {tensor.dtype} {tuple(tensor.shape)}"
            )
        view = tensor_bytes(tensor)
        while view:
            part = view[: frame_bytes - held]
            view = view[len(part) :]
            parts.append(part)
            held += len(part)
            if held == frame_bytes:
                last = _checksum(parts, last)
                yield pack(parts, last)
                parts, held = [], 0
    if held:
        last = _checksum(parts, last)
        yield pack(parts, last)
    yield pack_frame(tensor_pb2.TensorFrame(trailer=tensor_pb2.TensorTrailer(checksum=last)))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; not copied where contiguous and in main memory."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _header_checksum(header: tensor_pb2.TensorHeader) -> int:
    return xxhash.xxh3_64_intdigest(header.SerializeToString())


def _checksum(parts: Iterable[memoryview], seed: int) -> int:
    checksum = xxhash.xxh3_64(seed=seed)
    for part in parts:
        checksum.update(part)
    return checksum.intdigest()


class StreamReader:
    """Takes the frames of one stream and fills tensors with them.

    Parameters
    ----------
    limits : Limits
        The most that is accepted.
    check : callable, optional
        Called with the announced specs before memory is taken; raises what it thinks of them.
    staging : Staging, optional
        Gives the memory.

    `feed` returns the tensors that a frame completed: what they hold agrees with the checksums.
    Memory for a tensor is taken when its turn comes.
    """

    def __init__(
        self,
        limits: Limits,
        check: Callable[[Sequence[Spec]], None] | None = None,
        staging: Staging = IN_MAIN_MEMORY,
    ) -> None:
        self._staging = staging
        self._limits = limits
        self._check = check
        self._specs: list[Spec] | None = None
        # The tensor that is being filled, its bytes, and how many of them are there.
        self._tensor = torch.empty(0)
        self._view = memoryview(b"")
        self._filled = 0
        self._ready: list[NamedTensor] = []
        self._number = 0
        self._last = 0
        self._done = False

    @property
    def done(self) -> bool:
        """Whether the stream is complete."""
        return self._done

    def feed(self, frame: Piece | tensor_pb2.TensorFrame) -> list[NamedTensor]:
        """Take the next frame; returns the tensors that can be used from now on.

        Raises
        ------
        TensorLimitError
            When the header announces more than the limits.
        DamagedStreamError
            When frames are out of order, damaged, or do not add up.
        TensorStreamError
            When the header announces what makes no sense.
        """
        if self._done:
            raise DamagedStreamError("a frame came after the end of a tensor stream")
        if isinstance(frame, Piece):
            self._fill(frame)
        else:
            kind = frame.WhichOneof("frame")
            if kind == "header" and self._specs is None:
                self._open(frame.header)
            elif kind == "trailer" and self._specs is not None:
                self._close(frame.trailer)
            else:
                raise DamagedStreamError(
                    f"a tensor stream has a {kind or 'empty'} frame out of place"
                )
        # Whoever takes the tensors owns them: a reader that goes on must not keep them alive.
        ready, self._ready = self._ready, []
        return ready

    def finish(self) -> None:
        """Say that no more frames come.

        Raises
        ------
        DamagedStreamError
            When the stream ended before its trailer.
        """
        if not self._done:
            raise DamagedStreamError("a tensor stream ended before its trailer: it was cut short")

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
        self._last = _header_checksum(header)
        self._specs = specs
        self._begin()

    def _begin(self) -> None:
        """Go on with the next tensor that has bytes to fill; those without are there already."""
        specs = self._specs or []
        while self._number < len(specs):
            spec = specs[self._number]
            self._tensor = self._staging.allocate(spec.shape, spec.dtype)
            if self._tensor.numel():
                self._view, self._filled = tensor_bytes(self._tensor), 0
                return
            self._complete()

    def _complete(self) -> None:
        """The tensor that was being filled is whole."""
        if self._specs is not None:
            self._ready.append(NamedTensor(self._specs[self._number].name, self._tensor))
        self._tensor, self._view = torch.empty(0), memoryview(b"")
        self._number += 1

    def _fill(self, piece: Piece) -> None:
        if self._specs is None:
            raise DamagedStreamError("a tensor stream begins with data instead of a header")
        data = piece.data
        checksum = xxhash.xxh3_64(seed=self._last)
        while data:
            if self._number == len(self._specs):
                raise DamagedStreamError("a tensor stream brings more data than it announced")
            count = min(len(data), len(self._view) - self._filled)
            target = self._view[self._filled : self._filled + count]
            copy_bytes(target, data[:count])
            # Of what arrived: nobody else can write there any more.
            checksum.update(target)
            self._filled += count
            data = data[count:]
            if self._filled == len(self._view):
                self._complete()
                self._begin()
        self._last = checksum.intdigest()
        if self._last != piece.checksum:
            raise DamagedStreamError(
                "the checksum of a tensor stream does not agree: it was damaged on the way"
            )

    def _close(self, trailer: tensor_pb2.TensorTrailer) -> None:
        specs = self._specs or []
        if self._number < len(specs):
            raise DamagedStreamError(
                f"a tensor stream ended after {self._number} of {len(specs)} tensors"
            )
        if self._last != trailer.checksum:
            raise DamagedStreamError(
                "the checksum of a tensor stream does not agree: it was damaged on the way"
            )
        self._done = True


def _read_spec(spec: tensor_pb2.TensorSpec) -> Spec:
    dtype = DTYPE_OF_WIRE.get(spec.dtype)
    if dtype is None:
        raise TensorStreamError(f"tensor {spec.name!r} has the unknown type number {spec.dtype}")
    if len(spec.shape) > MAX_RANK:
        raise TensorLimitError(
            f"tensor {spec.name!r} has {len(spec.shape)} dimensions; at most {MAX_RANK} can be"
        )
    if any(size > MAX_SIZE for size in spec.shape):
        raise TensorLimitError(f"tensor {spec.name!r} has the impossible shape {list(spec.shape)}")
    return Spec(spec.name, dtype, tuple(spec.shape))
