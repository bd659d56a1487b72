"""The gRPC door around its service: before there is one, while it serves, and when it is to end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster import retry
from cluster.client import HomerClient
from cluster.door import GrpcDoor
from cluster.errors import ServiceError
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from cluster.seeing import Seeing
from cluster.service import Limits, LongContextService, TokenText
from homer import HomerConfig
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from tests.cluster.conftest import Run, poll
from tests.cluster.fakes import FakeWorker, make_pool
from tests.cluster.processes import free_ports
from tests.cluster.test_retries import Script, answer, served

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CONFIG = Path(__file__).parents[2] / "proto" / "homer" / "v1" / "service_config.json"


class Slow:
    """A service that gives a token, and another when it is let."""

    def __init__(self, version: int = 1) -> None:
        self.version = version
        self.seeing = Seeing()
        self.scheduler = SimpleNamespace(deserted=False)
        self.go_on = threading.Event()
        self.cancelled = False

    async def generate(self, request: Any) -> AsyncIterator[Any]:
        try:
            yield TokenText(self.version, "one")
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            yield TokenText(2 * self.version, "two")
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@contextmanager
def listening(run: Run[Any], port: int = 0, **settings: Any) -> Iterator[tuple[GrpcDoor, str]]:
    door = GrpcDoor("127.0.0.1", port, Limits(), **settings)
    port = run(door.listen())
    try:
        yield door, f"127.0.0.1:{port}"
    finally:
        run(door.stop(0))


class Watching:
    """What a health watch says, as it comes."""

    def __init__(self, channel: grpc.Channel) -> None:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="homer.v1.LongContext")
        self._call = stub.Watch(request, wait_for_ready=True)
        self.statuses: list[int] = []
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for reply in self._call:
                self.statuses.append(reply.status)
        except grpc.RpcError:
            pass

    def wait_for(self, *statuses: int) -> None:
        poll(lambda: self.statuses == list(statuses), f"health said {self.statuses}")

    def end(self) -> None:
        self._call.cancel()
        self._thread.join()


def refuses(client: HomerClient) -> bool:
    """Whether a new request is refused; one that is not is given up."""
    with closing(client.generate(context="a", question="b")) as events:
        try:
            next(events)
        except ServiceError:
            return True
    return False


def refusal(client: HomerClient) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        list(client.generate(context="a", question="b"))
    return caught.value


def test_health_follows_the_service_from_loading_to_its_end(run: Run[Any]) -> None:
    slow = Slow()
    with (
        listening(run) as (door, address),
        grpc.insecure_channel(address) as channel,
        HomerClient(address) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        watching = Watching(channel)
        watching.wait_for(NOT_SERVING)
        error = refusal(client)
        assert error.code == "UNAVAILABLE"
        assert "still loading" in str(error)
        with pytest.raises(ServiceError, match="still loading"):
            client.server_info()

        run(door.serve(cast(Any, slow)))
        watching.wait_for(NOT_SERVING, SERVING)
        events = client.generate(context="a", question="b")
        assert next(events) == pb.Token(token_id=1, text="one")

        draining = pool.submit(run, door.drain(60))
        watching.wait_for(NOT_SERVING, SERVING, NOT_SERVING)
        error = refusal(client)
        assert error.code == "UNAVAILABLE"
        assert "takes no new requests" in str(error)
        assert not draining.done()
        # What runs goes on, and the service waits for it alone: a watch may go on for ever.
        slow.go_on.set()
        assert list(events) == [pb.Token(token_id=2, text="two")]
        draining.result(60)
        watching.end()


def test_another_version_takes_over_the_address_and_the_first_takes_it_back(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody waits long between two tries.
    monkeypatch.setattr(retry, "LONGEST_DELAY_SECONDS", 0.1)
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.1)
    (port,) = free_ports(1)
    with HomerClient(f"127.0.0.1:{port}", retries=1000) as patient, ThreadPoolExecutor(2) as pool:

        def ask() -> list[int]:
            events = patient.generate(context="a", question="b")
            return [event.token_id for event in events if isinstance(event, pb.Token)]

        waiting: Future[list[int]] | None = None
        for version in (1, 2, 1):
            service = Slow(version)
            with listening(run, port) as (door, address), HomerClient(address) as client:
                run(door.serve(cast(Any, service)))
                if waiting is not None:
                    # Who asked while the version before ended is answered by this one.
                    service.go_on.set()
                    assert waiting.result(60) == [version, 2 * version]
                    service.go_on.clear()
                running = client.generate(context="a", question="b")
                assert next(running) == pb.Token(token_id=version, text="one")
                draining = pool.submit(run, door.drain(60))
                poll(partial(refuses, client), "the door takes new requests")
                waiting = pool.submit(ask)
                # What runs ends on the version on which it began.
                service.go_on.set()
                assert list(running) == [pb.Token(token_id=2 * version, text="two")]
                draining.result(60)
        with listening(run, port) as (door, _):
            run(door.serve(cast(Any, service)))
            assert waiting is not None
            assert waiting.result(60) == [1, 2]


def test_health_says_that_all_workers_are_lost_and_that_one_is_back(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.door.LOOK_SECONDS", 0.02)

    async def service_on(pool: list[FakeWorker]) -> LongContextService:
        scheduler = Scheduler(pool, options=SchedulerOptions(no_worker_timeout_seconds=0.1))
        info = await pool[0].info()
        config = HomerConfig(max_chunk_len=16, target_len=12, warmup_layers=1)
        return LongContextService(scheduler, info, config, None, Limits())

    async def lose(service: LongContextService, name: str) -> None:
        service.scheduler.lose_worker(name, "it died")

    async def join(service: LongContextService, *worker: Any) -> None:
        service.scheduler.add_worker(*worker)

    pool = make_pool(4)
    with listening(run) as (door, address), grpc.insecure_channel(address) as channel:
        watching = Watching(channel)
        watching.wait_for(NOT_SERVING)
        service = run(service_on(pool[:2]))
        run(door.serve(service))
        watching.wait_for(NOT_SERVING, SERVING)
        run(lose(service, "worker-0"))
        # One is left; and then only one that has not all layers, which answers nothing.
        run(join(service, pool[2], 1))
        run(lose(service, "worker-1"))
        watching.wait_for(NOT_SERVING, SERVING, NOT_SERVING)
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        run(join(service, pool[3]))
        watching.wait_for(NOT_SERVING, SERVING, NOT_SERVING, SERVING)
        watching.end()
    run(service.scheduler.close())


def test_what_runs_beyond_its_grace_is_cancelled(run: Run[Any]) -> None:
    slow = Slow()
    with listening(run) as (door, address), HomerClient(address) as client:
        run(door.serve(cast(Any, slow)))
        events = client.generate(context="a", question="b")
        next(events)
        run(door.stop(0.1))
        with pytest.raises(ServiceError):
            list(events)
        poll(lambda: slow.cancelled, "the request goes on")


def test_reflection_is_an_option(run: Run[Any]) -> None:
    with (
        listening(run, with_reflection=False) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as caught:
            list(stub(channel).ServerReflectionInfo(iter([request])))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_peer_that_has_gone_without_a_word_is_found(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silenced(host: str, port: int) -> tuple[asyncio.Server, asyncio.Event]:
        """A way to a port that passes nothing on once the event is set, and closes nothing."""
        silent = asyncio.Event()

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                if not silent.is_set():
                    writer.write(data)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection(host, port)
            await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

        return await asyncio.start_server(connected, host, 0), silent

    quick = (
        ("grpc.keepalive_time_ms", 500),
        ("grpc.keepalive_timeout_ms", 500),
        ("grpc.http2.ping_timeout_ms", 500),
        ("grpc.http2.max_pings_without_data", 0),
    )
    monkeypatch.setattr("cluster.client.CHANNEL_OPTIONS", quick)
    monkeypatch.setattr("cluster.door.KEEPALIVE_SECONDS", 1)
    slow = Slow()
    with listening(run) as (door, address):
        run(door.serve(cast(Any, slow)))
        host, _, port = address.partition(":")
        way, silent = run(silenced(host, int(port)))
        with HomerClient(f"{host}:{way.sockets[0].getsockname()[1]}") as client:
            events = client.generate(context="a", question="b")
            next(events)
            silent.set()
            with pytest.raises(ServiceError) as caught:
                list(events)
        assert caught.value.code == "UNAVAILABLE"
        way.close()
        slow.go_on.set()


def test_the_shipped_service_config_repeats_only_what_is_unavailable_and_has_not_begun() -> None:
    def refused(code: str) -> Any:
        def run(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
            context.abort(grpc.StatusCode[code], "not now")
            yield pb.GenerateResponse()

        return run

    config = json.dumps(json.loads(CONFIG.read_text()))
    cases = (
        (Script(refused("UNAVAILABLE"), answer(7)), 2, None),
        (Script(answer(5, fails="UNAVAILABLE"), answer(7)), 1, grpc.StatusCode.UNAVAILABLE),
        (Script(refused("INTERNAL"), answer(7)), 1, grpc.StatusCode.INTERNAL),
    )
    for script, attempts, code in cases:
        with (
            served(script) as address,
            grpc.insecure_channel(address, [("grpc.service_config", config)]) as channel,
        ):
            stub = long_context_pb2_grpc.LongContextStub(channel)
            try:
                list(stub.Generate(pb.GenerateRequest()))
                found = None
            except grpc.RpcError as error:
                found = error.code()
        assert (found, len(script.requests)) == (code, attempts)
