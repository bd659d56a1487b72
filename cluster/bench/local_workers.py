"""Worker processes on this machine, without Ray: as `python -m workers` starts them.

Ray places and restarts workers and has no part in a request's way through them, so that what is
measured here holds with it as well. Knows nothing about what is measured.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import PlacementError
from cluster.worker_client import GrpcWorkerClient

START_SECONDS = 120.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class LocalWorker:
    """A worker that is ready."""

    name: str
    address: str
    pid: int


@contextmanager
def local_workers(
    model: Path, count: int, *options: str, threads: int = 1, dtype: str = "float32"
) -> Iterator[list[LocalWorker]]:
    """`count` workers on the CPU, started side by side and ended at the end.

    Raises
    ------
    PlacementError
        When one of them does not start.
    """
    command = [sys.executable, "-m", "workers", "--model", str(model), "--device", "cpu"]
    command += ["--dtype", dtype, "--threads", str(threads), *options]
    # Not only torch's own threads: every library that reads this.
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(count)
    ]
    try:
        yield [_ready(process, f"worker-{number}") for number, process in enumerate(processes)]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@asynccontextmanager
async def connected(workers: Sequence[LocalWorker]) -> AsyncIterator[list[GrpcWorkerClient]]:
    """Clients of `workers`, for the event loop that runs now."""
    clients = [GrpcWorkerClient(worker.name, worker.address) for worker in workers]
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


def _ready(process: subprocess.Popen[str], name: str) -> LocalWorker:
    """Wait for the line that a worker prints once it serves."""
    assert process.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise PlacementError(f"{name} did not start within {START_SECONDS:g} seconds")
    line = process.stdout.readline()
    if not line.startswith("homer-worker ready "):
        said = "ended" if not line else "cannot load the model"
        raise PlacementError(
            f"{name} {said} before it was ready; run python -m workers by hand to see why"
        )
    words = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return LocalWorker(name, f"{words['host']}:{words['port']}", int(words["pid"]))
