"""All answers of a worker as one running batch: they join and leave between decode steps.

The weights are read once a step for all of them, so that eight answers together take little more
time than two alone. Knows nothing about requests, jobs or gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from homer.generation import Answer, DecodeStep, FinishReason, next_tokens
from workers.engine import Engine


@dataclass(eq=False)
class _Seat:
    """An answer in the batch, and who waits for it."""

    answer: Answer
    emit: Callable[[int], None]
    done: asyncio.Future[FinishReason]
    left: bool = False


@dataclass(frozen=True)
class _Outcome:
    """What a step gave to a seat: a token, the end, or both."""

    seat: _Seat
    token: int | None
    reason: FinishReason | None


class Batcher:
    """Decodes answers together.

    Parameters
    ----------
    decode : DecodeStep
        Runs the model.
    engine : Engine
    on_step : callable
        Told after each step how many answers got a token in it.
    """

    def __init__(self, decode: DecodeStep, engine: Engine, on_step: Callable[[int], None]) -> None:
        self._decode = decode
        self._engine = engine
        self._on_step = on_step
        self._joining: deque[_Seat] = deque()
        # Only the compute thread looks at it.
        self._seats: list[_Seat] = []

    async def run(self, answer: Answer, emit: Callable[[int], None]) -> FinishReason:
        """Decode `answer`, which has its first token and is not full, to its end.

        `emit` is given each token, in the event loop. Who stops waiting takes the answer out of the
        batch before the next step.
        """
        seat = _Seat(answer, emit, asyncio.get_running_loop().create_future())
        self._joining.append(seat)
        self._engine.decode(self._step)
        try:
            return await seat.done
        finally:
            seat.left = True

    def _step(self) -> bool:
        """A token for every answer; whether there is anything left to do."""
        while self._joining:
            self._seats.append(self._joining.popleft())
        seats = self._seats = [seat for seat in self._seats if not seat.left]
        if not seats:
            return False
        loop = seats[0].done.get_loop()
        try:
            tokens = next_tokens(self._decode, [seat.answer for seat in seats])
        except Exception as error:
            self._seats = []
            loop.call_soon_threadsafe(_fail, seats, error)
            return bool(self._joining)
        outcomes = [
            _Outcome(seat, token, FinishReason.LENGTH if seat.answer.is_full else None)
            if not isinstance(token, FinishReason)
            else _Outcome(seat, None, token)
            for seat, token in zip(seats, tokens, strict=True)
        ]
        self._seats = [outcome.seat for outcome in outcomes if outcome.reason is None]
        loop.call_soon_threadsafe(self._deliver, outcomes)
        return bool(self._seats or self._joining)

    def _deliver(self, outcomes: Sequence[_Outcome]) -> None:
        """Tell everybody what came of a step; in the event loop."""
        self._on_step(len(outcomes))
        for outcome in outcomes:
            if outcome.seat.left or outcome.seat.done.done():
                continue
            if outcome.token is not None:
                outcome.seat.emit(outcome.token)
            if outcome.reason is not None:
                outcome.seat.done.set_result(outcome.reason)


def _fail(seats: Sequence[_Seat], error: Exception) -> None:
    for seat in seats:
        if not seat.done.done():
            seat.done.set_exception(error)
