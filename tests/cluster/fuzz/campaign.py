"""Sends messages that nobody means to a service, and notes how each call ends.

Knows nothing about what the service is, but for valid messages to begin with.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tests.cluster.fuzz.mutate import broken, mutated, random_message

AT_ONCE = 8
# Far more than any of these calls takes; a caller who waits so long has met one that hangs.
HANGS_SECONDS = 60.0
# What a service says that does not know what happened.
NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}
MOST_TOKENS = 16
# How often a sender begins with valid calls that build on each other: about half of all calls then
# are of such sequences, and meet the states that only those lead to.
SEQUENCES = 0.08
# What gRPC's own client makes of a call that the service ended before it had sent everything.
STILL_SENDING = "Internal error from Core"


@dataclass
class Report:
    """How the calls ended, by method and status; and those that ended as none should."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return self.ends.total()

    def succeeded(self, method: str) -> int:
        """How many calls of a method did what they were for."""
        return self.ends[method, grpc.StatusCode.OK.name]

    def __str__(self) -> str:
        names = sorted({method for method, _ in self.ends})
        done = ", ".join(f"{name} {self.succeeded(name)}" for name in names)
        lines = [
            f"{count:7} {method:18} {code}" for (method, code), count in sorted(self.ends.items())
        ]
        return "\n".join([*lines, f"succeeded: {done}", *self.faults])


async def fuzz(
    channel: grpc.aio.Channel,
    service: Any,
    seeds: Callable[[str, random.Random], Sequence[Message]],
    sequence: Callable[[random.Random], Sequence[tuple[str, Sequence[Message]]]],
    count: int,
    seed: int,
    rare: Sequence[str] = (),
) -> Report:
    """Send `count` calls to a service, some at once.

    Parameters
    ----------
    service : descriptor of the service
    seeds : callable
        Valid messages of a method, by its name.
    sequence : callable
        Valid calls in an order in which they succeed: method, and its messages.
    rare : sequence of str
        Methods that undo what all others did, of which one in fifty is enough.
    """
    report = Report()
    turn = iter(range(count))
    methods = {method.name: method for method in service.methods}

    def steps(number: int, draw: random.Random) -> Iterator[tuple[Any, list[bytes]]]:
        """One call that may be anything; or a sequence, with calls between that are nearly it."""
        if draw.random() < SEQUENCES:
            for name, messages in sequence(draw):
                if draw.random() < 0.2:
                    yield methods[name], [raw_message(one, draw) for one in messages]
                yield methods[name], [one.SerializeToString() for one in messages]
            return
        method = service.methods[number % len(methods)]
        if method.name in rare and draw.random() < 0.98:
            method = service.methods[(number + 1) % len(methods)]
        kind: Any = GetMessageClass(method.input_type)
        valid = seeds(method.name, draw) or [kind()]
        sent = _messages(method, draw)
        yield method, [raw_message(draw.choice(valid), draw) for _ in range(sent)]

    async def send() -> None:
        mine: Iterator[tuple[Any, list[bytes]]] = iter(())
        for number in turn:
            step = next(mine, None)
            if step is None:
                mine = steps(number, random.Random(f"{seed}/{number}"))
                step = next(mine)
            await _call(channel, service, *step, report, number)

    await asyncio.gather(*(send() for _ in range(AT_ONCE)))
    return report


def raw_message(valid: Message, draw: random.Random) -> bytes:
    """What is sent for a message: now and then itself, so that others meet its state."""
    kind = type(valid)
    chance = draw.random()
    if chance < 0.3:
        message = valid
    elif chance < 0.65:
        message = mutated(valid, draw)
    elif chance < 0.75:
        message = random_message(kind, draw)
    else:
        raw = broken(valid.SerializeToString(), draw)
        try:
            message = kind.FromString(raw)
        except DecodeError:
            return raw
    return bounded(message).SerializeToString()


def bounded(message: Message) -> Message:
    """The message with a short answer where it asks for a long one: that is no fault."""
    for holder in (message, getattr(message, "request", None)):
        sampling = getattr(holder, "sampling", None)
        if sampling is not None and not 0 < sampling.max_tokens <= MOST_TOKENS:
            sampling.max_tokens = MOST_TOKENS if sampling.max_tokens < 2**16 else 2**32 - 1
    return message


async def _call(
    channel: grpc.aio.Channel,
    service: Any,
    method: Any,
    raws: list[bytes],
    report: Report,
    number: int,
) -> None:
    multi: Any = channel.stream_stream(f"/{service.full_name}/{method.name}", None, None)
    call = multi(iter(raws), timeout=HANGS_SECONDS)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass
    code = await call.code()
    if code is grpc.StatusCode.INTERNAL and await call.details() == STILL_SENDING:
        report.ends[method.name, "ended while sending"] += 1
        return
    report.ends[method.name, code.name] += 1
    gone = code is grpc.StatusCode.UNAVAILABLE and not _is_told(await call.trailing_metadata())
    if code in NEVER or gone:
        what = [raw.hex() for raw in raws]
        report.faults.append(f"{number}: {method.name} {code.name}: {await call.details()} {what}")


def _is_told(metadata: Any) -> bool:
    """Whether the service itself says that something is not there, and not the network."""
    return any(key in ("homer-error", "retry-after") for key, _ in metadata or ())


def _messages(method: Any, draw: random.Random) -> int:
    return draw.randrange(4) if method.client_streaming else 1
