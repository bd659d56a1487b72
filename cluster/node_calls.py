"""Runs pieces and merges on workers, and decides what a failure means.

A worker that is gone loses all that it held. One that cannot reach another, or that fails, is
passed over for the node; one that wants memory is asked again later. Mistakes of the request end
it. Knows nothing about who gets which work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.active import Active
from cluster.admission import Admission
from cluster.core import Core, StalledError
from cluster.errors import PeerCallError, WorkerCallError, WorkerLostError
from cluster.job import MergeDone, NodeDone
from cluster.members import Member
from cluster.run import JobRun
from cluster.units import Started, Try
from homer.errors import HomerError
from homer.plan import NodeId

_log = logging.getLogger(__name__)

REFUSED = "RESOURCE_EXHAUSTED"
# The worker, or its peer, has not got what it should have.
GONE = "NOT_FOUND"
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 5.0
PEER_FAULTS = 2


class NodeCalls:
    """Pieces and merges of all requests."""

    def __init__(self, core: Core, admission: Admission) -> None:
        self._core = core
        self._admission = admission
        self._tasks: dict[Try, asyncio.Task[None]] = {}

    def start(self, active: Active, member: Member, started: Started) -> None:
        """Run what was taken for `member`."""
        attempt, request_id = started.attempt, active.request_id
        member.running.add(request_id)
        member.holds(request_id)
        self._core.members.update(member)
        task = self._core.spawn(active, member.name, self._run(active, member, started))
        self._tasks[attempt] = task

        def ended(_: asyncio.Task[None]) -> None:
            self._leave(active, member, attempt)
            self._core.has_room(member)

        task.add_done_callback(ended)

    def _leave(self, active: Active, member: Member, attempt: Try) -> None:
        """A worker is through with a try, and may take the next part of the request."""
        if self._tasks.pop(attempt, None) is not None:
            member.running.discard(active.request_id)
            self._core.members.update(member)

    async def _run(self, active: Active, member: Member, started: Started) -> None:
        run, attempt, kept = active.run, started.attempt, None
        evidence: dict[NodeId, tuple[str, NodeDone]] = {}
        events = (
            member.client.run_subtree(run.job, attempt.node, attempt.attempt)
            if attempt.unit.piece
            else self._merge(active, member, started)
        )
        try:
            async with aclosing(self._core.heard(member, events)) as heard:
                async for done in heard:
                    if not run.is_current(attempt):
                        return
                    if isinstance(done, MergeDone):
                        active.moved_bytes += done.received_bytes
                        kept = done.context_indices
                    if active.job.with_evidence:
                        evidence[done.node] = member.name, done
                    run.progressed(attempt, done.node)
                    self._count(active, member, done)
        except Exception as error:
            await self._failed(active, member, attempt, error)
            return
        if run.is_current(attempt):
            active.evidence.update(evidence)
        self._done(active, member, attempt, kept)

    async def _merge(
        self, active: Active, member: Member, started: Started
    ) -> AsyncGenerator[NodeDone]:
        attempt, members = started.attempt, self._core.members
        children: list[tuple[NodeId, str]] = []
        for child, home in started.children:
            at = members.get(home)
            address = "" if at is member or at is None else at.client.address
            children.append((child, address))
        yield await member.client.merge(active.run.job, attempt.node, attempt.attempt, children)

    def _count(self, active: Active, member: Member, done: NodeDone) -> None:
        now = self._core.now()
        active.node_done(done, member.name, now)
        self._core.observer.node_done(active.job, member.name, done, done.node.height)
        if done.node.height == 0:
            self._admission.count_done(done.context_in, now)

    def _done(
        self, active: Active, member: Member, attempt: Try, kept: Sequence[int] | None
    ) -> None:
        run, node, now = active.run, attempt.node, self._core.now()
        losers = run.done(attempt, kept)
        if losers is None:
            return
        active.refusals = 0
        work = run.work_of(attempt.unit)
        active.paces[attempt.unit.piece].append((now - attempt.started) / work)
        if attempt.unit.piece:
            member.measured(work, now - attempt.started)
            self._core.members.update(member)
        for loser in losers:
            if (task := self._tasks.get(loser)) is not None:
                task.cancel()
            self._drop(active, loser.worker, loser.node, loser.attempt)
        if kept is not None:
            for name in run.holders_below(node) - {member.name}:
                self._prune(active, name, node, kept)
        if above := run.survivors(node):
            self._prune(active, member.name, *above)
        # A merge of what it has just made is best run here: elsewhere a state more would travel.
        self._leave(active, member, attempt)
        self._core.changed(active)

    def _prune(self, active: Active, name: str, node: NodeId, kept: Sequence[int]) -> None:
        """Let a worker drop rows that did not survive; only its memory depends on it."""
        member, job = self._core.members.get(name), active.run.job
        if member is None or (node == job.plan.root.id and not job.plan.height):
            return
        client = member.client

        async def call() -> None:
            try:
                async with asyncio.timeout(self._core.options.release_timeout_seconds):
                    await client.prune(job, node, 0, kept)
            except (HomerError, TimeoutError) as error:
                _log.debug("%s: not pruned on %s: %r", job.request_id, name, error)

        self._core.spawn(active, name, call())

    def _drop(self, active: Active, name: str, node: NodeId, attempt: int) -> None:
        """Let a worker forget what it may have made of a node that counts elsewhere.

        No answer is given before that is certain: rows that are there twice would spoil it.
        """
        run, member = active.run, self._core.members.get(name)
        if member is None:
            return
        client = member.client
        run.drops += 1

        async def call() -> None:
            try:
                async with asyncio.timeout(self._core.options.release_timeout_seconds):
                    await client.drop(run.job.request_id, node, attempt)
            except (HomerError, TimeoutError) as error:
                self.expel(active, run, client.name, f"it could not drop a node: {error!r}")
            finally:
                run.drops -= 1
            self._core.changed(active)

        # Not by the worker's name: when it is lost this has to end in order.
        self._core.spawn(active, "", call())

    def expel(self, active: Active, run: JobRun, name: str, reason: str) -> None:
        """Do without a worker for the rest of a pass: what it holds is run again elsewhere."""
        if name in run.banned:
            return
        _log.warning("%s: goes on without %s: %s", run.job.request_id, name, reason)
        run.banned.add(name)
        for node in run.lose(name):
            self._core.observer.retried(active.job, node, "fault")
        current = asyncio.current_task()
        for task, worker in list(active.tasks.items()):
            if worker == name and task is not current:
                task.cancel()
        full = self._core.members.fitting(active.job.plan.root)
        if full and all(member.name in run.banned for member in full):
            raise WorkerCallError(f"every worker failed this request; the last: {name}: {reason}")

    def forget(self, active: Active, name: str) -> None:
        """A worker has not got what it should have: all that it made is made again."""
        run = active.run
        for node in run.lose(name):
            self._core.observer.retried(active.job, node, "lost")
            self._drop(active, name, node, run.units[node].attempt)

    async def _failed(self, active: Active, member: Member, attempt: Try, error: Exception) -> None:
        run, unit = active.run, attempt.unit
        if not run.is_current(attempt):
            return
        _log.warning(
            "%s: node %s on %s failed: %s", run.job.request_id, attempt.node, member.name, error
        )
        if isinstance(error, StalledError):
            return self._core.lose_worker(member.name, str(error))
        if isinstance(error, WorkerLostError):
            if await self._core.suspect(member, str(error)):
                return
            cause = "fault"
        elif isinstance(error, PeerCallError):
            cause = "peer"
            await self._peer_failed(active, run, attempt, error)
        elif isinstance(error, WorkerCallError) and error.code == REFUSED:
            cause = "refused"
            self._refused(active, member)
        elif isinstance(error, WorkerCallError):
            cause = "fault"
            if error.code == GONE:
                self.forget(active, member.name)
        else:
            raise error
        if cause == "fault":
            unit.faults += 1
            if unit.faults >= self._core.options.max_faults:
                raise error
        if cause in ("fault", "peer"):
            unit.avoid.add(member.name)
        run.failed(attempt)
        self._core.observer.retried(active.job, attempt.node, cause)
        self._core.changed(active)

    async def _peer_failed(
        self, active: Active, run: JobRun, attempt: Try, error: PeerCallError
    ) -> None:
        """A merge could not get a child's state from another worker."""
        peer = self._core.members.at(error.address)
        if peer is None or await self._core.suspect(peer, str(error)):
            return
        active.peer_faults[peer.name] += 1
        if error.code == GONE:
            self.forget(active, peer.name)
        elif active.peer_faults[peer.name] >= PEER_FAULTS:
            self.expel(active, run, peer.name, str(error))

    def _refused(self, active: Active, member: Member) -> None:
        """A worker has no memory for this now: ask it again later, others at once."""
        active.refusals += 1
        wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**active.refusals)
        active.refused_until[member.name] = self._core.now() + wait
        asyncio.get_running_loop().call_later(wait, self._core.has_room, member)
