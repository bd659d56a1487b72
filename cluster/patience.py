"""When waiting has an end: requests without a worker, and requests that hold each other's memory.

Knows nothing about what work is done, or by whom.
"""

from __future__ import annotations

from cluster.core import Core
from cluster.errors import CapacityError, NoWorkersError

# How long nothing may get on for want of memory before a request has to give way.
STUCK_SECONDS = 10.0


class Patience:
    """Looks at all requests and workers, again and again."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._no_worker_since: float | None = None

    @property
    def deserted(self) -> bool:
        """Whether no worker that can answer was there for as long as requests wait for one.

        The time counts from when this was asked first.
        """
        now, limit = self._core.now(), self._core.options.no_worker_timeout_seconds
        self.worker_joined()
        if self._no_worker_since is None and not self._core.members.has_full:
            self._no_worker_since = now
        return self._no_worker_since is not None and now - self._no_worker_since >= limit

    def worker_joined(self) -> None:
        """Where it can answer, the time starts anew with the next loss of all."""
        if self._core.members.has_full:
            self._no_worker_since = None

    def check_workers(self) -> None:
        """Give requests up for which no worker is left."""
        if not self.deserted:
            return
        now, limit = self._core.now(), self._core.options.no_worker_timeout_seconds
        leaves_only = " that has all layers" if len(self._core.members) else ""
        for active in self._core.actives.values():
            waited = now - active.times.submitted >= limit
            if waited and active.answer is None and not active.ending:
                active.fail(
                    NoWorkersError(
                        f"no worker{leaves_only} is left, and none came in {limit:g} seconds", limit
                    )
                )

    def check_memory(self) -> None:
        """Let a request give way when none gets on because each has taken the others' memory."""
        now = self._core.now()
        actives = [active for active in self._core.actives.values() if active.open]
        tries = [attempt for active in actives for attempt in active.run.tries.values()]
        if (
            not any(active.refused_since(now - STUCK_SECONDS) for active in actives)
            or now - self._core.last_progress < STUCK_SECONDS
            or any(active.answer for active in actives)
            or any(now - attempt.started > STUCK_SECONDS for attempt in tries)
        ):
            return
        self._core.last_progress = now
        started = [active for active in actives if active.run.touched]
        if len(started) > 1:
            youngest = max(started, key=lambda a: (-a.job.priority, a.times.submitted))
            youngest.yields_to = {a.request_id for a in started if a is not youngest}
            self._core.restart(youngest)
        elif started:
            started[0].fail(
                CapacityError(
                    "no worker has the memory for the next part of this request, and no other "
                    "request holds any: use smaller chunks (max_chunk_len), or raise "
                    "--memory-budget"
                )
            )
