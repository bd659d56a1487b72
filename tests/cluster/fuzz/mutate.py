"""Messages that nobody means: random, valid but for something, and bytes that are none."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

TEXTS = (
    "",
    "a",
    "\x00",
    "../../etc/passwd",
    "unix:/tmp/x",
    "127.0.0.1:1",
    "é" * 300,
    "%s{}",
    "w" * 5000,
)
INTEGERS = (
    0,
    1,
    2,
    7,
    64,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
    -1,
    -(2**31),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
MOST_REPEATS = 8
DEEPEST = 6

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def random_message(kind: Callable[[], Message], draw: random.Random, depth: int = 0) -> Message:
    """A message whose fields have any values, small, extreme or absent."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.6:
            set_field(message, field, draw, depth)
    return message


def mutated(message: Message, draw: random.Random) -> Message:
    """A copy of a valid message, one to three of its fields, at any depth, changed or cleared."""
    copy = type(message)()
    copy.CopyFrom(message)
    if not copy.DESCRIPTOR.fields:
        return copy
    for _ in range(draw.choice((1, 1, 2, 3))):
        part = draw.choice([one for one in _parts(copy) if one.DESCRIPTOR.fields])
        field: Any = draw.choice(part.DESCRIPTOR.fields)
        if draw.random() < 0.2:
            part.ClearField(field.name)
        else:
            set_field(part, field, draw, DEEPEST - 2)
    return copy


def broken(raw: bytes, draw: random.Random) -> bytes:
    """Bytes of a valid message that were cut, doubled, turned over or replaced; or any bytes."""
    damaged = bytearray(raw)
    match draw.randrange(5):
        case 0:
            return draw.randbytes(draw.randrange(300))
        case 1:
            return bytes(damaged[: draw.randrange(len(damaged) + 1)])
        case 2:
            return bytes(damaged + damaged)
        case 3:
            at = draw.randrange(len(damaged) + 1)
            return bytes(damaged[:at]) + draw.randbytes(draw.randrange(1, 20)) + bytes(damaged[at:])
    for _ in range(draw.randrange(1, 8)):
        if damaged:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def set_field(message: Message, field: Any, draw: random.Random, depth: int) -> None:
    """Give a field some value of its type."""
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if is_map or (depth >= DEEPEST and field.message_type is not None):
        return
    if field.is_repeated:
        values: Any = getattr(message, field.name)
        message.ClearField(field.name)
        for _ in range(draw.randrange(MOST_REPEATS)):
            if field.message_type is not None:
                values = getattr(message, field.name)
                values.add().CopyFrom(random_message(_class(field), draw, depth + 1))
            else:
                getattr(message, field.name).append(_value(field, draw))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(random_message(_class(field), draw, depth + 1))
    else:
        setattr(message, field.name, _value(field, draw))


def _class(field: Any) -> Callable[[], Message]:
    return GetMessageClass(field.message_type)


def _value(field: Any, draw: random.Random) -> Any:
    kind = field.cpp_type
    if kind in _BITS:
        low, high = _BITS[kind]
        value = draw.choice(INTEGERS) if draw.random() < 0.6 else draw.randrange(300)
        return min(max(value, low), high)
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return draw.choice(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        # Also one that there is not.
        return draw.choice([*(value.number for value in field.enum_type.values), 77])
    text = draw.choice(TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text


def _parts(message: Message) -> list[Message]:
    """A message and all that are in it."""
    parts = [message]
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for one in value if field.is_repeated else [value]:
            parts += _parts(one)
    return parts
