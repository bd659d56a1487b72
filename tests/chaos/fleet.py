"""Worker processes on hosts, and what a pool does for them: what died is started again, what was
fenced and can be reached again is emptied and taken back.

Knows nothing about faults or requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from cluster.errors import WorkerCallError, WorkerLostError
from cluster.scheduler import Scheduler
from tests.chaos.hosts import Host
from tests.chaos.watch import Entered, WatchedClient
from tests.forked import ForkedProgram
from workers.options import TRANSPORTS

_log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 120.0
ANSWER_SECONDS = 2.0
# A worker that others cannot reach is noticed while a fault lasts.
PEER_STALL_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ForkedWorker:
    """What `asyncio.subprocess.Process` is, for a worker that starts at once."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str], log: IO[bytes]) -> None:
        self._program = ForkedProgram("workers.__main__", arguments, env, log)
        self.pid = self._program.pid
        self.stdout = self
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._program.sentinel, self._end)

    @property
    def returncode(self) -> int | None:
        return self._program.poll()

    async def readline(self) -> bytes:
        return (await asyncio.to_thread(self._program.stdout.readline)).encode()

    async def wait(self) -> int:
        await self._ended.wait()
        return self._program.wait()

    def kill(self) -> None:
        self._program.kill()

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._program.sentinel)
        self._ended.set()


class Seat:
    """A host and the worker on it, one incarnation after the other."""

    def __init__(
        self, host: Host, arguments: Sequence[str], entered: Entered, log: IO[bytes]
    ) -> None:
        self.host = host
        self.name = host.name
        self.client: WatchedClient | None = None
        self.process: asyncio.subprocess.Process | ForkedWorker | None = None
        # The worker's own, which may be a child of what was started.
        self.pid: int | None = None
        # Set when the scheduler gave it up, whatever its process does.
        self.given_up = asyncio.Event()
        self._arguments = arguments
        self._entered = entered
        self._log = log
        self._incarnation = 0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: int) -> None:
        """Send a signal, if there is still somebody to get it."""
        if self.alive and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def start(self) -> None:
        """Start a process, and connect to it."""
        self.pid = None
        arguments = [*self._arguments, "--host", self.host.listen, "--insecure-no-token"]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        if self.host.prefix:
            self.process = await asyncio.create_subprocess_exec(
                *self.host.prefix,
                *(sys.executable, "-m", "workers", *arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=self._log,
                cwd=REPOSITORY,
                preexec_fn=_die_with_parent,
                env=env,
            )
        else:
            self.process = ForkedWorker(arguments, env, self._log)
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), START_SECONDS)
        if not line:
            status = await self.process.wait()
            if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
                return await self.start()
            raise RuntimeError(f"{self.name} ended with status {status}")
        words = dict(word.split("=", 1) for word in line.decode().split() if "=" in word)
        self.pid = _innermost(self.process.pid)
        self._addresses = await self.host.expose(int(words["port"]))
        await self.connect()

    async def connect(self) -> None:
        """A client under a new name: the scheduler knows every incarnation by its own."""
        await self.disconnect()
        self.name = f"{self.host.name}.{self._incarnation}" if self._incarnation else self.host.name
        self._incarnation += 1
        self.given_up.clear()
        self.client = WatchedClient(self.name, *self._addresses, self._entered)

    async def disconnect(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.close()

    async def stop(self) -> None:
        await self.disconnect()
        if self.process is not None and self.process.returncode is None:
            # A stopped process hears nothing else.
            self.signal(signal.SIGKILL)
            if self.pid is None:
                self.process.kill()
            await self.process.wait()
        await self.host.close()


class Fleet:
    """A worker on each of `hosts`, kept in `scheduler`.

    Parameters
    ----------
    scheduler : Scheduler
        Gets its workers from here.
    hosts : sequence of Host
    model : Path
    entered : callable
        Told when a call begins a phase.
    log : file
        Where the workers' own words go.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        hosts: Sequence[Host],
        model: Path,
        entered: Entered,
        log: IO[bytes],
    ) -> None:
        self._scheduler = scheduler
        arguments = ["--model", str(model), "--threads", "1", "--device", "cpu"]
        arguments += ["--dtype", "float32"]
        arguments += ["--peer-stall-seconds", str(PEER_STALL_SECONDS)]
        # Both ways for tensors to come, where there are both.
        transports = [("--transport", name) for name in TRANSPORTS]
        self.seats = [
            Seat(host, [*arguments, *transport], entered, log)
            for host, transport in zip(hosts, itertools.cycle(transports), strict=False)
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self.restarts = 0
        self.readmissions = 0
        self.on_lost: Callable[[str], None] | None = None
        scheduler.on_worker_lost = self._lost

    @property
    def serving(self) -> list[Seat]:
        """Those that the scheduler may give work to."""
        names = {worker.name for worker in self._scheduler.workers}
        return [seat for seat in self.seats if seat.alive and seat.name in names]

    @property
    def whole(self) -> bool:
        return len(self.serving) == len(self.seats)

    def by_name(self, name: str) -> Seat | None:
        return next((seat for seat in self.seats if seat.name == name), None)

    def by_address(self, address: str) -> Seat | None:
        return next(
            (seat for seat in self.seats if seat.client and seat.client.address == address), None
        )

    async def __aenter__(self) -> Fleet:
        try:
            await asyncio.gather(*(seat.start() for seat in self.seats))
            for seat in self.seats:
                assert seat.client is not None
                self._scheduler.add_worker(seat.client)
        except BaseException:
            await self.__aexit__()
            raise
        self._tasks = [asyncio.create_task(self._keep(seat)) for seat in self.seats]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for seat in self.serving:
            self._scheduler.lose_worker(seat.name, "the run is over")
        await self._scheduler.close()
        await asyncio.gather(*(seat.stop() for seat in self.seats))

    def check(self) -> None:
        """Raise what ended the care for a worker, if anything did."""
        for task in self._tasks:
            if task.done():
                task.result()

    def _lost(self, name: str, reason: str) -> None:
        _log.info("%s is given up: %s", name, reason)
        if seat := self.by_name(name):
            seat.given_up.set()
        if self.on_lost is not None:
            self.on_lost(name)

    async def _keep(self, seat: Seat) -> None:
        while True:
            await self._either(seat.given_up, seat)
            if seat.alive:
                await self._reachable(seat)
            if not seat.alive:
                assert seat.process is not None
                name, status = seat.name, seat.process.returncode
                await seat.disconnect()
                if not seat.given_up.is_set():
                    self._scheduler.lose_worker(name, f"its process ended with status {status}")
                await seat.start()
                self.restarts += 1
            else:
                await seat.connect()
                self.readmissions += 1
            assert seat.client is not None
            self._scheduler.add_worker(seat.client)

    async def _either(self, event: asyncio.Event, seat: Seat) -> None:
        """Wait for `event` or the end of the process."""
        assert seat.process is not None
        waiting = [
            asyncio.create_task(event.wait()),
            asyncio.create_task(seat.process.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def _reachable(self, seat: Seat) -> None:
        """Wait until a fenced worker is emptied, or dead."""
        while seat.alive:
            assert seat.client is not None
            try:
                await asyncio.wait_for(seat.client.reset(), ANSWER_SECONDS)
            except (WorkerLostError, WorkerCallError, TimeoutError):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ended(seat), 0.1)
            else:
                return

    async def _ended(self, seat: Seat) -> None:
        assert seat.process is not None
        await seat.process.wait()


def _innermost(pid: int) -> int:
    """The process at the end of a chain of commands that each start the next."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        (pid,) = map(int, children)
    return pid


def _die_with_parent() -> None:
    """No worker outlives a run, whatever ends it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
