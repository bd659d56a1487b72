"""Frames of a tensor stream as bytes.

Data frames are written and read by hand, because generated code would copy every byte twice more;
the bytes are the same. Knows nothing about tensors or about how frames travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
from google.protobuf.message import DecodeError

from homer.v1 import tensor_pb2
from workers.errors import DamagedStreamError

FRAME_BYTES = 1 << 21
# Below this, handing work to another thread costs more than the work.
SMALL_BYTES = 1 << 15
# Field 2 of TensorFrame, wire type 2 (length-delimited).
_DATA_TAG = 0x12
# Field 5, wire type 1 (64 bits).
_CHECKSUM_TAG = b"\x29"
_CHECKSUM_BYTES = 9


class Packed(NamedTuple):
    """A message to send, and the bytes that cross between the processes with it."""

    message: bytes
    crossing_bytes: int


class Piece(NamedTuple):
    """Data of a stream, and its checksum."""

    data: memoryview
    checksum: int


def pack_frame(frame: tensor_pb2.TensorFrame) -> Packed:
    """A frame without data as a message."""
    message = frame.SerializeToString()
    return Packed(message, len(message))


def pack_data(pieces: Sequence[memoryview], checksum: int) -> Packed:
    """A piece of data, given in parts, within a message."""
    message = encode_data(pieces, checksum)
    return Packed(message, len(message))


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy as many bytes as both have; others may run meanwhile where there are many."""
    if len(source) < SMALL_BYTES:
        target[:] = source
    else:
        # Fresh memory gets its pages here, which takes longest: the interpreter must not wait.
        numpy.copyto(
            numpy.frombuffer(target, dtype=numpy.uint8), numpy.frombuffer(source, numpy.uint8)
        )


def encode_data(pieces: Sequence[memoryview], checksum: int) -> bytes:
    """A data frame as protobuf would write it, in one copy."""
    length = sum(len(piece) for piece in pieces)
    head = bytearray((_DATA_TAG,))
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, *pieces, _CHECKSUM_TAG, checksum.to_bytes(8, "little")))


def decode_frame(message: bytes) -> Piece | tensor_pb2.TensorFrame:
    """A data frame's bytes, not copied; any other frame as the generated message.

    Raises
    ------
    DamagedStreamError
        When the message is not a TensorFrame.
    """
    start = _data_start(message)
    if start:
        checksum = int.from_bytes(message[-8:], "little")
        return Piece(memoryview(message)[start:-_CHECKSUM_BYTES], checksum)
    try:
        frame = tensor_pb2.TensorFrame.FromString(message)
    except DecodeError as error:
        raise DamagedStreamError(
            "a frame of a tensor stream cannot be read: it is damaged"
        ) from error
    if frame.WhichOneof("frame") == "data":
        return Piece(memoryview(frame.data), frame.checksum)
    return frame


def _data_start(message: bytes) -> int:
    """Where the data begins in a message that is data, checksum and nothing else; otherwise 0."""
    end = len(message) - _CHECKSUM_BYTES
    if end < 2 or message[0] != _DATA_TAG or message[end : end + 1] != _CHECKSUM_TAG:
        return 0
    length = 0
    for position in range(1, min(end, 6)):
        byte = message[position]
        length |= (byte & 0x7F) << 7 * (position - 1)
        if byte < 0x80:
            return position + 1 if length == end - position - 1 else 0
    return 0
