"""A client that asks again: when, after what time, and what its caller gets to see."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from typer.testing import CliRunner

from cluster import retry
from cluster.cli import app
from cluster.client import AsyncHomerClient, HomerClient
from cluster.client_request import ClientRequest, compression_to_wire
from cluster.door import GrpcDoor
from cluster.errors import (
    CapacityError,
    NoWorkersError,
    OverloadedError,
    ServiceError,
    WorkerLostError,
)
from cluster.retry import Replay, delay_seconds
from cluster.seeing import Seeing
from cluster.service import Limits
from homer.errors import ConfigError, HomerError, PromptError
from homer.shape import UNCALIBRATED
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from tests.cluster.conftest import Run
from tests.cluster.processes import free_ports

Attempt = Callable[[pb.GenerateRequest, Any], Iterator[pb.GenerateResponse]]


class Script(long_context_pb2_grpc.LongContextServicer):
    """A service that answers each request by the next of `attempts`."""

    def __init__(self, *attempts: Attempt) -> None:
        self.attempts = list(attempts)
        self.requests: list[pb.GenerateRequest] = []

    def Generate(  # noqa: N802 - gRPC's name
        self, request: pb.GenerateRequest, context: Any
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        yield from self.attempts[len(self.requests) - 1](request, context)


def answer(*tokens: int, fails: str = "", retry_after: str = "") -> Attempt:
    """Tokens after each other, then a failure or the summary."""

    def run(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r"))
        for token in tokens:
            yield pb.GenerateResponse(token=pb.Token(token_id=token, text=f"<{token}>"))
        if fails:
            if retry_after:
                context.set_trailing_metadata((("retry-after", retry_after),))
            context.abort(grpc.StatusCode[fails], "not now")
        yield pb.GenerateResponse(summary=pb.Summary(token_ids=tokens))

    return run


@contextmanager
def served(script: Script, port: int = 0) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    long_context_pb2_grpc.add_LongContextServicer_to_server(script, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        server.stop(None).wait()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.01)


def ask(client: HomerClient, **given: Any) -> list[Any]:
    return list(client.generate(context=[1], question=[2], **given))


def test_the_command_says_once_that_a_service_is_not_calibrated() -> None:
    def uncalibrated(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(accepted=pb.Accepted(uncalibrated=True))
        if len(script.requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        yield pb.GenerateResponse(summary=pb.Summary(text="42"))

    script = Script(uncalibrated, uncalibrated)
    with served(script) as address:
        question = ["--context", __file__, "--question", "Why?", "--score", "max_logit"]
        arguments = ["generate", "--server", address, *question, "--retries", "1"]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == "42\n"
    assert result.stderr.count(f"homer: {UNCALIBRATED}\n") == 1
    assert [request.compression.score for request in script.requests] == ["max_logit"] * 2


def refusal(script: Script, retries: int, **given: Any) -> ServiceError:
    """The error that a client of `retries` gets to see."""
    with (
        served(script) as address,
        HomerClient(address, retries=retries) as client,
        pytest.raises(ServiceError) as caught,
    ):
        ask(client, **given)
    return caught.value


def tokens_of(events: list[Any]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, pb.Token)]


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_what_passes_is_asked_again_and_no_token_comes_twice(code: str) -> None:
    script = Script(answer(5, 6, fails=code), answer(fails=code), answer(5, 6, 7, 8))
    with served(script) as address, HomerClient(address, retries=2) as client:
        events = ask(client)
    assert tokens_of(events) == [5, 6, 7, 8]
    assert [type(event) for event in events].count(pb.Accepted) == 3
    assert isinstance(events[-1], pb.Summary)
    assert list(events[-1].token_ids) == [5, 6, 7, 8]


def test_nothing_is_asked_again_without_being_told(subtests: pytest.Subtests) -> None:
    for code, retries in (("UNAVAILABLE", 0), ("INVALID_ARGUMENT", 3), ("INTERNAL", 3)):
        with subtests.test(code):
            script = Script(answer(fails=code), answer(1))
            assert refusal(script, retries).code == code
            assert len(script.requests) == 1


def test_grpc_s_own_retries_do_not_multiply_the_client_s() -> None:
    def refused(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        # Nothing was sent yet, and gRPC is told to try at once: with a policy it would.
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "0"),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        yield pb.GenerateResponse()

    for retries in (0, 2):
        script = Script(*[refused] * 15)
        assert refusal(script, retries).code == "UNAVAILABLE"
        assert len(script.requests) == 1 + retries


def test_retries_end() -> None:
    script = Script(*[answer(fails="UNAVAILABLE")] * 4)
    assert refusal(script, 2).code == "UNAVAILABLE"
    assert len(script.requests) == 3


def test_the_time_that_the_service_asks_for_is_kept() -> None:
    script = Script(answer(fails="RESOURCE_EXHAUSTED", retry_after="1.0"), answer(1))
    with served(script) as address, HomerClient(address, retries=1) as client:
        started = time.monotonic()
        assert tokens_of(ask(client)) == [1]
    # Unasked, the first wait is shorter.
    longest_default = retry.FIRST_DELAY_SECONDS * (1 + retry.JITTER)
    assert time.monotonic() - started >= 1.0 > longest_default


@pytest.mark.parametrize(
    ("error", "code", "seconds"),
    [
        (OverloadedError("full", 12.5), "RESOURCE_EXHAUSTED", 12.5),
        (NoWorkersError("none left", 30), "UNAVAILABLE", 30),
        (WorkerLostError("gone"), "UNAVAILABLE", 5),
        (CapacityError("too long"), "FAILED_PRECONDITION", None),
        (PromptError("empty"), "INVALID_ARGUMENT", None),
    ],
)
def test_the_door_says_when_to_ask_again(
    error: HomerError, code: str, seconds: float | None, run: Run[Any]
) -> None:
    class Failing:
        limits = Limits()
        seeing = Seeing()
        scheduler = SimpleNamespace(deserted=False)

        async def generate(self, request: Any) -> AsyncIterator[Any]:
            raise error
            yield

    door = GrpcDoor("127.0.0.1", 0, Limits())
    port = run(door.listen())
    run(door.serve(cast(Any, Failing())))
    with HomerClient(f"127.0.0.1:{port}") as client, pytest.raises(ServiceError) as caught:
        ask(client)
    run(door.stop(0))
    assert (caught.value.code, caught.value.retry_after_seconds) == (code, seconds)


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    script = Script(answer(fails="UNAVAILABLE", retry_after="60"), answer(1))
    error = refusal(script, 1, timeout_seconds=20)
    assert (error.code, error.retry_after_seconds) == ("UNAVAILABLE", 60)


def test_an_answer_that_comes_out_otherwise_is_refused() -> None:
    script = Script(answer(5, 6, fails="UNAVAILABLE"), answer(5, 9, 9))
    error = refusal(script, 1)
    assert error.code == "DATA_LOSS"
    assert "token 1 of its answer" in str(error)


def test_a_sample_is_given_a_seed_so_that_it_can_be_repeated() -> None:
    def drawn(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        assert request.sampling.HasField("seed")
        token = request.sampling.seed % 1000
        fails = "UNAVAILABLE" if len(script.requests) == 1 else ""
        return answer(token, token + 1, fails=fails)(request, context)

    script = Script(drawn, drawn)
    with served(script) as address, HomerClient(address, retries=1) as client:
        assert len(tokens_of(ask(client, sampling={"temperature": 1.0}))) == 2
    first, second = (request.sampling.seed for request in script.requests)
    assert first == second

    plain = Script(answer(1))
    with served(plain) as address, HomerClient(address) as client:
        ask(client, sampling={"temperature": 1.0})
    assert not plain.requests[0].sampling.HasField("seed")


def test_a_service_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.2)
    (port,) = free_ports(1)
    with HomerClient(f"127.0.0.1:{port}", retries=8) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client)
        with pytest.raises(TimeoutError):
            asked.result(0.3)
        with served(Script(answer(1, 2)), port):
            assert tokens_of(asked.result(60)) == [1, 2]


def test_delays_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.5)
    monkeypatch.setattr(retry, "JITTER", 0)
    error = ServiceError("UNAVAILABLE", "")
    delays = [delay_seconds(error, failures) for failures in (1, 2, 3, 10, 10_000)]
    assert delays == [0.5, 1, 2, retry.LONGEST_DELAY_SECONDS, retry.LONGEST_DELAY_SECONDS]
    assert delay_seconds(ServiceError("DATA_LOSS", ""), 1) is None


def test_a_replay_knows_what_was_given_over_any_number_of_attempts() -> None:
    replay = Replay()
    seen = []
    for length in (2, 1, 4):
        replay.begin()
        seen += [token for token in range(length) if replay.is_new(token)]
    assert seen == [0, 1, 2, 3]


def test_retries_below_none() -> None:
    with pytest.raises(ConfigError, match="retries is -1"):
        HomerClient("127.0.0.1:1", retries=-1)


@pytest.mark.parametrize("settings", [{"plan": "wide"}, {"max_chunk": 1}, {"max_chunk_len": "x"}])
def test_compression_settings_that_do_not_exist_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        compression_to_wire(settings)


def test_both_clients_take_the_same_keywords_and_refuse_others_at_once() -> None:
    fields = {name: item.default for name, item in signature(ClientRequest).parameters.items()}
    for kind in (HomerClient, AsyncHomerClient):
        taken = dict(signature(kind.generate).parameters)
        del taken["self"]
        assert {name: item.default for name, item in taken.items()} == fields
    with HomerClient("127.0.0.1:9") as client:
        with pytest.raises(TypeError, match="colour"):
            client.generate(context="a", question="b", colour="red")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="all as text or all as token ids"):
            client.generate(context="a", question=[1])
        with pytest.raises(ConfigError, match="heat"):
            ask(client, sampling={"heat": 1})
