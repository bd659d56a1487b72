"""Does to the workers of a fleet what a list of faults says, each in its phase.

Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.job import Job
from tests.chaos.faults import Fault, Kind, Phase, Role
from tests.chaos.fleet import Fleet, Seat

_log = logging.getLogger(__name__)

# What is wrong with bytes or connections is over by itself; so long it may wait for its victim.
TROUBLE_SECONDS = 3.0
# How long a phase is waited for; a recovery may not come of itself.
PHASE_SECONDS = 20.0
RECOVERY_SECONDS = 3.0
SETTLED_SECONDS = 120.0
# After so many phases that were over before the fault was due, it comes at once.
MISSES = 8
TRIES = 12


@dataclass(frozen=True)
class Injected:
    """A fault that was done, in the phase that its victim was in."""

    fault: Fault
    phase: Phase
    victims: tuple[str, ...]


@dataclass
class _Armed:
    phase: Phase
    entered: asyncio.Future[tuple[str, Sequence[str]]]


class Injector:
    """Injects `faults` one after the other; most begin while an earlier one is still felt.

    Whatever a fault needs, at least one worker is left alone.
    """

    def __init__(self, faults: Sequence[Fault], draw: random.Random) -> None:
        self.done: list[Injected] = []
        self._waiting = deque(faults)
        self._tries: Counter[int] = Counter()
        self._draw = draw
        self._armed: _Armed | None = None
        self._afflicted: set[Seat] = set()
        self._healing: set[asyncio.Task[None]] = set()

    def entered(self, job: Job, phase: Phase, worker: str, others: Sequence[str]) -> None:
        """A call of `worker` begins a phase, in which it pulls from the addresses of `others`."""
        armed = self._armed
        if armed is not None and armed.phase is phase and not armed.entered.done():
            armed.entered.set_result((worker, others))

    async def run(self, fleet: Fleet) -> None:
        """Inject every fault, and wait until each is healed and every worker serves again.

        One that was not felt, or whose phase did not come, is tried again.

        Raises
        ------
        RuntimeError
            When a fault cannot be done.
        """
        while self._waiting:
            fault = self._waiting.popleft()
            self._tries[fault.number] += 1
            if self._tries[fault.number] > TRIES:
                raise RuntimeError(f"{fault} could not be done in {TRIES} tries")
            recovers = fault.phase is Phase.RECOVERY
            if not recovers:
                await self._settled(fleet, len(fleet.seats) - (fault.kind is not Kind.KILL_TWO))
            done = await self._inject(fleet, fault)
            if not done and recovers:
                # Nothing had to be recovered: begin with a loss.
                await self._settled(fleet, len(fleet.seats) - 1)
                opening = Fault(fault.number, Kind.KILL, Phase.LEAF, Role.ACTOR, 0.01)
                await self._inject(fleet, opening)
                done = await self._inject(fleet, fault)
            if not done:
                self._waiting.append(fault)
            if not self._waiting:
                await self.heal()
        await self._settled(fleet, len(fleet.seats))

    async def heal(self) -> None:
        """Wait until every fault is over that ends by itself."""
        while self._healing:
            await asyncio.gather(*self._healing)

    async def _settled(self, fleet: Fleet, least: int) -> None:
        """Wait until `least` workers serve that no fault is at."""
        async with asyncio.timeout(SETTLED_SECONDS):
            while len(self._sound(fleet)) < least:
                fleet.check()
                await asyncio.sleep(0.02)

    def _sound(self, fleet: Fleet) -> list[Seat]:
        return [seat for seat in fleet.serving if seat not in self._afflicted]

    async def _inject(self, fleet: Fleet, fault: Fault) -> bool:
        """Wait for the fault's phase, and do it; False when its phase did not come."""
        for miss in range(MISSES + 1):
            delay = fault.delay_seconds / (1 + miss) if miss < MISSES else 0.0
            if fault.phase is Phase.RANDOM:
                await asyncio.sleep(delay)
                victims = self._victims(fleet, fault, self._draw.choice(fleet.serving), ())
            else:
                seconds = RECOVERY_SECONDS if fault.phase is Phase.RECOVERY else PHASE_SECONDS
                try:
                    name, others = await self._phase(fault.phase, seconds)
                except TimeoutError:
                    return False
                if delay:
                    await asyncio.sleep(delay)
                seat = fleet.by_name(name)
                if seat is None or seat.client is None or not seat.client.is_in(fault.phase):
                    continue
                victims = self._victims(fleet, fault, seat, others)
            if victims:
                await self._do(fault, victims)
                return True
        return False

    async def _phase(self, phase: Phase, seconds: float) -> tuple[str, Sequence[str]]:
        self._armed = _Armed(phase, asyncio.get_running_loop().create_future())
        try:
            return await asyncio.wait_for(self._armed.entered, seconds)
        finally:
            self._armed = None

    def _victims(
        self, fleet: Fleet, fault: Fault, actor: Seat, addresses: Collection[str]
    ) -> list[Seat]:
        """Whom the fault hits; nobody where that would leave no worker in peace."""
        holders = [seat for address in addresses if (seat := fleet.by_address(address))]
        first = self._draw.choice(holders) if holders and fault.role is Role.HOLDER else actor
        victims = [first]
        if fault.kind is Kind.KILL_TWO:
            others = [actor, *holders] if holders else list(fleet.serving)
            victims += [seat for seat in others if seat is not first][:1]
        sound = self._sound(fleet)
        if any(victim not in sound for victim in victims) or len(sound) <= len(victims):
            return []
        return victims

    async def _do(self, fault: Fault, victims: Sequence[Seat]) -> None:
        injected = Injected(fault, fault.phase, tuple(victim.name for victim in victims))
        _log.info("%s", injected)
        self.done.append(injected)
        for seat in victims:
            match fault.kind:
                case Kind.KILL | Kind.KILL_TWO:
                    seat.signal(signal.SIGKILL)
                case Kind.PAUSE | Kind.HANG:
                    seat.signal(signal.SIGSTOP)
                    self._later(seat, injected, fault.seconds)
                case _:
                    await seat.host.fail(fault.kind)
                    self._later(seat, injected, fault.seconds or TROUBLE_SECONDS)

    def _later(self, seat: Seat, injected: Injected, seconds: float) -> None:
        """Undo a fault after `seconds`."""

        async def heal() -> None:
            try:
                await asyncio.sleep(seconds)
            finally:
                self._afflicted.discard(seat)
                if injected.fault.kind in (Kind.PAUSE, Kind.HANG):
                    seat.signal(signal.SIGCONT)
                elif not await seat.host.heal():
                    _log.info("%s was not felt", injected)
                    self.done.remove(injected)
                    self._waiting.append(injected.fault)

        self._afflicted.add(seat)
        task = asyncio.create_task(heal())
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)
