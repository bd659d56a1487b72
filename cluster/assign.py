"""The policy: which request's work a worker with room gets next.

Pure choice over the bookkeeping of requests and workers. Knows nothing about time but what it is
told, starts nothing.

The order, for a worker with room:

1. a merge whose children lie mostly here, of the most urgent request: it frees memory;
2. a piece of the request with the smallest share of the pool, by its weight;
3. a merge of which it has some child, unless a faster worker has it done sooner.

Beside that, merges whose own workers may not get work go to any (`adrift`), and workers that have
nothing to do run a second time what runs far too long elsewhere (`slow_tries`).

A worker's last place is kept for requests that have nothing in hand anywhere, but behind those of
higher priority, and they get small pieces there: so a short request waits for a few leaves at most,
however long the documents are beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from cluster.active import Active
from cluster.members import Member, Members
from cluster.run import JobRun
from cluster.scheduler_options import SchedulerOptions
from cluster.units import Try, Unit

# What a request without anything in hand may take through a worker's last place.
SMALL_PIECE_LEAVES = 4
# Age makes a running request weigh at most four times as much as a young one, so that a stream of
# new requests does not hold it up, and it does not hold them up either.
MAX_AGE_BOOST = 2.0
# How much later than all others a piece may end.
TAIL_SLACK = 1.1
MIN_DUPLICATE_SECONDS = 1.0


def urgency(active: Active, now: float, options: SchedulerOptions) -> float:
    """Priority plus age: the order among those that wait."""
    return active.job.priority + (now - active.times.submitted) / options.aging_seconds


def share(active: Active, now: float, options: SchedulerOptions) -> float:
    """What a request would have in hand with one piece more, by its weight: the least is next."""
    age = (now - active.times.submitted) / options.aging_seconds
    weight = 2.0 ** (active.job.priority + min(age, MAX_AGE_BOOST))
    return float((len(active.run.tries) + 1) / weight)


@dataclass
class JobPace:
    """How fast the workers are at one job, as `cut.Pace`."""

    active: Active
    members: Members
    now: float
    limit: float = float("inf")

    @property
    def run(self) -> JobRun:
        return self.active.run

    @property
    def total_speed(self) -> float:
        return self.members.total_speed

    def speed(self, worker: str) -> float:
        return self.members.speed(worker)

    def busy_seconds(self, worker: str) -> float:
        attempt = self.run.tries.get(worker)
        if attempt is None:
            # It has just finished a part and takes the next, or it is at other things.
            member = self.members.get(worker)
            here = member is not None and self.active.request_id in member.running
            return 0.0 if here else float("inf")
        expected = self.run.index.spans[attempt.node].work / self.speed(worker)
        elapsed = self.now - attempt.started
        # What takes longer than expected is expected to take as long again.
        return expected - elapsed if elapsed < expected else elapsed

    def largest(self, worker: str) -> float:
        """What `worker` can do until everybody together has done what is left of the job."""
        seconds = self.run.work_left / self.members.total_speed
        return min(self.limit, TAIL_SLACK * seconds * self.speed(worker))


@dataclass(frozen=True)
class Choice:
    """What a worker is to do: a piece to be taken, or a unit to be run."""

    active: Active
    unit: Unit | None = None
    pace: JobPace | None = None


def choose(
    member: Member,
    actives: Iterable[Active],
    members: Members,
    options: SchedulerOptions,
    now: float,
) -> Iterable[Choice]:
    """What `member` could do, the best first. A piece may turn out not to be there."""
    fit = [
        active
        for active in actives
        if may_run(active, member, now)
        and (active.run.has_pieces or active.run.ready_at(member.name))
    ]
    by_urgency = sorted(fit, key=lambda active: -urgency(active, now, options))
    for active in by_urgency:
        for unit in active.run.ready_at(member.name):
            if allowed(unit, member, members) and _is_best(active.run, unit, member, members):
                yield Choice(active, unit=unit)
    with_pieces = [active for active in by_urgency if active.run.has_pieces]
    last_place = options.requests_per_worker > 1 and (
        member.room(options.requests_per_worker) == 1 and member.load > 0
    )
    waiting = max((a.job.priority for a in with_pieces if not a.run.tries), default=None)
    for active in sorted(with_pieces, key=lambda active: share(active, now, options)):
        pace = JobPace(active, members, now)
        if last_place:
            if active.run.tries and (waiting is None or active.job.priority <= waiting):
                continue
            leaf = active.run.index.spans[active.job.plan.nodes[0].id].work
            pace.limit = SMALL_PIECE_LEAVES * leaf
        yield Choice(active, pace=pace)
    for active in by_urgency:
        for unit in active.run.ready_at(member.name):
            if allowed(unit, member, members) and not sooner_elsewhere(
                unit, member, JobPace(active, members, now)
            ):
                yield Choice(active, unit=unit)


def sooner_elsewhere(unit: Unit, member: Member, pace: JobPace) -> bool:
    """Whether the best worker for a merge, still at another part, has it done before `member`."""
    best = next(filter(pace.members.usable, pace.run.best_homes(unit)), member.name)
    if best == member.name:
        return False
    work = pace.run.work_of(unit)
    return pace.busy_seconds(best) + work / pace.speed(best) < work / pace.speed(member.name)


def may_run(active: Active, member: Member, now: float) -> bool:
    """Whether `member` may run something of a request at all."""
    return (
        active.open
        and active.request_id not in member.running
        and member.name not in active.run.banned
        and active.refused_until.get(member.name, 0.0) <= now
    )


def allowed(unit: Unit, member: Member, members: Members) -> bool:
    """Whether `member` may run a unit: it has the layers, and need not leave it to others.

    A unit that failed on it before goes to others, where there are any.
    """
    if not member.fits(unit.node):
        return False
    return member.name not in unit.avoid or all(
        other.name in unit.avoid for other in members.fitting(unit.node)
    )


def adrift(active: Active, members: Members) -> list[Unit]:
    """Ready merges none of whose own workers may run them."""
    run = active.run

    def may(home: str, unit: Unit) -> bool:
        return members.usable(home) and home not in run.banned and home not in unit.avoid

    return [u for u in run.ready if not any(may(home, u) for home in run.best_homes(u))]


def slow_tries(active: Active, now: float, options: SchedulerOptions) -> list[Try]:
    """Tries that run far longer than the like of them did, the latest first."""
    run = active.run
    if run.parked or not options.slow_factor:
        return []
    usual = {piece: median(paces) for piece, paces in active.paces.items() if paces}
    late: list[tuple[float, Try]] = []
    for attempt in run.tries.values():
        work = run.work_of(attempt.unit)
        if attempt.unit.piece not in usual or len(attempt.unit.tries) > 1:
            continue
        expected = usual[attempt.unit.piece] * work
        over = now - attempt.started - max(MIN_DUPLICATE_SECONDS, options.slow_factor * expected)
        if over > 0:
            late.append((over, attempt))
    return [attempt for _, attempt in sorted(late, key=lambda entry: -entry[0])]


def _is_best(run: JobRun, unit: Unit, member: Member, members: Members) -> bool:
    """Whether no other worker that may get work is better for a merge."""
    homes = [home for home in run.best_homes(unit) if members.usable(home)]
    return not homes or homes[0] == member.name
