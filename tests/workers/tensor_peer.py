"""A process that sends tensor streams, and one that receives them and stops: for tests.

`python -m tests.workers.tensor_peer` serves `FetchState` as a worker does. The request id says what
to send and what goes wrong: it is `Scenario` as JSON. `--receive PORT` pulls from such a process,
says so when the first tensor is there, and takes no more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import grpc
import torch

from homer.v1 import worker_pb2
from workers.carrier import Outlet
from workers.frames import Packed
from workers.memory import resident_bytes
from workers.peer import PeerPool, choose_outlet, send_tensors
from workers.tensor_stream import Limits, Spec
from workers.transport import SERVER_OPTIONS, SERVICE


@dataclass(frozen=True)
class Scenario:
    """Tensors of (type, shape), and a fault that the first `times` streams of this `key` have.

    Faults come after the first piece: "damage" turns a bit, "stall" sends no more, "cut" ends the
    stream early, "die" ends the process.
    """

    tensors: Sequence[tuple[str, Sequence[int]]]
    fault: str = ""
    times: int = 0
    key: str = ""

    @property
    def request(self) -> worker_pb2.FetchStateRequest:
        return worker_pb2.FetchStateRequest(request_id=json.dumps(asdict(self)))

    @property
    def specs(self) -> list[Spec]:
        return [
            Spec(f"t{number}", getattr(torch, dtype), tuple(shape))
            for number, (dtype, shape) in enumerate(self.tensors)
        ]

    @property
    def limits(self) -> Limits:
        return Limits(sum(spec.nbytes for spec in self.specs), len(self.specs))

    def make(self) -> Iterator[torch.Tensor]:
        """The tensors, one at a time, any bits in them."""
        for number, spec in enumerate(self.specs):
            pattern = torch.arange(number, number + 251, dtype=torch.int64).to(torch.uint8)
            flat = pattern.repeat(spec.nbytes // 251 + 1)[: spec.nbytes].clone()
            yield flat.view(spec.dtype).view(spec.shape)


class _Faulty:
    """An outlet with a fault after its first piece."""

    def __init__(self, inner: Outlet, fault: str) -> None:
        self._inner, self._fault, self._sent = inner, fault, 0
        self.piece_bytes = inner.piece_bytes

    async def room(self) -> None:
        if self._fault == "stall" and self._sent:
            await asyncio.Event().wait()
        await self._inner.room()

    def pack(self, parts: Sequence[memoryview], checksum: int) -> Packed:
        self._sent += 1
        if self._fault == "damage" and self._sent == 2:
            first = bytearray(parts[0])
            first[len(first) // 2] ^= 4
            parts = [memoryview(first), *parts[1:]]
        return self._inner.pack(parts, checksum)


async def serve() -> None:
    executor = ThreadPoolExecutor(1)
    sent = 0
    calls: Counter[str] = Counter()

    def count(crossing_bytes: int) -> None:
        nonlocal sent
        sent += crossing_bytes

    async def fetch(request: worker_pb2.FetchStateRequest, context: object) -> AsyncIterator[bytes]:
        scenario = Scenario(**json.loads(request.request_id))
        calls[scenario.key] += 1
        fault = scenario.fault if calls[scenario.key] <= scenario.times else ""
        outlet = _Faulty(choose_outlet(request.transfer), fault)
        number = 0
        async for message in send_tensors(scenario.specs, scenario.make(), outlet, executor, count):
            if number == 2 and fault == "cut":
                return
            if number == 2 and fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            yield message
            number += 1

    async def stats(
        request: worker_pb2.GetWorkerStatsRequest, context: object
    ) -> worker_pb2.GetWorkerStatsResponse:
        return worker_pb2.GetWorkerStatsResponse(
            sent_bytes=sent, resident_bytes=resident_bytes(), running_calls=sum(calls.values())
        )

    handlers: dict[str, grpc.RpcMethodHandler] = {
        "FetchState": grpc.unary_stream_rpc_method_handler(
            fetch, request_deserializer=worker_pb2.FetchStateRequest.FromString
        ),
        "GetWorkerStats": grpc.unary_unary_rpc_method_handler(
            stats,
            request_deserializer=worker_pb2.GetWorkerStatsRequest.FromString,
            response_serializer=worker_pb2.GetWorkerStatsResponse.SerializeToString,
        ),
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),)
    )
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    # Whoever started this process closes the pipe, also by dying.
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


async def receive(port: int, share_memory: bool) -> None:
    scenario = Scenario(BIG)
    peers = PeerPool(lambda count: None, share_memory=share_memory)
    pulling = peers.pull(
        f"127.0.0.1:{port}", "FetchState", scenario.request, scenario.limits, lambda specs: None
    )
    async for _ in pulling:
        print("first", flush=True)
        await asyncio.to_thread(sys.stdin.read)


# Far more than any carrier may hold on its own.
BIG = [("float32", [4 << 20])] * 16


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--receive", type=int, default=0)
    parser.add_argument("--share-memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.receive:
        asyncio.run(receive(arguments.receive, arguments.share_memory))
    else:
        asyncio.run(serve())
