"""`python -m tests.chaos.leaks`: requests of mixed fates, and what they leave behind.

A service with its door, worker processes, and clients over gRPC. After a warm-up, requests finish,
are cancelled, run out of time, are refused, fail, and lose a worker. Then every worker must hold
nothing, and neither workers nor the service may have grown. Ends with 1 when that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

# Before anything imports gRPC: what is started here starts another program at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from rich.console import Console
from rich.table import Table

from cluster.door import GrpcDoor
from cluster.errors import WorkerCallError
from cluster.job import Job
from cluster.scheduler import Scheduler
from cluster.service import Limits, LongContextService
from cluster.text import PromptTokenizer
from homer.demo import MODEL_DIR
from homer.shape import homer_defaults
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc, sampling_pb2
from tests.chaos.campaign import OPTIONS, held
from tests.chaos.faults import Phase
from tests.chaos.fleet import Fleet, Seat
from tests.chaos.hosts import LoopbackHost
from tests.chaos.traffic import Question, questions

WORKERS = 3
CLIENTS = 4
LENGTHS = (700, 2000, 4000)
MAX_CONTEXT_TOKENS = 8000
# The most that a process may grow from the end of the warm-up to the end: what an allocator keeps
# varies by this much, and 300 requests that each left one state of a node behind would be above it.
GROWTH_BYTES = 24 << 20
CLIENT_SECONDS = 120.0
FAILING = "failing-"


class Fate(StrEnum):
    """What becomes of a request."""

    FINISHED = "finished"
    CANCELLED = "cancelled by the client"
    DEADLINE = "out of time"
    REFUSED = "refused"
    FAILED = "failed"
    KILLED = "finished, a worker killed"


_PACK = [
    *[Fate.FINISHED] * 6,
    *[Fate.CANCELLED] * 5,
    *[Fate.DEADLINE] * 4,
    *[Fate.REFUSED] * 2,
    *[Fate.FAILED] * 2,
    Fate.KILLED,
]


@dataclass
class Leaks:
    """What came of the requests, and what is left."""

    fates: Counter[Fate] = field(default_factory=Counter)
    # Requests that met another fate than was meant for them, which can be no accident.
    astray: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    # Resident bytes of each process after the warm-up and at the end.
    resident: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def grown(self) -> list[str]:
        return [
            f"{name} grew by {(after - before) / 2**20:.1f} MiB"
            for name, (before, after) in self.resident.items()
            if after - before > GROWTH_BYTES
        ]

    @property
    def good(self) -> bool:
        return not (self.astray or self.held or self.grown)


def fail_marked(job: Job, phase: Phase, worker: str, others: Sequence[str]) -> None:
    """Let a call of a request fail that is marked for it, as a worker's own fault would."""
    if job.request_id.startswith(FAILING) and phase in (Phase.TRANSFER, Phase.GATHER):
        raise WorkerCallError(f"worker {worker}: a fault made for this request")


class Client:
    """Asks for answers at a door, and sees to it that each request meets its fate."""

    def __init__(self, address: str, asked: Sequence[Question], victim: Seat, out: Leaks) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = long_context_pb2_grpc.LongContextStub(self._channel)
        self._questions = asked
        self._victim = victim
        self._out = out

    async def ask(self, name: str, fate: Fate, draw: random.Random) -> None:
        question = draw.choice(self._questions)
        request = wire_request(question, name)
        after = draw.uniform(0, 0.8)
        seconds = CLIENT_SECONDS
        if fate is Fate.DEADLINE:
            seconds = draw.uniform(0.005, 0.4)
        elif fate is Fate.REFUSED:
            spoil(request, draw)
        elif fate is Fate.FAILED:
            request.request_id = FAILING + name
        tokens: list[int] = []
        call: Any = self._stub.Generate(request, timeout=seconds)
        asyncio.get_running_loop().call_later(after, self._strike, fate, call)
        try:
            async for response in call:
                if response.WhichOneof("event") == "token":
                    tokens.append(response.token.token_id)
            code = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            code = error.code()
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            code = grpc.StatusCode.CANCELLED
        self._judge(name, fate, code, tokens, question)

    async def close(self) -> None:
        await self._channel.close()

    def _strike(self, fate: Fate, call: Any) -> None:
        if fate is Fate.CANCELLED:
            call.cancel()
        elif fate is Fate.KILLED:
            self._victim.signal(signal.SIGKILL)

    def _judge(
        self, name: str, fate: Fate, code: grpc.StatusCode, tokens: list[int], question: Question
    ) -> None:
        expected = {
            Fate.FINISHED: {grpc.StatusCode.OK},
            # They may be done before.
            Fate.CANCELLED: {grpc.StatusCode.CANCELLED, grpc.StatusCode.OK},
            Fate.DEADLINE: {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK},
            Fate.REFUSED: {grpc.StatusCode.INVALID_ARGUMENT},
            Fate.FAILED: {grpc.StatusCode.INTERNAL},
            Fate.KILLED: {grpc.StatusCode.OK},
        }
        if code not in expected[fate]:
            self._out.astray.append(f"{name}, to be {fate}: {code.name}")
        elif code is grpc.StatusCode.OK and tokens != question.tokens:
            self._out.astray.append(f"{name}: tokens {tokens}, not {question.tokens}")
        # A fate that came too late is none.
        too_late = code is grpc.StatusCode.OK and fate is not Fate.KILLED
        self._out.fates[Fate.FINISHED if too_late else fate] += 1


def wire_request(question: Question, name: str) -> pb.GenerateRequest:
    sampling = question.sampling
    return pb.GenerateRequest(
        request_id=name,
        tokens=pb.TokenPrompt(
            prefix_ids=question.ids.prefix,
            context_ids=question.ids.context,
            suffix_ids=question.ids.suffix,
        ),
        sampling=sampling_pb2.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            ignore_eos=True,
        ),
    )


def spoil(request: pb.GenerateRequest, draw: random.Random) -> None:
    """Make a mistake that the service refuses."""
    match draw.randrange(3):
        case 0:
            request.tokens.context_ids[0] = 1 << 20
        case 1:
            request.request_id = "x" * 1000
        case _:
            request.tokens.context_ids.extend([5] * MAX_CONTEXT_TOKENS)


async def run(requests: int, warm_up: int, seed: int, log: Path) -> Leaks:
    """Let `warm_up` and then `requests` requests meet their fates."""
    out = Leaks()
    asked = questions(LENGTHS, new_tokens=24)
    scheduler = Scheduler(options=OPTIONS)
    draw = random.Random(seed)
    hosts = [LoopbackHost(f"worker-{n}", draw) for n in range(WORKERS)]
    with log.open("ab") as file:
        async with Fleet(scheduler, hosts, MODEL_DIR, fail_marked, file) as fleet:
            first = fleet.seats[0].client
            assert first is not None
            service = LongContextService(
                scheduler,
                await first.info(),
                homer_defaults(MODEL_DIR),
                PromptTokenizer.load(str(MODEL_DIR)),
                Limits(context_tokens=MAX_CONTEXT_TOKENS),
            )
            door = GrpcDoor("127.0.0.1", 0, service.limits)
            client = Client(f"127.0.0.1:{await door.listen()}", asked, fleet.seats[-1], out)
            await door.serve(service)
            try:
                await meet_fates(client, "warm", warm_up, draw)
                before = await settled(fleet, scheduler, out)
                await meet_fates(client, "request", requests, draw)
                after = await settled(fleet, scheduler, out)
            finally:
                await client.close()
                await door.stop()
    # The victim is another process now.
    out.resident = {name: (size, after[name]) for name, size in before.items() if name in after}
    return out


async def meet_fates(client: Client, name: str, count: int, draw: random.Random) -> None:
    """`count` requests, some at a time."""
    fates: list[Fate] = []
    while len(fates) < count:
        fates += draw.sample(_PACK, len(_PACK))
    waiting = list(enumerate(fates[:count]))[::-1]

    async def one_after_the_other() -> None:
        while waiting:
            number, fate = waiting.pop()
            await client.ask(f"{name}-{number}", fate, random.Random(f"{name} {number}"))

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(one_after_the_other())


async def settled(fleet: Fleet, scheduler: Scheduler, out: Leaks) -> dict[str, int]:
    """Wait until nothing runs; returns the resident bytes of every process."""
    deadline = time.monotonic() + CLIENT_SECONDS
    while not fleet.whole and time.monotonic() < deadline:
        fleet.check()
        await asyncio.sleep(0.05)
    await scheduler.drain()
    out.held += await held(fleet.seats)
    if scheduler.running_jobs or scheduler.queued_jobs:
        out.held.append(f"the scheduler has {scheduler.load}")
    gc.collect()
    sizes = {seat.name: resident_bytes(seat.pid) for seat in fleet.seats if seat.pid}
    return {**sizes, "service": resident_bytes("self")}


def resident_bytes(pid: int | str) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def show(out: Leaks, console: Console) -> None:
    fates = Table(title=f"{sum(out.fates.values())} requests")
    fates.add_column("fate")
    fates.add_column("requests", justify="right")
    for fate in Fate:
        fates.add_row(fate, str(out.fates[fate]))
    console.print(fates)
    sizes = Table(title="resident memory, MiB")
    for column in ("process", "after the warm-up", "at the end", "growth"):
        sizes.add_column(column, justify="left" if column == "process" else "right")
    for name, (before, after) in out.resident.items():
        mib = [f"{size / 2**20:.1f}" for size in (before, after, after - before)]
        sizes.add_row(name, *mib)
    console.print(sizes)
    for text in (*out.astray, *out.held, *out.grown):
        console.print(text, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.leaks", description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    log = Path(tempfile.mkdtemp(prefix="homer-leaks-")) / "log"
    logging.basicConfig(filename=log, level=logging.INFO)
    out = asyncio.run(run(options.requests, options.warm_up, options.seed, log))
    show(out, Console())
    return 0 if out.good else 1


if __name__ == "__main__":
    sys.exit(main())
