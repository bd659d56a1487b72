"""A worker as a process: start, health, drain, and what it needs to run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from homer.errors import ConfigError
from homer.v1 import worker_pb2
from tests.golden_cases import GoldenCase, model_dir
from tests.workers.processes import (
    CALL_SECONDS,
    Prompt,
    WorkerProcess,
    eventually,
    release,
    running_workers,
)
from workers.__main__ import parse_options
from workers.bench import measure
from workers.options import WorkerOptions

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(worker: WorkerProcess, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(worker.channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return int(stub.Check(request, timeout=CALL_SECONDS).status)


def test_a_worker_drains_when_it_is_told_to_end() -> None:
    case = GoldenCase.load("a_fit_small")
    with running_workers(model_dir("A"), "--grace-seconds", "60") as (worker,):
        assert health(worker) == health(worker, "homer.v1.Worker") == SERVING
        prompt = Prompt.of("drain", case.plan, case.parts)
        root = prompt.plan.root.id
        list(worker.stub.RunSubtree(prompt.subtree(root), timeout=CALL_SECONDS))
        call = worker.stub.GenerateTokens(prompt.generate([], 300), timeout=CALL_SECONDS)
        events = iter(call)
        next(events)

        worker.process.terminate()
        eventually(lambda: health(worker) == NOT_SERVING)
        new = Prompt.of("late", case.plan, case.parts)
        with pytest.raises(grpc.RpcError) as refused:
            list(worker.stub.RunSubtree(new.subtree(root), timeout=CALL_SECONDS))
        error = refused.value
        assert isinstance(error, grpc.Call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in (error.details() or "")

        rest = list(events)
        assert rest[-1].summary.generated_tokens == 300
        assert worker.process.wait(60) == 0


def test_calls_that_outlast_the_grace_are_stopped() -> None:
    case = GoldenCase.load("a_fit_small")
    with running_workers(model_dir("A"), "--grace-seconds", "0.2") as (worker,):
        prompt = Prompt.of("endless", case.plan, case.parts)
        list(worker.stub.RunSubtree(prompt.subtree(prompt.plan.root.id), timeout=CALL_SECONDS))
        call = worker.stub.GenerateTokens(prompt.generate([], 50_000), timeout=CALL_SECONDS)
        events = iter(call)
        next(events)
        worker.process.terminate()
        assert worker.process.wait(30) == 0
        with pytest.raises(grpc.RpcError):
            list(events)


def test_ready_is_said_in_one_line(workers: list[WorkerProcess]) -> None:
    words = workers[0].ready_line.split()
    assert words[:2] == ["homer-worker", "ready"]
    assert [word.split("=")[0] for word in words[2:]] == ["host", "port", "pid"]


def test_a_port_that_is_taken_is_an_error(workers: list[WorkerProcess]) -> None:
    port = workers[0].address.split(":")[1]
    done = subprocess.run(
        [sys.executable, "-m", "workers", "--model", str(model_dir("M")), "--port", port],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "free port" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_model_that_is_nowhere_is_said_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers", "--model", str(tmp_path / "none"), "--local-files-only"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_damaged_checkpoint_is_reported_by_a_worker_that_stays(tmp_path: Path) -> None:
    folder, log = tmp_path / "model", tmp_path / "log"
    shutil.copytree(model_dir("M"), folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    worker = WorkerProcess(folder, log=log)
    try:
        worker.wait_until_ready()
        assert worker.ready_line.startswith("homer-worker failed ")
        assert health(worker) == NOT_SERVING
        with pytest.raises(grpc.RpcError, match="is truncated") as refused:
            worker.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
        assert isinstance(refused.value, grpc.Call)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        (told,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
        assert f"{weights} is truncated: it has {len(whole) - 100:,} bytes" in told
        bias = folder / "bias.safetensors"
        bias.write_bytes(b"not a bias")
        weights.unlink()
        weights.write_bytes(whole)
        eventually(lambda: "readable bias file" in log.read_text(), 120)
        bias.unlink()
        while not worker.ready_line.startswith("homer-worker ready "):
            worker.wait_until_ready()
        assert health(worker) == SERVING
        assert worker.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest()).num_layers
    finally:
        worker.stop()


def test_a_worker_runs_without_ray() -> None:
    blocked = (
        "import sys; sys.modules['ray'] = None; import workers.server, workers.__main__; "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'cluster']"
    )
    subprocess.run([sys.executable, "-c", blocked], check=True, timeout=120)


def test_health_says_not_serving_while_the_model_loads() -> None:
    # The real server, whose load waits until it has been asked.
    program = """
import asyncio, threading
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from homer.v1 import worker_pb2, worker_pb2_grpc
from workers.engine import LoadedModel
from homer.load_options import LoadOptions
from workers.options import WorkerOptions
from workers.server import WorkerServer

asked, load = threading.Event(), LoadedModel.load
LoadedModel.load = lambda options: asked.wait(60) and load(options)

async def main(path):
    server = WorkerServer(WorkerOptions(model=path, load=LoadOptions(device="cpu"), threads=1))
    starting = asyncio.create_task(server.start())
    while not server.port:
        await asyncio.sleep(0.01)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        before = await check(health_pb2.HealthCheckRequest())
        try:
            await worker_pb2_grpc.WorkerStub(channel).GetWorkerInfo(
                worker_pb2.GetWorkerInfoRequest()
            )
        except grpc.aio.AioRpcError as error:
            print(error.code().name)
        asked.set()
        await starting
        after = await check(health_pb2.HealthCheckRequest())
        print(before.status, after.status)
    await server.stop()

import sys
asyncio.run(main(sys.argv[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_dir("M"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["UNAVAILABLE", str(int(NOT_SERVING)), str(int(SERVING))]


def test_options_come_from_the_dataclass() -> None:
    assert parse_options(["--model", "m"]) == WorkerOptions(model="m")
    given = parse_options(["--model", "m", "--port", "7", "--bias", "b", "--grace-seconds", "1.5"])
    assert given == WorkerOptions(model="m", port=7, bias="b", grace_seconds=1.5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"transport": "smoke"}, "use one of"), ({"peer_stall_seconds": 0.0}, "more than 0")],
)
def test_options_of_transfers_are_checked(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WorkerOptions(model="m", **wrong)


def test_a_dead_peer_is_noticed_soon(workers: list[WorkerProcess]) -> None:
    case = GoldenCase.load("a_2c_min")
    merger = workers[0]
    prompt = Prompt.of("dead-peer", case.plan, case.parts)
    root = prompt.plan.root
    left, right = root.children
    with running_workers(model_dir("A")) as (peer,):
        list(merger.stub.RunSubtree(prompt.subtree(left), timeout=CALL_SECONDS))
        list(peer.stub.RunSubtree(prompt.subtree(right), timeout=CALL_SECONDS))
        peer.process.kill()
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as failed:
            merger.stub.Merge(prompt.merge(root.id, ["", peer.address]), timeout=CALL_SECONDS)
    assert isinstance(failed.value, grpc.Call)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert peer.address in (failed.value.details() or "")
    # So that nobody takes the merger for dead.
    assert dict(failed.value.trailing_metadata())["homer-peer"] == peer.address
    assert time.monotonic() - started < 20
    release(prompt, [merger])


def test_the_transfer_bench_moves_everything_each_way() -> None:
    speed = measure(megabytes=16, runs=1)
    assert (speed.megabytes, speed.runs) == (16, 1)
    assert [name for name, _, _ in speed.rows] == [
        "raw TCP socket",
        "memory copy",
        "tensor stream, gRPC messages",
        "tensor stream, shared memory",
    ]
    for _, gb_per_second, ratio in speed.rows:
        assert ratio == gb_per_second / speed.raw_gb_per_second > 0
