"""The tensor codec: what goes in comes out, and nothing damaged or oversized gets through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from homer.v1 import tensor_pb2
from workers.errors import DamagedStreamError, TensorLimitError, TensorStreamError
from workers.frames import Piece, decode_frame, encode_data
from workers.tensor_stream import Limits, NamedTensor, Spec, StreamReader, encode_stream

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.float8_e4m3fn]
AMPLE = Limits(total_bytes=1 << 20, tensors=64)


def frames_of(tensors: Sequence[torch.Tensor], frame_bytes: int = 1 << 20) -> list[bytes]:
    specs = [Spec(f"t{i}", t.dtype, tuple(t.shape)) for i, t in enumerate(tensors)]
    return [packed.message for packed in encode_stream(specs, tensors, frame_bytes)]


def read(frames: Iterable[bytes], limits: Limits = AMPLE) -> list[NamedTensor]:
    reader = StreamReader(limits)
    out = [named for frame in frames for named in reader.feed(decode_frame(frame))]
    reader.finish()
    return out


def header_frame(*specs: tuple[str, int, Sequence[int]], total_bytes: int) -> bytes:
    header = tensor_pb2.TensorHeader(total_bytes=total_bytes)
    for name, dtype, shape in specs:
        header.tensors.add(name=name, dtype=dtype, shape=shape)
    return tensor_pb2.TensorFrame(header=header).SerializeToString()


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[torch.Tensor]:
    tensors = []
    for _ in range(draw(st.integers(0, 5))):
        shape = draw(st.lists(st.integers(0, 7), max_size=4))
        dtype = draw(st.sampled_from(TYPES))
        count = torch.Size(shape).numel()
        data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        flat = (
            torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        )
        tensors.append(flat.view(shape))
    return tensors


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.reshape(-1).view(torch.uint8).tolist()
        == right.reshape(-1).view(torch.uint8).tolist()
    )


@given(tensor_lists(), st.integers(1, 200))
def test_any_tensors_come_out_as_they_went_in(
    tensors: list[torch.Tensor], frame_bytes: int
) -> None:
    received = read(frames_of(tensors, frame_bytes))
    assert [named.name for named in received] == [f"t{i}" for i in range(len(tensors))]
    assert all(same_bits(a, b.tensor) for a, b in zip(tensors, received, strict=True))


@given(st.data())
def test_a_wrong_byte_anywhere_is_noticed(data: st.DataObject) -> None:
    tensors = [torch.arange(40, dtype=torch.float32).view(5, 8), torch.arange(9, dtype=torch.int32)]
    frames = frames_of(tensors, frame_bytes=64)
    number = data.draw(st.integers(0, len(frames) - 1))
    at = data.draw(st.integers(0, len(frames[number]) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = bytearray(frames[number])
    damaged[at] ^= flip
    frames[number] = bytes(damaged)
    with pytest.raises(TensorStreamError):
        read(frames)


@given(st.integers(0, 7))
def test_a_stream_cut_short_is_noticed(kept: int) -> None:
    frames = frames_of([torch.arange(48, dtype=torch.float32)], frame_bytes=32)
    assert len(frames) == 8
    with pytest.raises(TensorStreamError, match="cut short"):
        read(frames[:kept])


def test_no_tensor_is_given_out_before_its_checksum_agrees() -> None:
    frames = frames_of([torch.zeros(4), torch.ones(4), torch.zeros(4)], frame_bytes=16)
    damaged = bytearray(frames[2])
    damaged[5] ^= 1
    reader = StreamReader(AMPLE)
    early = [named.name for frame in frames[:2] for named in reader.feed(decode_frame(frame))]
    assert early == ["t0"]
    with pytest.raises(DamagedStreamError, match="checksum"):
        reader.feed(decode_frame(bytes(damaged)))


@given(st.data())
def test_pieces_lost_or_swapped_are_noticed_at_once(data: st.DataObject) -> None:
    # Every piece has the same bytes: only its place tells it from the others.
    frames = frames_of([torch.zeros(64, dtype=torch.int32)], frame_bytes=32)
    count = len(frames) - 2
    first = data.draw(st.integers(1, count - 1))
    second = data.draw(st.integers(first + 1, count))
    if data.draw(st.booleans()):
        del frames[first]
    else:
        frames[first], frames[second] = frames[second], frames[first]
    reader = StreamReader(AMPLE)
    for frame in frames[:first]:
        reader.feed(decode_frame(frame))
    with pytest.raises(DamagedStreamError, match="checksum"):
        reader.feed(decode_frame(frames[first]))


@pytest.mark.parametrize(
    ("specs", "total_bytes", "limits", "error"),
    [
        ([("x", tensor_pb2.DTYPE_FLOAT32, [1 << 30])], 4 << 30, AMPLE, TensorLimitError),
        ([("x", tensor_pb2.DTYPE_FLOAT32, [1 << 62, 1 << 62, 0])], 0, AMPLE, TensorLimitError),
        ([("x", tensor_pb2.DTYPE_FLOAT32, [1] * 9)], 4, AMPLE, TensorLimitError),
        ([("x", tensor_pb2.DTYPE_INT32, [1])] * 3, 12, Limits(100, 2), TensorLimitError),
        ([("x", tensor_pb2.DTYPE_INT32, [26])], 104, Limits(100, 2), TensorLimitError),
        ([("x", tensor_pb2.DTYPE_FLOAT16, [4])], 9, AMPLE, TensorStreamError),
        ([("x", tensor_pb2.DTYPE_UNSPECIFIED, [4])], 16, AMPLE, TensorStreamError),
        ([("x", 77, [4])], 16, AMPLE, TensorStreamError),
    ],
)
def test_a_header_is_refused_before_memory_is_taken(
    specs: list[tuple[str, int, list[int]]],
    total_bytes: int,
    limits: Limits,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = StreamReader(limits)
    monkeypatch.setattr("workers.staging.numpy.empty", _no_memory)
    monkeypatch.setattr("workers.staging.torch.empty", _no_memory)
    frame = decode_frame(header_frame(*specs, total_bytes=total_bytes))
    with pytest.raises(error):
        reader.feed(frame)


def test_the_callers_check_comes_before_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(specs: Sequence[Spec]) -> None:
        assert [spec.shape for spec in specs] == [(4,)]
        raise TensorStreamError("not what was asked for")

    monkeypatch.setattr("workers.staging.numpy.empty", _no_memory)
    reader = StreamReader(AMPLE, refuse)
    with pytest.raises(TensorStreamError, match="not what was asked for"):
        reader.feed(decode_frame(header_frame(("x", 1, [4]), total_bytes=16)))


def _no_memory(*args: object, **kwargs: object) -> None:
    raise AssertionError("memory was taken")


@pytest.mark.parametrize(
    "order",
    [
        ["data"],
        ["trailer"],
        ["header", "header"],
        ["header", "data", "data"],
        ["header", "trailer"],
        ["header", "data", "trailer", "trailer"],
        ["header", "data", "trailer", "data"],
        ["nothing"],
    ],
)
def test_frames_out_of_order_are_refused(order: list[str]) -> None:
    header, data, trailer = frames_of([torch.arange(3, dtype=torch.int32)])
    frames = {"header": header, "data": data, "trailer": trailer, "nothing": b""}
    with pytest.raises(TensorStreamError):
        read(frames[name] for name in order)


def test_a_tensor_that_is_not_what_was_announced_is_not_sent() -> None:
    with pytest.raises(TensorStreamError, match="announced"):
        list(encode_stream([Spec("x", torch.float32, (3,))], [torch.zeros(4)]))
    with pytest.raises(TensorStreamError, match="cannot be sent"):
        list(encode_stream([Spec("x", torch.float64, (3,))], [torch.zeros(3)]))


@given(st.binary(max_size=300), st.integers(1, 100), st.integers(0, 2**64 - 1))
def test_our_data_frames_are_what_generated_code_writes(
    data: bytes, part: int, checksum: int
) -> None:
    view = memoryview(data)
    parts = [view[at : at + part] for at in range(0, len(view), part)]
    ours = encode_data(parts, checksum)
    theirs = tensor_pb2.TensorFrame(data=data, checksum=checksum).SerializeToString()
    assert ours == theirs
    assert decode_frame(theirs) == Piece(view, checksum)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_generated_code_reads_them(message: bytes) -> None:
    try:
        frame = decode_frame(message)
    except TensorStreamError:
        with pytest.raises(DecodeError):
            tensor_pb2.TensorFrame.FromString(message)
        return
    theirs = tensor_pb2.TensorFrame.FromString(message)
    if isinstance(frame, Piece):
        assert theirs.WhichOneof("frame") == "data"
        assert frame == Piece(memoryview(theirs.data), theirs.checksum)
    else:
        assert frame == theirs


def test_a_large_data_frame_is_read_without_a_copy() -> None:
    message = tensor_pb2.TensorFrame(data=bytes(3 << 20), checksum=7).SerializeToString()
    decoded = decode_frame(message)
    assert isinstance(decoded, Piece)
    assert decoded.data.obj is message


def test_tensors_are_made_only_when_their_turn_comes() -> None:
    made: list[int] = []

    def make() -> Iterable[torch.Tensor]:
        for number in range(3):
            made.append(number)
            yield torch.full((4,), float(number))

    specs = [Spec(f"t{i}", torch.float32, (4,)) for i in range(3)]
    frames = encode_stream(specs, make(), frame_bytes=16)
    next(frames)
    assert made == []
    next(frames)
    assert made == [0]
    list(frames)
    assert made == [0, 1, 2]
