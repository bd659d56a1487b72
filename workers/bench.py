"""How fast the tensor stream is, beside a raw TCP socket and a copy in memory.

`python -m workers.bench`: two processes on loopback. Each way puts the same bytes into freshly
allocated memory; runs alternate, and medians are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import numpy
import torch

from homer.v1 import worker_pb2
from workers.allocator import keep_frame_memory
from workers.peer import PeerPool, choose_outlet, send_tensors
from workers.tensor_stream import Limits, Spec
from workers.transport import SERVER_OPTIONS, SERVICE

TENSORS = 16


@dataclass(frozen=True)
class StreamSpeed:
    """Medians over the runs, in GB/s (10^9 bytes)."""

    megabytes: int
    runs: int
    raw_gb_per_second: float
    copy_gb_per_second: float
    stream_gb_per_second: float
    shared_gb_per_second: float
    # Medians over rounds of neighbouring runs: what else the machine does hits all of a round.
    copy_ratio: float
    ratio: float
    shared_ratio: float

    @property
    def rows(self) -> list[tuple[str, float, float]]:
        """Each way's name, speed, and speed in terms of the raw socket's."""
        return [
            ("raw TCP socket", self.raw_gb_per_second, 1.0),
            ("memory copy", self.copy_gb_per_second, self.copy_ratio),
            ("tensor stream, gRPC messages", self.stream_gb_per_second, self.ratio),
            ("tensor stream, shared memory", self.shared_gb_per_second, self.shared_ratio),
        ]


def measure(megabytes: int = 512, runs: int = 9) -> StreamSpeed:
    """Move `megabytes` MiB from another process, `runs` times each way in turn."""
    keep_frame_memory()
    command = [sys.executable, "-m", "workers.bench", "--serve", "--megabytes", str(megabytes)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        try:
            grpc_port, raw_port = (int(port) for port in child.stdout.readline().split())
            return asyncio.run(_compare(megabytes, runs, grpc_port, raw_port))
        finally:
            child.terminate()


async def _compare(megabytes: int, runs: int, grpc_port: int, raw_port: int) -> StreamSpeed:
    total_bytes = megabytes << 20
    by_message = PeerPool(lambda count: None, share_memory=False)
    by_memory = PeerPool(lambda count: None)
    payload = numpy.ones(total_bytes, dtype=numpy.uint8)
    ways: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: asyncio.to_thread(_receive_raw, raw_port, total_bytes),
        lambda: asyncio.to_thread(payload.copy),
        lambda: _receive_stream(by_message, grpc_port, total_bytes),
        lambda: _receive_stream(by_memory, grpc_port, total_bytes),
    )
    # The first round warms up every way and is not counted.
    rounds = [[await _speed(way, total_bytes) for way in ways] for _ in range(runs + 1)][1:]
    await by_message.close()
    await by_memory.close()
    raw, copy, stream, shared = (
        statistics.median(one[number] for one in rounds) for number in range(len(ways))
    )
    copy_ratio, ratio, shared_ratio = (
        statistics.median(one[number] / one[0] for one in rounds) for number in range(1, len(ways))
    )
    return StreamSpeed(
        megabytes=megabytes,
        runs=runs,
        raw_gb_per_second=raw,
        copy_gb_per_second=copy,
        stream_gb_per_second=stream,
        shared_gb_per_second=shared,
        copy_ratio=copy_ratio,
        ratio=ratio,
        shared_ratio=shared_ratio,
    )


async def _speed(way: Callable[[], Awaitable[object]], total_bytes: int) -> float:
    started = time.perf_counter()
    received = await way()
    seconds = time.perf_counter() - started
    del received
    return total_bytes / seconds / 1e9


async def _receive_stream(peers: PeerPool, port: int, total_bytes: int) -> list[torch.Tensor]:
    pulling = peers.pull(
        f"127.0.0.1:{port}",
        "FetchState",
        worker_pb2.FetchStateRequest(),
        Limits(total_bytes=total_bytes, tensors=TENSORS),
        check=lambda specs: None,
    )
    return [named.tensor async for named in pulling]


def _receive_raw(port: int, total_bytes: int) -> object:
    memory = numpy.empty(total_bytes, dtype=numpy.uint8).data
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"x")
        filled = 0
        while filled < total_bytes:
            count = connection.recv_into(memory[filled:])
            if not count:
                raise ConnectionError("the raw sender closed the connection early")
            filled += count
    return memory


async def _serve(megabytes: int) -> None:
    total_bytes = megabytes << 20
    tensors = [torch.ones(total_bytes // TENSORS // 4) for _ in range(TENSORS)]
    specs = [Spec(f"tensor.{i}", t.dtype, tuple(t.shape)) for i, t in enumerate(tensors)]
    executor = ThreadPoolExecutor(1)

    async def fetch(request: worker_pb2.FetchStateRequest, context: object) -> AsyncIterator[bytes]:
        outlet = choose_outlet(request.transfer)
        async for message in send_tensors(specs, tensors, outlet, executor, lambda count: None):
            yield message

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler: grpc.RpcMethodHandler = grpc.unary_stream_rpc_method_handler(
        fetch, request_deserializer=worker_pb2.FetchStateRequest.FromString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE.full_name, {"FetchState": handler}),)
    )
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_raw, args=(listener, total_bytes), daemon=True).start()
    print(grpc_port, listener.getsockname()[1], flush=True)
    # The other process closes this pipe, also when it dies.
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def _serve_raw(listener: socket.socket, total_bytes: int) -> None:
    payload = numpy.ones(total_bytes, dtype=numpy.uint8).data
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1)
            connection.sendall(payload)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.bench", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512, help="MiB per run")
    parser.add_argument("--runs", type=int, default=9, help="runs each way")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        keep_frame_memory()
        asyncio.run(_serve(arguments.megabytes))
        return
    speed = measure(arguments.megabytes, arguments.runs)
    print(f"{speed.megabytes} MiB between two processes on loopback, median of {speed.runs} runs")
    for way, gb_per_second, ratio in speed.rows:
        print(f"{way:30} {gb_per_second:5.2f} GB/s  {ratio:5.2f} of raw TCP")


if __name__ == "__main__":
    main()
