"""How fast the tensor stream is, beside a raw TCP socket: two processes on loopback.

`python -m workers.bench`. Both ways move the same bytes into freshly allocated tensor memory; runs
alternate, and medians are compared.
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
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import numpy
import torch

from homer.v1 import worker_pb2
from workers.allocator import keep_frame_memory
from workers.peer import PeerPool, send_frames
from workers.tensor_stream import Limits, Spec, encode_stream
from workers.transport import SERVER_OPTIONS, SERVICE

TENSORS = 16


@dataclass(frozen=True)
class StreamSpeed:
    """Medians over the runs, in GB/s (10^9 bytes)."""

    megabytes: int
    runs: int
    raw_gb_per_second: float
    stream_gb_per_second: float
    # Median over pairs of neighbouring runs: what else the machine does hits both of a pair.
    ratio: float


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
    peers = PeerPool(lambda count: None)
    limits = Limits(total_bytes=total_bytes, tensors=TENSORS)
    raw: list[float] = []
    stream: list[float] = []
    # The first pair warms up both ways and is not counted.
    for _ in range(runs + 1):
        started = time.perf_counter()
        await asyncio.to_thread(_receive_raw, raw_port, total_bytes)
        raw.append(total_bytes / (time.perf_counter() - started) / 1e9)
        started = time.perf_counter()
        address, request = f"127.0.0.1:{grpc_port}", worker_pb2.FetchStateRequest()
        received = [
            named.tensor
            async for named in peers.pull(
                address, "FetchState", request, limits, check=lambda specs: None
            )
        ]
        stream.append(sum(t.nbytes for t in received) / (time.perf_counter() - started) / 1e9)
        del received
    await peers.close()
    pairs = list(zip(raw, stream, strict=True))[1:]
    return StreamSpeed(
        megabytes=megabytes,
        runs=runs,
        raw_gb_per_second=statistics.median(pair[0] for pair in pairs),
        stream_gb_per_second=statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(pair[1] / pair[0] for pair in pairs),
    )


def _receive_raw(port: int, total_bytes: int) -> None:
    memory = numpy.empty(total_bytes, dtype=numpy.uint8).data
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"x")
        filled = 0
        while filled < total_bytes:
            count = connection.recv_into(memory[filled:])
            if not count:
                raise ConnectionError("the raw sender closed the connection early")
            filled += count


async def _serve(megabytes: int) -> None:
    total_bytes = megabytes << 20
    tensors = [torch.ones(total_bytes // TENSORS // 4) for _ in range(TENSORS)]
    specs = [Spec(f"tensor.{i}", t.dtype, tuple(t.shape)) for i, t in enumerate(tensors)]
    executor = ThreadPoolExecutor(1)

    async def fetch(request: bytes, context: object) -> AsyncIterator[bytes]:
        async for frame in send_frames(encode_stream(specs, tensors), executor, lambda count: None):
            yield frame

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler: grpc.RpcMethodHandler = grpc.unary_stream_rpc_method_handler(fetch)
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
    print(f"raw TCP socket  {speed.raw_gb_per_second:5.2f} GB/s")
    print(f"tensor stream   {speed.stream_gb_per_second:5.2f} GB/s")
    print(f"ratio           {speed.ratio:5.2f}")


if __name__ == "__main__":
    main()
