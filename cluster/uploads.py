"""Documents: bounded before they take memory, and put together where they come in pieces.

Knows nothing about gRPC servers, or about what is asked.
"""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from cluster.errors import OverloadedError
from cluster.request_wire import request_from_wire
from cluster.service import Limits, Request, TextPrompt
from homer.errors import PromptError
from homer.v1 import long_context_pb2 as pb

# When others' documents may have been answered.
FULL_RETRY_SECONDS = 5.0
# A token id in a list of Python's.
ID_BYTES = 8


class Uploads:
    """All documents that are being received, or were and are being answered.

    Parameters
    ----------
    limits : Limits
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held_bytes = 0

    @asynccontextmanager
    async def receive(
        self, parts: AsyncIterator[pb.GenerateFromStreamRequest]
    ) -> AsyncIterator[Request]:
        """The request whose parts come; its document counts until the block ends.

        Raises
        ------
        PromptError
            When parts come in another order, the text is not UTF-8, or the document is too long.
        OverloadedError
            When all documents together are too long.
        """
        document = _Document(self)
        try:
            yield await document.read(parts)
        finally:
            self.held_bytes -= document.held_bytes

    @contextmanager
    def whole(self, request: pb.GenerateRequest) -> Iterator[None]:
        """Counts a request that is there, document and all, until the block ends.

        Raises
        ------
        PromptError, OverloadedError
            As for `receive`, before anything is made of the message.
        """
        tokens = request.tokens
        ids = len(tokens.prefix_ids) + len(tokens.context_ids) + len(tokens.suffix_ids)
        self.check_ids(len(tokens.context_ids))
        count = max(request.ByteSize(), ID_BYTES * ids)
        self.take(count, 0)
        try:
            yield
        finally:
            self.held_bytes -= count

    def take(self, count: int, so_far: int) -> None:
        """Count bytes of a document that has `so_far` already.

        Raises
        ------
        PromptError, OverloadedError
            When they are too many; they are not counted then.
        """
        most = self._limits.document_bytes
        if so_far + count > most:
            raise PromptError(
                f"the document has more than {most} bytes; shorten it, or serve with a higher "
                "--max-document-bytes"
            )
        if self.held_bytes + count > self._limits.all_documents_bytes:
            raise OverloadedError(
                "other documents take all the memory that there is for them; try again",
                FULL_RETRY_SECONDS,
            )
        self.held_bytes += count

    def check_ids(self, count: int) -> None:
        """Refuse a document of more token ids than a context may have.

        Raises
        ------
        PromptError
        """
        if count > self._limits.context_tokens:
            raise PromptError(
                f"the context has more than {self._limits.context_tokens} tokens; shorten the "
                "document or serve with a higher --max-context-tokens"
            )


class _Document:
    """One document on its way."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self.held_bytes = 0

    async def read(self, parts: AsyncIterator[pb.GenerateFromStreamRequest]) -> Request:
        first = await anext(parts, None)
        if first is None or first.WhichOneof("part") != "request":
            raise PromptError("the first message has to bring the request, without its context")
        request = request_from_wire(first.request)
        if request.prompt.context:
            raise PromptError(
                "the context comes in messages behind the request; leave it out there, or use "
                "Generate"
            )
        if isinstance(request.prompt, TextPrompt):
            text = await self._text(parts)
            return replace(request, prompt=replace(request.prompt, context=text))
        return replace(request, prompt=request.prompt._replace(context=await self._ids(parts)))

    async def _text(self, parts: AsyncIterator[pb.GenerateFromStreamRequest]) -> str:
        decoder = codecs.getincrementaldecoder("utf-8")()
        pieces: list[str] = []
        try:
            while (part := await self._next(parts, "context_utf8")) is not None:
                self._take(len(part.context_utf8))
                pieces.append(decoder.decode(part.context_utf8))
            pieces.append(decoder.decode(b"", final=True))
        except UnicodeDecodeError as error:
            raise PromptError(
                f"the document is not UTF-8 text ({error.reason} before byte {self.held_bytes}); "
                "convert it first"
            ) from error
        return "".join(pieces)

    async def _ids(self, parts: AsyncIterator[pb.GenerateFromStreamRequest]) -> list[int]:
        ids: list[int] = []
        while (part := await self._next(parts, "context_ids")) is not None:
            self._uploads.check_ids(len(ids) + len(part.context_ids.ids))
            self._take(ID_BYTES * len(part.context_ids.ids))
            ids.extend(part.context_ids.ids)
        return ids

    async def _next(
        self, parts: AsyncIterator[pb.GenerateFromStreamRequest], kind: str
    ) -> pb.GenerateFromStreamRequest | None:
        part = await anext(parts, None)
        if part is not None and part.WhichOneof("part") != kind:
            raise PromptError(
                f"behind this request come messages with {kind}, but one has "
                f"{part.WhichOneof('part') or 'nothing'}"
            )
        return part

    def _take(self, count: int) -> None:
        self._uploads.take(count, self.held_bytes)
        self.held_bytes += count
