"""Which requests may start: the bounds of the queue, and memory.

A request waits until its estimated footprint fits beside those that run; where the pool has to grow
for it first, it says so. Knows nothing about how work is handed out, or how a pool grows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from cluster.active import Active
from cluster.assign import urgency
from cluster.cut import cut_plan
from cluster.errors import CapacityError, OverloadedError
from cluster.job import Job
from cluster.members import Members
from cluster.scheduler_options import SchedulerOptions

# How far back the pace of the service is looked at when a retry is suggested.
RATE_WINDOW_SECONDS = 120.0
MAX_RETRY_SECONDS = 600.0


class Admission:
    """Holds requests back until there is room for them.

    Attributes
    ----------
    most_workers : int
        So many workers there could be, where the pool grows; 0 where it does not.
    growing : set of str
        Requests that only a larger pool has the memory for.
    """

    def __init__(self, options: SchedulerOptions, members: Members) -> None:
        self._options = options
        self._members = members
        self._waiting: dict[str, Active] = {}
        self._running: dict[str, Active] = {}
        self.most_workers = 0
        self.growing: set[str] = set()
        self._last_joined = -math.inf
        self._largest_budget = 0.0
        self._done: deque[tuple[float, int]] = deque()

    def worker_joined(self, now: float) -> None:
        """The pool is larger: who waits for that may wait for the next one."""
        self._last_joined = now

    def enter(self, active: Active) -> None:
        """A request asks to be started."""
        self._waiting[active.request_id] = active

    def leave(self, active: Active) -> None:
        """A request is over."""
        self._waiting.pop(active.request_id, None)
        self._running.pop(active.request_id, None)
        self.growing.discard(active.request_id)

    def hold_back(self, active: Active) -> None:
        """A request that ran waits again."""
        active.admitted = False
        self._running.pop(active.request_id, None)
        self._waiting[active.request_id] = active

    def count_done(self, tokens: int, now: float) -> None:
        """Leaves of `tokens` prompt tokens are done: the pace from which a wait is estimated."""
        self._done.append((now, tokens))
        while self._done[0][0] < now - RATE_WINDOW_SECONDS:
            self._done.popleft()

    def admit(self, now: float) -> list[Active]:
        """Take in those that fit now, the most urgent first.

        Smaller requests go past one that does not fit, for as long as it takes for its age to count
        as one priority; after that everybody waits for it.
        """
        admitted: list[Active] = []
        if not len(self._members):
            return admitted
        budget = self._budget()
        used = sum(active.estimate_bytes for active in self._running.values())
        by_urgency = sorted(
            self._waiting.values(), key=lambda active: -urgency(active, now, self._options)
        )
        for active in by_urgency:
            if active.yields_to & self._running.keys():
                continue
            estimate = self._estimate(active) if budget else 0.0
            if budget and estimate > budget:
                if self._may_fit_later(active, estimate, now):
                    self.growing.add(active.request_id)
                    continue
                active.fail(_too_large(active.job, estimate, max(budget, self._possible_budget())))
                self.leave(active)
                continue
            if budget and self._running and used + estimate > budget:
                if now - active.times.submitted > self._options.aging_seconds:
                    break
                continue
            active.estimate_bytes = estimate
            used += estimate
            self.leave(active)
            self._running[active.request_id] = active
            active.admitted = True
            admitted.append(active)
        return admitted

    def check_bounds(self, active: Active, actives: Iterable[Active], now: float) -> None:
        """Refuse a request that has not started when too much waits already.

        Raises
        ------
        OverloadedError
            With the time after which there should be room.
        """
        queued = [other for other in actives if other.times.started is None]
        tokens = sum(other.job.plan.prompt_len for other in queued)
        options = self._options
        too_many = len(queued) > options.max_queued_requests
        # One request alone may be of any length: the limit of a context's length is not ours.
        too_long = tokens > options.max_queued_tokens and len(queued) > 1
        if active.times.started is None and (too_many or too_long):
            wait = self.retry_after(tokens - active.job.plan.prompt_len, now)
            raise OverloadedError(
                f"{len(queued) - 1} requests of {tokens - active.job.plan.prompt_len} tokens wait "
                f"already, and this service queues at most {options.max_queued_requests} requests "
                f"and {options.max_queued_tokens} tokens: try again in about {wait:.0f} seconds",
                wait,
            )

    def retry_after(self, tokens: int, now: float) -> float:
        """Seconds in which so many prompt tokens should be done, by the pace of late."""
        recent = [(at, count) for at, count in self._done if at >= now - RATE_WINDOW_SECONDS]
        if not recent:
            return 1.0
        rate = sum(count for _, count in recent) / max(1.0, now - recent[0][0])
        return min(MAX_RETRY_SECONDS, max(1.0, tokens / max(rate, 1.0)))

    def _may_fit_later(self, active: Active, estimate: float, now: float) -> bool:
        """Whether the pool may still become large enough: it was once, or it has room to grow."""
        since = max(active.times.submitted, self._last_joined)
        if estimate <= self._largest_budget:
            return now - since <= self._options.no_worker_timeout_seconds
        # One that has not yet said what it is has not come yet.
        if sum(m.info is not None for m in self._members) >= self.most_workers:
            return False
        largest = self._estimate(active, self.most_workers)
        in_time = now - since <= self._options.grow_timeout_seconds
        return in_time and largest <= self._possible_budget()

    def _possible_budget(self) -> float:
        """Bytes for all requests together when the pool is as large as it can be."""
        largest = max((m.info.memory_budget_bytes for m in self._members if m.info), default=0)
        return largest * self.most_workers * self._options.memory_fraction

    def _estimate(self, active: Active, workers: int = 0) -> float:
        """Bytes of a request on so many workers; on those that there are without a number."""
        pieces = (workers or len(self._members)) * self._options.pieces_per_worker
        if pieces not in active.footprints:
            active.footprints[pieces] = footprint_tokens(active.job, pieces)
        return active.footprints[pieces] * self._kv_bytes_per_token()

    def _budget(self) -> float:
        """Bytes for all requests together; 0 while any worker has no limit.

        One that has not yet said what it is has nothing to give.
        """
        budgets = [m.info.memory_budget_bytes for m in self._members if m.info]
        if not budgets or not all(budgets):
            return 0.0
        budget = sum(budgets) * self._options.memory_fraction
        self._largest_budget = max(self._largest_budget, budget)
        return budget

    def _kv_bytes_per_token(self) -> int:
        return max((m.info.kv_bytes_per_token for m in self._members if m.info), default=0)


def footprint_tokens(job: Job, pieces: int) -> float:
    """What a request holds at its most, over the whole pool, in tokens of full KV.

    That is when all pieces are done and none is merged, with the final cache and the answer on
    top. What the running chunks take for a moment is left to the workers, which refuse what does
    not fit.
    """
    plan = job.plan
    cut = cut_plan(plan, pieces, 1)
    held = sum(plan.by_id[piece].context_out * plan.by_id[piece].layer_end for piece in cut)
    final = (plan.kept_len + job.sampling.max_new_tokens) * plan.num_layers
    return (held + final) / plan.num_layers


def _too_large(job: Job, estimate: float, budget: float) -> CapacityError:
    gib = 1 << 30
    return CapacityError(
        f"a prompt of {job.plan.prompt_len} tokens needs about {estimate / gib:.2f} GiB for keys "
        f"and values, but all workers together may use {budget / gib:.2f} GiB: shorten the "
        "document, add workers, or raise --memory-budget"
    )
