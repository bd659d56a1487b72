"""Hands out work: what `assign` chooses, when workers have room or requests have something to do.

Knows nothing about how work runs, nor about what its failure means.
"""

from __future__ import annotations

from cluster.active import Active
from cluster.answers import Answers
from cluster.assign import JobPace, adrift, allowed, choose, may_run, slow_tries, sooner_elsewhere
from cluster.core import Core
from cluster.members import Member
from cluster.node_calls import NodeCalls
from cluster.units import Unit

# How many idle workers are asked again, when a request gets on, about pieces that they left to
# others before. Now and then all are (`use_idle`).
ASKED_AGAIN = 8


class Dispatcher:
    """Keeps every worker busy for as long as there is anything that it may do."""

    def __init__(self, core: Core, nodes: NodeCalls, answers: Answers) -> None:
        self._core = core
        self._nodes = nodes
        self._answers = answers

    def changed(self, active: Active) -> None:
        """See whether a request can be answered, and offer what it has to workers with room."""
        if not active.open:
            return
        run = active.run
        if run.complete:
            self._answers.start(active)
            return
        for unit in run.take_fresh():
            self._offer_merge(active, unit)
        if run.has_pieces:
            self._offer_pieces(active)

    def _offer_pieces(self, active: Active) -> None:
        """Offer pieces: to all where some have become free, else to few.

        Whoever has room was offered the others when it got it. One that then left them would mostly
        do so again, so that asking all of a large pool at each event would cost far more than the
        event.
        """
        run, members = active.run, self._core.members
        anew = run.take_freed() or not run.tries
        for member in members.by_load() if anew else members.idle(ASKED_AGAIN):
            if not run.has_pieces or len(run.tries) >= len(members):
                break
            if may_run(active, member, self._core.now()):
                self.fill(member)

    def _offer_merge(self, active: Active, unit: Unit) -> None:
        """Run a ready merge where it is best; where another of its workers is idle, there.

        Else it gets its turn when one of them has room.
        """
        homes = active.run.best_homes(unit)
        if not homes:
            # Its children are where the layers for it are not.
            self._start_anywhere(active, unit)
        pace = JobPace(active, self._core.members, self._core.now())
        for rank, home in enumerate(homes):
            member = self._core.members.get(home)
            if member is None or (rank and (member.load or sooner_elsewhere(unit, member, pace))):
                continue
            if self._can_take(active, member, unit):
                self._start_unit(active, member, unit)
                return

    def _start_anywhere(self, active: Active, unit: Unit) -> None:
        for member in self._core.members.by_load():
            if self._can_take(active, member, unit):
                self._start_unit(active, member, unit)
                return

    def _can_take(self, active: Active, member: Member, unit: Unit) -> bool:
        return (
            self._core.members.usable(member.name)
            and member.room(self._core.options.requests_per_worker) > 0
            and may_run(active, member, self._core.now())
            and allowed(unit, member, self._core.members)
        )

    def _start_unit(self, active: Active, member: Member, unit: Unit) -> None:
        started = active.run.start(unit, member.name, self._core.now())
        self._nodes.start(active, member, started)

    def fill(self, member: Member) -> None:
        """Give a worker work for as long as it has room and there is any."""
        while (
            self._core.members.usable(member.name)
            and member.room(self._core.options.requests_per_worker) > 0
            and self._give(member)
        ):
            pass

    def _give(self, member: Member) -> bool:
        now, members = self._core.now(), self._core.members
        actives = self._core.actives.values()
        for choice in choose(member, actives, members, self._core.options, now):
            active = choice.active
            if choice.unit is not None:
                self._start_unit(active, member, choice.unit)
                return True
            started = active.run.start_piece(
                member.name,
                choice.pace or JobPace(active, members, now),
                now,
                lambda unit: allowed(unit, member, members),
            )
            if started is not None:
                if active.times.started is None:
                    active.times.started = now
                    self._core.observer.job_started(active.job)
                self._nodes.start(active, member, started)
                return True
        return False

    def offer_adrift(self) -> None:
        for active in list(self._core.actives.values()):
            for unit in adrift(active, self._core.members) if active.open else ():
                self._start_anywhere(active, unit)

    def use_idle(self) -> None:
        """What was left to others, and second runs of what runs far too long."""
        idle = [member for member in self._core.members if not member.load]
        actives = [active for active in self._core.actives.values() if active.open]
        if any(active.run.has_pieces or active.run.ready for active in actives):
            for member in idle:
                self.fill(member)
        now = self._core.now()
        for active in actives:
            for attempt in slow_tries(active, now, self._core.options):
                helper = next(
                    (m for m in idle if not m.load and self._can_take(active, m, attempt.unit)),
                    None,
                )
                if helper is not None:
                    self._core.observer.retried(active.job, attempt.node, "slow")
                    self._start_unit(active, helper, attempt.unit)
