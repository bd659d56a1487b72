"""The settings of the scheduler, each with its default; the command line takes them from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """Settings of a `Scheduler`. All times are seconds of the event loop's clock.

    Parameters
    ----------
    pieces_per_worker : int
        The least number of subtrees per worker into which a plan is cut, where it has as many
        leaves.
    requests_per_worker : int
        The most requests whose nodes one worker runs at a time, one piece or merge of each.
    max_queued_requests, max_queued_tokens : int
        The most requests, and prompt tokens of them, that wait to be started. What comes over it is
        refused with `OverloadedError`.
    memory_fraction : float
        The part of the workers' memory budgets that the estimates of running requests may fill.
    aging_seconds : float
        A request that has waited this long counts as one priority higher.
    heartbeat_seconds : float
        Time between two pings of a worker; 0 for none.
    heartbeat_timeout_seconds : float
        How long a ping may take. Lenient, because a busy worker answers late.
    heartbeat_misses : int
        A worker is lost after this many pings in a row without an answer.
    stall_timeout_seconds : float
        A call from which nothing is heard for so long means a worker that hangs; 0 for never.
    slow_factor : float
        A piece that runs this many times longer than the median of its kind is run a second time
        when workers are idle; 0 for never.
    max_faults : int
        How often one node may fail without its worker's death before its request fails.
    max_losses : int
        How many workers one node may take along with it before its request fails.
    no_worker_timeout_seconds : float
        How long requests wait for a worker to join when none is left.
    grow_timeout_seconds : float
        How long a request that is too large for the pool waits for the next worker, where the pool
        can grow to a size that is enough. Machines take minutes to start.
    release_timeout_seconds : float
        How long a call that only frees memory may take.
    """

    pieces_per_worker: int = 8
    requests_per_worker: int = 4
    max_queued_requests: int = 256
    max_queued_tokens: int = 64 << 20
    memory_fraction: float = 0.9
    aging_seconds: float = 30.0
    heartbeat_seconds: float = 5.0
    heartbeat_timeout_seconds: float = 10.0
    heartbeat_misses: int = 3
    stall_timeout_seconds: float = 600.0
    slow_factor: float = 3.0
    max_faults: int = 4
    max_losses: int = 5
    no_worker_timeout_seconds: float = 60.0
    grow_timeout_seconds: float = 600.0
    release_timeout_seconds: float = 10.0
