"""What is done to workers, when, and a seeded list of it.

Knows nothing about processes or networks.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")


class Kind(StrEnum):
    """What is done to a worker."""

    KILL = "SIGKILL"
    KILL_TWO = "SIGKILL of two"
    PAUSE = "SIGSTOP, short"
    HANG = "SIGSTOP, long"
    BLINK = "cut, short"
    CUT = "cut, long"
    CUT_PEERS = "cut from workers"
    SLOW = "slowed"
    LOSSY = "packets lost"
    RESET = "connections reset"
    DAMAGE = "bytes damaged"


class Phase(StrEnum):
    """When it is done."""

    LEAF = "leaf"
    MERGE = "merge"
    TRANSFER = "transfer"
    GATHER = "gather"
    DECODE = "decode"
    RECOVERY = "recovery"
    RANDOM = "any moment"


class Role(StrEnum):
    """To whom: the worker whose call began the phase, or one that it pulls from."""

    ACTOR = "actor"
    HOLDER = "holder"


LASTING = {Kind.PAUSE, Kind.HANG, Kind.BLINK, Kind.CUT, Kind.CUT_PEERS, Kind.SLOW, Kind.LOSSY}
# Longer than the chaos run's scheduler waits for a sign of life, and shorter.
LONG_SECONDS = (3.0, 5.0)
SHORT_SECONDS = (0.05, 0.6)
# What the time from the beginning of a phase to its fault is drawn from.
DELAY_SECONDS = 0.06
DECODE_DELAY_SECONDS = 0.3
RANDOM_DELAY_SECONDS = 1.0
# Only where bytes move between workers.
_MOVING = (Phase.TRANSFER, Phase.GATHER)
_WEIGHTS = {Kind.KILL: 5, Kind.KILL_TWO: 2, Kind.HANG: 2, Kind.CUT: 2}


@dataclass(frozen=True)
class Fault:
    """One fault: `kind`, `delay_seconds` after a worker enters `phase`, for `seconds`."""

    number: int
    kind: Kind
    phase: Phase
    role: Role
    delay_seconds: float
    seconds: float = 0.0


def draw_faults(seed: int, count: int, kinds: Collection[Kind]) -> list[Fault]:
    """`count` faults of `kinds`; the same for the same seed.

    Every phase gets as many as every other, and no kind comes again before its turn: kinds are
    dealt from a shuffled pack, in which some are there more than once.
    """
    draw = random.Random(seed)
    phases = _dealt(draw, list(Phase), count)
    pack = [kind for kind in Kind if kind in kinds for _ in range(_WEIGHTS.get(kind, 1))]
    faults: list[Fault] = []
    for number, (kind, phase) in enumerate(
        zip(_dealt(draw, pack, count), phases, strict=True), start=1
    ):
        if kind is Kind.DAMAGE and phase not in _MOVING:
            phase = draw.choice(_MOVING)
        role = draw.choice(list(Role))
        if kind is Kind.DAMAGE:
            # Of what is pulled next.
            role = Role.HOLDER
        longest = {Phase.DECODE: DECODE_DELAY_SECONDS, Phase.RANDOM: RANDOM_DELAY_SECONDS}
        faults.append(
            Fault(
                number=number,
                kind=kind,
                phase=phase,
                role=role,
                delay_seconds=0.0
                if kind is Kind.DAMAGE
                else draw.uniform(0, longest.get(phase, DELAY_SECONDS)),
                seconds=draw.uniform(
                    *(SHORT_SECONDS if kind in (Kind.PAUSE, Kind.BLINK) else LONG_SECONDS)
                )
                if kind in LASTING
                else 0.0,
            )
        )
    return faults


def _dealt(draw: random.Random, pack: list[T], count: int) -> list[T]:
    dealt: list[T] = []
    while len(dealt) < count:
        dealt += draw.sample(pack, len(pack))
    return dealt[:count]
