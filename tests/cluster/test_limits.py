"""The gRPC door before callers who ask for too much, send in drops, or do not read."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import HomerClient
from cluster.door import GrpcDoor
from cluster.errors import ServiceError
from cluster.http.middleware import HttpLimits, Limited
from cluster.seeing import Seeing
from cluster.service import Limits, TokenText
from homer.errors import ConfigError
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import Run, poll
from tests.cluster.http.test_http import listening, serving
from workers.security import Security

ANNA, BERT = "anna-has-this-token", "bert-has-another-one"
METHOD = "/homer.v1.LongContext/Generate"
ASK: Any = {"context": "a", "question": "b"}


class Talking:
    """A service that answers without end, and knows to how many."""

    def __init__(self, **limits: Any) -> None:
        self.limits = Limits(**limits)
        self.seeing = Seeing()
        self.scheduler = SimpleNamespace(deserted=False)
        self.listeners = 0

    async def generate(self, request: Any) -> AsyncIterator[Any]:
        self.listeners += 1
        try:
            while True:
                yield TokenText(1, "word " * 200)
                await asyncio.sleep(0)
        finally:
            self.listeners -= 1


@contextmanager
def door(run: Run[Any], service: Talking, **security: Any) -> Iterator[str]:
    opened = GrpcDoor("127.0.0.1", 0, service.limits, Security(**security))
    port = run(opened.listen())
    run(opened.serve(cast(Any, service)))
    try:
        yield f"127.0.0.1:{port}"
    finally:
        run(opened.stop(0))


def test_a_token_has_its_share_of_calls_and_leaves_others_theirs(run: Run[Any]) -> None:
    service = Talking(calls_per_token=2)
    with (
        door(run, service, tokens=f"anna={ANNA}\nbert={BERT}") as address,
        HomerClient(address, token=ANNA) as anna,
        HomerClient(address, token=BERT) as bert,
    ):
        running = [anna.generate(**ASK) for _ in range(2)]
        for events in running:
            assert next(events)
        with pytest.raises(ServiceError, match="anna may have 2 calls at once; wait") as caught:
            next(anna.generate(**ASK))
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert caught.value.retry_after_seconds == 1
        others = bert.generate(**ASK)
        assert next(others)
        others.close()
        running.pop().close()
        # What was hung up on counts until the door has heard of it.
        poll(lambda: service.listeners == 1, "the answer goes on")
        again = anna.generate(**ASK)
        assert next(again)
        again.close()
        running.pop().close()
        poll(lambda: service.listeners == 0, "answers go on")


def test_health_is_watched_by_so_many_and_checked_by_all(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.call_limit.MOST_WATCHES", 2)
    asked = health_pb2.HealthCheckRequest()
    with (
        door(run, Talking(calls_per_token=0), tokens=f"anna={ANNA}") as address,
        grpc.insecure_channel(address) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(asked) for _ in range(2)]
        assert all(next(watch) for watch in watches)
        with pytest.raises(grpc.RpcError, match="2 watches of health already; call Check"):
            next(stub.Watch(asked))
        assert stub.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
        for watch in watches:
            watch.cancel()


def test_who_does_not_read_an_answer_loses_it(run: Run[Any]) -> None:
    service = Talking(write_seconds=0.5)
    with door(run, service) as address, HomerClient(address) as client:
        events = client.generate(**ASK)
        assert next(events)
        assert service.listeners == 1
        poll(lambda: service.listeners == 0, "nobody reads, and the answer goes on")
        with pytest.raises(ServiceError, match=r"nothing of the answer was read for 0.5") as caught:
            list(events)
        assert caught.value.code == "DEADLINE_EXCEEDED"


def test_a_request_that_does_not_come_is_not_waited_for(run: Run[Any]) -> None:
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield b""

    with door(run, Talking(read_seconds=0.3)) as address, grpc.insecure_channel(address) as channel:
        multi: Any = channel.stream_stream(METHOD, None, None)
        call = multi(nothing(), timeout=60)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the request did not come within 0.3 seconds" in call.details()
        never.set()


@pytest.mark.parametrize(
    ("messages", "details"),
    [([b"\xff"], "the request is no such message"), ([], "the call came without its message")],
)
def test_what_is_no_message_is_refused(messages: list[bytes], details: str, run: Run[Any]) -> None:
    with door(run, Talking()) as address, grpc.insecure_channel(address) as channel:
        multi: Any = channel.stream_stream(METHOD, None, None)
        call = multi(iter(messages), timeout=60)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details in call.details()


def test_messages_and_metadata_that_are_too_long_are_refused(run: Run[Any]) -> None:
    with (
        door(run, Talking(message_bytes=1000)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        multi: Any = channel.unary_stream(METHOD, pb.GenerateRequest.SerializeToString, None)
        long = pb.GenerateRequest(text=pb.TextPrompt(context="a" * 2000))
        calls = [multi(long), multi(pb.GenerateRequest(), metadata=[("x", "a" * 40_000)])]
        for call in calls:
            with pytest.raises(grpc.RpcError):
                next(call)
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # What is small only until it is unpacked is not unpacked.
        bomb = pb.GenerateRequest(text=pb.TextPrompt(context="a" * 500_000))
        call = multi(bomb, compression=grpc.Compression.Gzip)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call.details() == "Decompressed message larger than max"


class Quoting(Talking):
    """A service that refuses, and quotes what it was sent."""

    def abort(self, request_id: str, caller: str) -> int:
        return 0

    async def generate(self, request: Any) -> AsyncIterator[Any]:
        raise ConfigError(f"score is {request.compression['score']!r}")
        yield


def test_an_error_that_quotes_its_caller_fits_into_metadata(run: Run[Any]) -> None:
    with door(run, Quoting()) as address, HomerClient(address) as client:
        with pytest.raises(ServiceError) as unknown:
            client.abort("a" * 100_000)
        assert unknown.value.code == "NOT_FOUND"
        assert len(str(unknown.value)) < 300
        with pytest.raises(ServiceError, match="score is 'aaaa") as wrong:
            next(client.generate(**ASK, compression={"score": "a" * 100_000}))
        assert wrong.value.code == "INVALID_ARGUMENT"


def test_bodies_at_once_share_what_there_is() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        length = len((await receive())["body"])
        await send({"type": "http.response.start", "status": 200 + length, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    limited = Limited(answer, HttpLimits(all_bodies_bytes=10))
    with listening(lambda: limited) as port:
        head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
            slow.sendall(f"{head}aaaaa".encode())
            poll(lambda: limited.held_bytes == 5, "the body is not read")
            assert first_line("127.0.0.1", port, f"{head}bbbbbb").startswith("HTTP/1.1 429")
            slow.sendall(b"a")
            assert slow.makefile().readline().startswith("HTTP/1.1 206")
        assert first_line("127.0.0.1", port, f"{head}bbbbbb").startswith("HTTP/1.1 206")
        poll(lambda: limited.held_bytes == 0, "what was answered is still counted")


def test_the_http_door_hangs_up_on_who_does_not_read() -> None:
    running, limits = Counter[str](), HttpLimits(stall_seconds=0.5)

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        running["now"] += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                piece = {"type": "http.response.body", "body": b"a" * 65536, "more_body": True}
                await send(piece)
        finally:
            running["now"] -= 1
            running["ended"] += 1

    with listening(lambda: Limited(endless, limits)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            poll(lambda: running["ended"] == 1, "nobody reads, and the answer goes on")
        assert running["now"] == 0


def test_the_http_door_does_not_wait_for_bodies_nor_take_long_headers() -> None:
    limits = HttpLimits(body_seconds=0.3, header_bytes=2000)
    with serving("127.0.0.1:1", limits=limits) as url:
        host, port = url.removeprefix("http://").split(":")
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
        slow = f"{head}Content-Length: 9\r\n\r\n{{"
        assert first_line(host, int(port), slow) == "HTTP/1.1 408 Request Timeout"
        large = f"{head}X: {'a' * 3000}\r\nContent-Length: 0\r\n\r\n"
        assert first_line(host, int(port), large).startswith("HTTP/1.1 431")


def first_line(host: str, port: int, request: str) -> str:
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.sendall(request.encode())
        return connection.makefile().readline().strip()
