"""`homer serve` through what happens to a service: its coordinator dies, and it is told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cluster.client import HomerClient
from cluster.errors import ServiceError
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import poll
from tests.cluster.processes import BIN, Lines, Sandbox, free_ports, sandbox
from tests.cluster.test_door import NOT_SERVING, SERVING, Watching
from tests.cluster.test_service import CONTEXT, LONG_CONTEXT, QUESTION


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with sandbox() as made:
        yield made


def tokens(client: HomerClient, context: str, count: int) -> list[int]:
    *_, summary = client.generate(
        context=context, question=QUESTION, sampling={"max_tokens": count, "ignore_eos": True}
    )
    assert isinstance(summary, pb.Summary)
    return list(summary.token_ids)


def test_it_survives_its_coordinator_and_lets_requests_end_on_sigterm(
    box: Sandbox, text_model: Path
) -> None:
    (port,) = free_ports(1)
    serve = box.start(
        str(BIN / "homer"), "serve", "--model", str(text_model), "--cpu", "--port", str(port)
    )  # fmt: skip
    output, news = Lines(serve.stdout), Lines(serve.stderr)
    # Tries again soon: the port is there before the model is loaded, but not long before.
    quick = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))
    with grpc.insecure_channel(f"127.0.0.1:{port}", quick) as channel:
        loading = Watching(channel)
        address = output.wait_for(r"homer serves .* at (\S+) with 1 worker\(s\)")[1]
        loading.wait_for(NOT_SERVING, SERVING)
        loading.end()
    with (
        HomerClient(address, retries=10) as client,
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        expected = tokens(client, CONTEXT, 8)
        (coordinator,) = (
            pid for pid, line in box.processes().items() if line.startswith("ray::Coordinator")
        )
        os.kill(coordinator, signal.SIGKILL)
        assert tokens(client, CONTEXT, 8) == expected
        news.wait_for("the coordinator died, and running requests with it; Ray restarts it")
        assert news.wait_for(r"the coordinator is back at (\S+)")[1] == address

        running = pool.submit(tokens, client, LONG_CONTEXT, 200)
        poll(lambda: client.server_info().running_requests > 0, "the request does not start")
        watching = Watching(channel)
        watching.wait_for(SERVING)
        serve.terminate()
        news.wait_for("running requests have 30 s to end")
        watching.wait_for(SERVING, NOT_SERVING)
        with HomerClient(address) as late, pytest.raises(ServiceError) as refused:
            tokens(late, CONTEXT, 1)
        assert refused.value.code == "UNAVAILABLE"
        assert len(running.result(60)) == 200
        watching.end()
    assert serve.wait(60) == 0
    news.wait_for("homer: stopped")
    box.assert_empty()
