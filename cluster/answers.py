"""Gathers and decodes answers, and goes on with them after a loss.

The answer runs on the worker that holds the root's state. When that worker, or before the cache is
complete one that holds rows of it, is lost, only what it held is run again, and the answer goes on
behind the tokens that were delivered. Knows nothing about who gets which work.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

from cluster.active import Active
from cluster.core import Core, StalledError
from cluster.errors import CapacityError, PeerCallError, WorkerCallError, WorkerLostError
from cluster.job import CacheReady, GenerateDone, TokenOut
from cluster.members import Member
from cluster.node_calls import GONE, LONGEST_WAIT_SECONDS, PEER_FAULTS, REFUSED, NodeCalls
from homer.errors import HomerError

_log = logging.getLogger(__name__)

# Rows that do not match the root's: workers computed the same node differently.
MISMATCH = "FAILED_PRECONDITION"
MAX_MISMATCHES = 1
# How often a worker may fail an answer before another is to give it.
FAULTS_ON_ONE_WORKER = 2


class Answers:
    """The answers of all requests."""

    def __init__(self, core: Core, nodes: NodeCalls) -> None:
        self._core = core
        self._nodes = nodes

    def start(self, active: Active) -> None:
        """Answer a request whose pass is complete, unless that has begun."""
        run = active.run
        member = self._core.members.get(run.root_home)
        if active.answer is not None or member is None:
            return
        active.answer_attempt += 1
        member.answers += 1
        self._core.members.update(member)
        active.answer = self._core.spawn(active, member.name, self._answer(active, member))

        def ended(task: asyncio.Task[None]) -> None:
            member.answers -= 1
            if active.answer is task:
                active.answer = None
            self._core.members.update(member)
            self._core.has_room(member)

        active.answer.add_done_callback(ended)

    def end(self, active: Active, answer: int) -> None:
        """Have one of several answers decoded no further: it is long enough, the others go on."""
        member = self._core.members.get(active.run.root_home)
        if active.answer is not None and member is not None:
            self._core.keep(self._end(member, active.run.job.request_id, answer))

    async def _end(self, member: Member, request_id: str, answer: int) -> None:
        try:
            async with asyncio.timeout(self._core.options.release_timeout_seconds):
                await member.client.end_answer(request_id, answer)
        except (HomerError, TimeoutError) as error:
            # Where the worker does not hear of it, it decodes what nobody reads.
            _log.info("%s: answer %d goes on on %s: %r", request_id, answer, member.name, error)

    def worker_lost(self, active: Active, name: str) -> None:
        """A worker is gone: see whether the answer can go on without it."""
        answer, run = active.answer, active.run
        if answer is None:
            return
        if active.tasks.get(answer) == name:
            run.parked = False
        elif run.parked or run.complete:
            return
        active.answer = None
        answer.cancel()

    async def _answer(self, active: Active, member: Member) -> None:
        try:
            await self._follow(active, member)
        except Exception as error:
            await self._failed(active, member, error)

    async def _follow(self, active: Active, member: Member) -> None:
        core, run, job = self._core, active.run, active.run.job
        shards = [
            home.client.address
            for name in sorted(run.homes() - {member.name})
            if (home := core.members.get(name))
        ]
        delivered = [
            None if number in active.finish_reasons else tokens[:]
            for number, tokens in enumerate(active.delivered)
        ]
        events = member.client.generate(job, active.answer_attempt, shards, delivered)
        cache: CacheReady | None = None
        async with aclosing(core.heard(member, events)) as heard:
            async for event in heard:
                match event:
                    case CacheReady():
                        cache, run.parked = event, True
                        self._cache_ready(active, member, event)
                    case TokenOut(token_id, answer):
                        active.delivered[answer].append(token_id)
                        active.times.first_token = active.times.first_token or core.now()
                        core.observer.token(active.job)
                        active.events.put_nowait(event)
                    case GenerateDone() if cache is not None:
                        if active.answer_ended(event.answer, event.finish_reason):
                            active.events.put_nowait(active.summary(cache, core.now()))
                            return
        raise WorkerCallError(f"{member.name} ended an answer before it was complete")

    def _cache_ready(self, active: Active, member: Member, ready: CacheReady) -> None:
        active.moved_bytes += ready.received_bytes
        self._core.observer.cache_ready(active.job, member.name, ready)
        if active.cache is None:
            active.times.cache = self._core.now()
            active.events.put_nowait(ready)
        active.cache = ready

    async def _failed(self, active: Active, member: Member, error: Exception) -> None:
        run, core = active.run, self._core
        run.parked = False
        _log.warning("%s: answer on %s failed: %s", run.job.request_id, member.name, error)
        root = active.job.plan.root.id
        if isinstance(error, StalledError):
            return core.lose_worker(member.name, str(error))
        if isinstance(error, WorkerLostError) and await core.suspect(member, str(error)):
            return
        if not isinstance(error, WorkerLostError | WorkerCallError):
            raise error
        active.answer_faults += 1
        code = error.code if isinstance(error, WorkerCallError) else ""
        if code == MISMATCH:
            active.mismatches += 1
            if active.mismatches > MAX_MISMATCHES:
                raise WorkerCallError(
                    "the workers do not compute the same from the same input, so what was run "
                    f"again does not fit the rest: use equal devices and libraries ({error})"
                ) from error
            return core.restart(active)
        if isinstance(error, PeerCallError):
            await self._peer_failed(active, error)
        elif isinstance(error, WorkerCallError) and code == REFUSED:
            await self._wait_for_memory(active, member, error)
        elif code == GONE:
            self._nodes.forget(active, member.name)
        elif active.answer_faults >= core.options.max_faults:
            raise error
        elif active.answer_faults % FAULTS_ON_ONE_WORKER == 0 and self._others(active):
            self._nodes.expel(active, run, member.name, str(error))
        core.observer.retried(active.job, root, "peer" if code == "UNAVAILABLE" else "fault")
        active.answer = None
        core.changed(active)

    async def _peer_failed(self, active: Active, error: PeerCallError) -> None:
        peer = self._core.members.at(error.address)
        if peer is None or await self._core.suspect(peer, str(error)):
            return
        active.peer_faults[peer.name] += 1
        if error.code == GONE:
            self._nodes.forget(active, peer.name)
        elif active.peer_faults[peer.name] >= PEER_FAULTS:
            self._nodes.expel(active, active.run, peer.name, str(error))

    def _others(self, active: Active) -> bool:
        """Whether more than one worker may still give the answer."""
        full = self._core.members.fitting(active.job.plan.root)
        return sum(member.name not in active.run.banned for member in full) > 1

    async def _wait_for_memory(
        self, active: Active, member: Member, error: WorkerCallError
    ) -> None:
        """The final cache does not fit beside what the worker holds: later, or elsewhere."""
        if active.answer_faults > self._core.options.max_faults:
            if not self._others(active):
                raise CapacityError(
                    f"no worker has the memory for the final cache: {error}; lower target_len, or "
                    "raise --memory-budget"
                ) from error
            self._nodes.expel(active, active.run, member.name, str(error))
            active.answer_faults = 0
            return
        await asyncio.sleep(LONGEST_WAIT_SECONDS)
