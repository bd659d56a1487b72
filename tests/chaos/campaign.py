"""A campaign: questions without end, faults among them, and whether every answer was right.

Knows nothing about how faults are done.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from cluster.errors import WorkerCallError, WorkerLostError
from cluster.job import Job
from cluster.observer import Observer
from cluster.scheduler import Scheduler
from cluster.scheduler_options import SchedulerOptions
from homer.demo import MODEL_DIR
from homer.plan import NodeId
from tests.chaos.faults import Fault
from tests.chaos.fleet import Fleet, Seat
from tests.chaos.hosts import Host
from tests.chaos.inject import Injected, Injector
from tests.chaos.traffic import Question, ask

_log = logging.getLogger(__name__)

ASKERS = 3
ANSWER_SECONDS = 120.0
EMPTY_SECONDS = 20.0
# Quick to give up, so that many faults fit into a run; slower than a busy machine is at answering.
OPTIONS = SchedulerOptions(
    heartbeat_seconds=0.5,
    heartbeat_timeout_seconds=1.0,
    heartbeat_misses=2,
    stall_timeout_seconds=10.0,
    max_faults=20,
    max_losses=20,
)


@dataclass
class Outcome:
    """What a campaign came to."""

    injected: list[Injected] = field(default_factory=list)
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    # What workers hold at the end, when nobody asks any more.
    left: list[str] = field(default_factory=list)
    retries: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    readmissions: int = 0
    slowest_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.right > 0 and not (self.wrong or self.lost or self.left)


class _Retries(Observer):
    """Counts what was run again, by cause."""

    def __init__(self, causes: Counter[str]) -> None:
        self._causes = causes

    def retried(self, job: Job, node: NodeId, cause: str) -> None:
        self._causes[cause] += 1


async def run_campaign(
    hosts: Sequence[Host],
    faults: Sequence[Fault],
    questions: Sequence[Question],
    seed: int,
    log: IO[bytes],
) -> Outcome:
    """Inject `faults` into workers on `hosts` while `questions` are asked again and again."""
    outcome = Outcome()
    started = time.monotonic()
    injector = Injector(faults, random.Random(seed))
    scheduler = Scheduler(options=OPTIONS, observer=_Retries(outcome.retries))
    async with Fleet(scheduler, hosts, MODEL_DIR, injector.entered, log) as fleet:
        enough = asyncio.Event()
        askers = [
            asyncio.create_task(_ask_on(scheduler, questions, f"{seed}-{number}", enough, outcome))
            for number in range(ASKERS)
        ]
        try:
            await injector.run(fleet)
        finally:
            enough.set()
            await asyncio.gather(*askers)
            await injector.heal()
        outcome.left = await held(fleet.seats)
        outcome.injected = injector.done
        outcome.restarts, outcome.readmissions = fleet.restarts, fleet.readmissions
        await scheduler.drain()
    outcome.seconds = time.monotonic() - started
    return outcome


async def _ask_on(
    scheduler: Scheduler,
    questions: Sequence[Question],
    name: str,
    enough: asyncio.Event,
    outcome: Outcome,
) -> None:
    """Ask one question after the other until it is enough."""
    draw = random.Random(name)
    number = 0
    while not enough.is_set():
        number += 1
        question = draw.choice(questions)
        asked = f"{name}-{number} ({question.name})"
        started = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                wrong = await ask(scheduler, question, f"{name}-{number}")
        except (Exception, asyncio.CancelledError) as error:
            # Nobody cancels an asker: one that is cancelled has lost its answer too.
            _log.error("%s was lost", asked, exc_info=error)
            outcome.lost.append(f"{asked}: {type(error).__name__}: {error}")
            continue
        outcome.slowest_seconds = max(outcome.slowest_seconds, time.monotonic() - started)
        if wrong is None:
            outcome.right += 1
        else:
            _log.error("%s was wrong: %s", asked, wrong)
            outcome.wrong.append(f"{asked}: {wrong}")


async def held(seats: Sequence[Seat]) -> list[str]:
    """What workers still hold after a while in which they may put things away."""
    deadline = time.monotonic() + EMPTY_SECONDS
    while True:
        holding = [text for seat in seats if (text := await _held_by(seat))]
        if not holding or time.monotonic() > deadline:
            return holding
        await asyncio.sleep(0.1)


async def _held_by(seat: Seat) -> str:
    if seat.client is None:
        return f"{seat.name} does not serve"
    try:
        stats = await seat.client.stats()
    except (WorkerLostError, WorkerCallError) as error:
        return f"{seat.name}: {error}"
    kept = {
        name: value
        for name in (
            "requests",
            "node_states",
            "kv_shards",
            "state_bytes",
            "kv_shard_bytes",
            "running_calls",
        )
        if (value := getattr(stats, name))
    }
    return f"{seat.name} holds {kept}" if kept else ""
