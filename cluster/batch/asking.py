"""Asks a service one line, again and again where it has no room or is away for now.

Knows nothing about files of results.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from cluster.async_client import AsyncHomerClient
from cluster.batch.documents import DocumentReader
from cluster.batch.gate import Gate
from cluster.batch.lines import Line, Question
from cluster.batch.records import answered
from cluster.client_wire import Event, summary_to_json
from cluster.errors import ServiceError
from cluster.http.asking import Served
from cluster.http.errors import HttpError
from cluster.retry import delay_seconds
from homer.errors import HomerError
from homer.shape import UNCALIBRATED
from homer.v1 import long_context_pb2 as pb

# What says it of one line says it of all.
_FOR_ALL = ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED")
_READY_SECONDS = 10.0


class Asker:
    """Asks lines of one service; used in one event loop.

    Parameters
    ----------
    client : AsyncHomerClient
        Without retries of its own.
    served : Served, optional
        What the service serves; for lines in OpenAI's format.
    documents : DocumentReader
    gate : Gate
    priority : int
        Of lines that have none.
    retries : int
        How often a line is asked again when workers or the service were lost under it.
    note : callable
        Is told what a user should know.
    """

    def __init__(
        self,
        client: AsyncHomerClient,
        served: Served | None,
        documents: DocumentReader,
        gate: Gate,
        *,
        priority: int,
        retries: int,
        note: Callable[[str], None],
    ) -> None:
        self._client = client
        self._served = served
        self._documents = documents
        self._gate = gate
        self._priority = priority
        self._retries = retries
        self._note = note
        self._told = False

    async def ask(self, line: Line) -> dict[str, Any]:
        """The record of the line's answer.

        Raises
        ------
        HttpError
            When this line cannot be answered.
        ServiceError
            When no line can be: the service is gone, or does not let us in.
        """
        request_id = uuid.uuid4().hex
        try:
            request, whole = await self._prepared(line, request_id)
            return answered(line, await self._answer(request, whole), request_id)
        except ServiceError:
            raise
        except HomerError as error:
            raise HttpError(400, str(error)) from error

    async def _prepared(self, line: Line, request_id: str) -> tuple[dict[str, Any], Whole]:
        """The arguments of a client's `generate`, and what makes the answer of its events."""
        asks = line.asks
        if isinstance(asks, HttpError):
            raise asks
        if isinstance(asks, Question):
            context = asks.context
            if context is None:
                context = await self._documents.text(asks.context_path or "")
            priority = self._priority if asks.priority is None else asks.priority
            request = {
                "prefix": asks.prefix,
                "context": context,
                "question": asks.question,
                "request_id": request_id,
                "sampling": asks.sampling,
                "compression": asks.compression,
                "return_kept_indices": asks.return_kept_indices,
                "priority": priority,
            }
            return request, _whole
        if self._served is None:
            raise TypeError("lines in OpenAI's format need to know what is served")
        asked = await asyncio.to_thread(self._served.asked, asks, request_id)
        if "priority" not in asks.homer.model_fields_set:
            asked.request["priority"] = self._priority
        return asked.request, asked.answer.whole

    async def _answer(self, request: dict[str, Any], whole: Whole) -> dict[str, Any]:
        failures = 0
        while True:
            try:
                async with self._gate, aclosing(self._client.generate(**request)) as events:
                    answer = await whole(self._seen(events))
                self._gate.answered()
                return answer
            except ServiceError as error:
                if error.code in _FOR_ALL:
                    raise
                full = error.code == "RESOURCE_EXHAUSTED"
                if full and error.retry_after_seconds is not None:
                    if self._gate.refused(error.retry_after_seconds):
                        self._note(
                            f"the service has no room; {int(self._gate.limit)} line(s) at a time "
                            f"again in {error.retry_after_seconds:.0f} s"
                        )
                    continue
                failures += 1
                delay = delay_seconds(error, failures)
                # Too much for one message says that it is exhausted too, and stays so.
                if delay is None or full:
                    raise HttpError.of_service(error) from error
                if failures > self._retries:
                    await self._check_ready(error)
                    raise HttpError.of_service(error) from error
            await asyncio.sleep(delay)

    async def _seen(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        async for event in events:
            if isinstance(event, pb.Accepted) and event.uncalibrated and not self._told:
                self._told = True
                self._note(UNCALIBRATED)
            yield event

    async def _check_ready(self, error: ServiceError) -> None:
        """Raise `error` unless others could be answered now."""
        try:
            info = await self._client.server_info(_READY_SECONDS)
        except ServiceError:
            raise error from None
        if not any(worker.ready for worker in info.workers):
            raise error


Whole = Callable[[AsyncIterator[Event]], Awaitable[dict[str, Any]]]


async def _whole(events: AsyncIterator[Event]) -> dict[str, Any]:
    async for event in events:
        if isinstance(event, pb.Summary):
            return summary_to_json(event)
    raise ServiceError("DATA_LOSS", "the service ended the answer before its summary")
