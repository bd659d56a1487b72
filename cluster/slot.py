"""One slot of the pool: keeps one worker alive, in one process after another.

Watches the actor, starts each of its processes, tells the scheduler of it as a worker of its own,
and ends what was given up. Knows nothing about the other workers or about requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from cluster.errors import PlacementError, WorkerCallError, WorkerLostError
from cluster.job import WorkerClient
from cluster.options import ServeOptions
from cluster.worker_actor import WorkerProcess
from cluster.worker_client import GrpcWorkerClient
from homer.errors import BiasError, CheckpointError, HomerError

_log = logging.getLogger(__name__)

SlotState = Literal["placing", "loading", "serving", "failed"]

# Ray restarts an actor in about a second.
RETRY_SECONDS = 0.2
# A process that was given up and does not answer by then is ended; so is one that does answer.
PROBE_SECONDS = 2.0
KILL_SECONDS = 10.0
# A worker whose process dies before it serves is tried so often before a new service gives up.
START_ATTEMPTS = 3
FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 60.0


def backoff_seconds(failures: int) -> float:
    """How long to wait before the next try after so many failed ones."""
    # Past 2**16 seconds the longest holds anyhow.
    doubled: float = FIRST_BACKOFF_SECONDS * 2 ** min(failures - 1, 16)
    return min(doubled, LONGEST_BACKOFF_SECONDS)


class Members(Protocol):
    """Who is told of workers: the scheduler."""

    def add_worker(self, client: WorkerClient, layers: int | None = None) -> None: ...

    def lose_worker(self, name: str, reason: str) -> None: ...


class Slot:
    """Worker `number`. Run it in one event loop.

    Attributes
    ----------
    state : SlotState
    reason : str
        Why the worker does not serve.
    client : GrpcWorkerClient or None
        While it serves.
    node_id : str
        Ray's id of the node where it serves.
    placed, started : asyncio.Future
        Done when the worker was placed, and when it served, for the first time. `started` fails
        when it cannot; the slot tries again all the same.
    retiring : bool
        A worker that ends is not replaced any more.
    """

    def __init__(
        self, number: int, options: ServeOptions, keeper: Any, toward: str, members: Members
    ) -> None:
        self.number = number
        self.state: SlotState = "placing"
        self.reason = ""
        self.client: GrpcWorkerClient | None = None
        self.node_id = ""
        self.retiring = False
        loop = asyncio.get_running_loop()
        self.placed: asyncio.Future[None] = loop.create_future()
        self.started: asyncio.Future[None] = loop.create_future()
        # Nobody needs to wait for it.
        self.started.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._options = options
        self._keeper = keeper
        self._toward = toward
        self._members = members
        self._actor: Any = None
        self._given_up: set[str] = set()
        self._fenced: asyncio.Future[str] = loop.create_future()

    def fence(self, reason: str) -> None:
        """Give up the process that serves now: it is ended, and another one takes its place."""
        if not self._fenced.done():
            self._fenced.set_result(reason)

    async def run(self) -> None:
        """Keep the worker alive until this is cancelled, or until it ends while retiring."""
        failures = 0
        while not self.retiring:
            actor: Any = None
            try:
                actor, process = await self._next_process()
                self.state = "loading"
                client, layers = await self._start(actor, process)
                failures = 0
                reason = await self._serve(actor, process, client, layers)
                self._tell(reason)
            except (HomerError, RayError, TimeoutError) as error:
                failures += 1
                await self._failed(cause_of(error), failures, actor)

    async def stop(self) -> None:
        """Let the worker drain and end, where it ever served."""
        if self._actor is not None:
            await result(self._actor.stop.remote())

    async def _next_process(self) -> tuple[Any, WorkerProcess]:
        """Wait for a process that was not given up yet; end one that was."""
        patience = PROBE_SECONDS if self._given_up else None
        while True:
            actor = await result(
                self._keeper.worker.remote(self.number, self._options, self._toward)
            )
            try:
                process: WorkerProcess = await asyncio.wait_for(
                    result(actor.process.remote()), patience
                )
            except ActorUnavailableError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except ActorDiedError:
                # For good: its owner has gone, or it was ended from outside.
                await result(self._keeper.replace.remote(self.number))
                raise
            except TimeoutError:
                ray.kill(actor, no_restart=False)
                patience = KILL_SECONDS
                continue
            if process.id not in self._given_up:
                if not self.placed.done():
                    self.placed.set_result(None)
                return actor, process
            ray.kill(actor, no_restart=False)
            await asyncio.sleep(RETRY_SECONDS)

    async def _start(
        self, actor: Any, process: WorkerProcess
    ) -> tuple[GrpcWorkerClient, int | None]:
        """A client of the process, and how many of the lowest layers it has; None is all."""
        name = await result(self._keeper.name.remote(self.number, process.id))
        # Whatever becomes of it, this process serves once.
        self._given_up.add(process.id)
        seconds = self._options.start_timeout_seconds
        try:
            address = await asyncio.wait_for(result(actor.start.remote(name)), seconds)
        except TimeoutError:
            raise PlacementError(
                f"{name} did not load {self._options.model} within {seconds:g} seconds"
            ) from None
        client = GrpcWorkerClient(name, address, self._options.worker_credentials)
        try:
            # What it holds is from before the coordinator died.
            await client.reset()
            return client, (await client.info()).lowest_layers
        except (WorkerCallError, WorkerLostError):
            await client.close()
            raise

    async def _serve(
        self, actor: Any, process: WorkerProcess, client: GrpcWorkerClient, layers: int | None
    ) -> str:
        """Let the worker work until it ends or is fenced; returns why."""
        self._actor = actor
        ended = asyncio.ensure_future(result(actor.until_ended.remote()))
        self._fenced = asyncio.get_running_loop().create_future()
        self.client, self.state, self.reason = client, "serving", ""
        self.node_id = process.node_id
        _log.info("%s serves at %s as process %d", client.name, client.address, process.process_id)
        self._members.add_worker(client, layers)
        if not self.started.done():
            self.started.set_result(None)
        try:
            await asyncio.wait({ended, self._fenced}, return_when=asyncio.FIRST_COMPLETED)
            reason = (
                self._fenced.result() if self._fenced.done() else _why(ended, process.process_id)
            )
            self._members.lose_worker(client.name, reason)
            return reason
        finally:
            ended.cancel()
            self.client = None
            await client.close()

    async def _failed(self, error: BaseException, failures: int, actor: Any) -> None:
        self._tell(f"{error}")
        fatal = isinstance(error, HomerError) or failures >= START_ATTEMPTS
        if fatal and not self.started.done():
            self.started.set_exception(
                error
                if isinstance(error, HomerError)
                else PlacementError(f"worker-{self.number} cannot start: {error}")
            )
        if isinstance(error, (CheckpointError, BiasError)) and actor is not None:
            # Another process would find the same files.
            self._tell(f"{error}; it is tried again when files change")
            _log.warning("worker-%d cannot serve: %s", self.number, self.reason)
            try:
                return await result(actor.until_files_change.remote())
            except RayError as lost:
                _log.warning("worker-%d: its process ended: %r", self.number, lost)
        seconds = backoff_seconds(failures)
        _log.warning(
            "worker-%d cannot serve (try %d, the next in %g s): %s",
            self.number, failures, seconds, error,
        )  # fmt: skip
        await asyncio.sleep(seconds)

    def _tell(self, reason: str) -> None:
        self.state, self.reason = "failed", reason


async def result(ref: Any) -> Any:
    """What a Ray call returns; a call to Ray is awaitable, but no coroutine."""
    return await ref


def cause_of(error: BaseException) -> BaseException:
    """The error inside those of Ray: it says what to change, they add their traceback."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def _why(ended: asyncio.Future[Any], process_id: int) -> str:
    error = ended.exception()
    if error is None:
        return "it was stopped"
    return f"its process {process_id} ended ({type(error).__name__})"
