"""Documents that come in pieces: put together as they were, and bounded before they take memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from cluster.client_request import PIECE_LENGTH, ClientRequest
from cluster.errors import OverloadedError
from cluster.service import Limits, Request, TextPrompt
from cluster.text import PromptIds
from cluster.uploads import Uploads
from homer.errors import PromptError
from homer.v1 import long_context_pb2 as pb

Part = pb.GenerateFromStreamRequest
TEXT = Part(request=pb.GenerateRequest(text=pb.TextPrompt(prefix="p", suffix="q")))
TOKENS = Part(request=pb.GenerateRequest(tokens=pb.TokenPrompt(suffix_ids=[2])))


async def stream(parts: Iterable[pb.GenerateFromStreamRequest]) -> AsyncIterator[Any]:
    for part in parts:
        yield part


def received(parts: Iterable[Any], limits: Limits | None = None) -> Request:
    async def receive() -> Request:
        box = Uploads(limits or Limits())
        try:
            async with box.receive(stream(parts)) as request:
                return request
        finally:
            assert box.held_bytes == 0

    return asyncio.run(receive())


def text_parts(*pieces: bytes) -> list[Any]:
    return [TEXT, *(Part(context_utf8=piece) for piece in pieces)]


def test_characters_may_be_cut_between_pieces() -> None:
    document = "Ærøskøbing, 東京, 🦊 " * 3
    encoded = document.encode()
    for size in (1, 2, 3, 5):
        pieces = [encoded[at : at + size] for at in range(0, len(encoded), size)]
        assert received(text_parts(*pieces)).prompt == TextPrompt("p", document, "q")


@pytest.mark.parametrize("context", ["aé東🦊" * PIECE_LENGTH, list(range(2 * PIECE_LENGTH + 5))])
def test_what_a_client_sends_in_pieces_comes_together_again(context: Any) -> None:
    question: Any = "q" if isinstance(context, str) else [1]
    request = ClientRequest(context=context, question=question)
    assert request.is_long
    parts = [Part(request=request.to_wire()), *request.pieces()]
    assert max(part.ByteSize() for part in parts) < 2 << 20
    prompt = received(parts).prompt
    assert prompt == (
        TextPrompt("", context, question)
        if isinstance(context, str)
        else PromptIds([], context, question)
    )


def test_a_document_may_be_longer_than_a_message() -> None:
    piece = Part(context_utf8=b"x" * (1 << 20))
    prompt = received([TEXT, *[piece] * 70]).prompt
    assert len(prompt.context) == 70 << 20 > Limits().message_bytes


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([], "the first message has to bring the request"),
        ([Part(context_utf8=b"x")], "the first message has to bring the request"),
        ([Part(request=pb.GenerateRequest())], "has no prompt"),
        (
            [Part(request=pb.GenerateRequest(text=pb.TextPrompt(context="x")))],
            "the context comes in messages behind the request",
        ),
        ([TEXT, TEXT], "context_utf8, but one has request"),
        ([TEXT, Part()], "context_utf8, but one has nothing"),
        ([TOKENS, Part(context_utf8=b"x")], "context_ids, but one has context_utf8"),
        (text_parts(b"ab\xff"), "not UTF-8 text"),
        (text_parts("東".encode()[:2]), "not UTF-8 text"),
        (text_parts(b"x" * 8, b"x" * 3), "more than 10 bytes"),
        ([TOKENS, Part(context_ids=pb.TokenIds(ids=[1, 2, 3, 4, 5]))], "more than 4 tokens"),
    ],
)
def test_what_cannot_be_a_document_is_refused(parts: list[Any], problem: str) -> None:
    with pytest.raises(PromptError, match=problem):
        received(parts, Limits(document_bytes=10, context_tokens=4))


def test_too_many_ids_in_one_message_are_refused_before_they_are_made_a_list_of() -> None:
    box = Uploads(Limits(context_tokens=4))
    tokens = pb.TokenPrompt(context_ids=[1, 2, 3, 4, 5])
    with (
        pytest.raises(PromptError, match="more than 4 tokens"),
        box.whole(pb.GenerateRequest(tokens=tokens)),
    ):
        pass
    assert box.held_bytes == 0


def test_a_document_is_refused_at_the_piece_that_is_too_much() -> None:
    read = 0

    def endless() -> Iterable[Any]:
        nonlocal read
        yield TEXT
        while True:
            read += 1
            yield Part(context_utf8=b"x" * 1000)

    with pytest.raises(PromptError, match="more than 10000 bytes"):
        received(endless(), Limits(document_bytes=10_000))
    assert read == 11


def test_documents_at_once_share_what_there_is() -> None:
    async def both() -> None:
        box = Uploads(Limits(document_bytes=10, all_documents_bytes=15))
        async with box.receive(stream(text_parts(b"x" * 10))):
            with pytest.raises(OverloadedError, match="other documents") as refused:
                async with box.receive(stream(text_parts(b"x" * 5, b"x"))):
                    pass
            assert refused.value.retry_after_seconds > 0
            assert box.held_bytes == 10
            # Documents in one message count with them.
            with (
                pytest.raises(OverloadedError, match="other documents"),
                box.whole(pb.GenerateRequest(text=pb.TextPrompt(context="x" * 5))),
            ):
                pass
            assert box.held_bytes == 10
        with box.whole(pb.GenerateRequest(tokens=pb.TokenPrompt(context_ids=[1]))):
            assert box.held_bytes == 8
        async with box.receive(stream(text_parts(b"x" * 6))) as request:
            assert request.prompt.context == "xxxxxx"
        assert box.held_bytes == 0

    asyncio.run(both())
