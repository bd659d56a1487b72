"""Links with a latency and a bandwidth; the workers of a host share its network card.

Each direction of a card moves one transfer at a time, in the order in which they were asked for. So
a transfer takes longer the more is before it at either end, and the sum over a card is never more
than its bandwidth. Knows nothing about what is moved.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

GIGABIT = 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Settings of a `Network`. The defaults are hosts of 8 workers with 100 Gbit/s between them.

    Parameters
    ----------
    latency_seconds : float
        From one host to another, one way.
    bytes_per_second : float
        Of each direction of a host's network card.
    local_latency_seconds, local_bytes_per_second : float
        Between workers of one host.
    workers_per_host : int
    call_seconds : float
        What a call adds at its two ends: threads woken, messages made and read.
    """

    latency_seconds: float = 50e-6
    bytes_per_second: float = 100 * GIGABIT
    local_latency_seconds: float = 10e-6
    local_bytes_per_second: float = 4e9
    workers_per_host: int = 8
    call_seconds: float = 1.5e-3


@dataclass
class _Line:
    """One direction of a card, or the memory of a host."""

    free_at: float = 0.0
    busy_seconds: float = 0.0


@dataclass
class Network:
    """Moves bytes between workers that are told apart by their number."""

    options: NetworkOptions = field(default_factory=NetworkOptions)
    moved_bytes: int = 0
    _out: dict[int, _Line] = field(default_factory=lambda: defaultdict(_Line))
    _in: dict[int, _Line] = field(default_factory=lambda: defaultdict(_Line))
    _local: dict[int, _Line] = field(default_factory=lambda: defaultdict(_Line))

    async def move(self, source: int, target: int, nbytes: int) -> None:
        """Move `nbytes` from worker `source` to worker `target`; returns when they are there."""
        options, now = self.options, asyncio.get_running_loop().time()
        hosts = source // options.workers_per_host, target // options.workers_per_host
        if hosts[0] == hosts[1]:
            lines = [self._local[hosts[0]]]
            rate, latency = options.local_bytes_per_second, options.local_latency_seconds
        else:
            lines = [self._out[hosts[0]], self._in[hosts[1]]]
            rate, latency = options.bytes_per_second, options.latency_seconds
        seconds = nbytes / rate
        start = max(now, *(line.free_at for line in lines))
        for line in lines:
            line.free_at = start + seconds
            line.busy_seconds += seconds
        self.moved_bytes += nbytes
        await asyncio.sleep(start + seconds + latency + options.call_seconds - now)

    async def order(self) -> None:
        """A small message from the coordinator to a worker, or back."""
        await asyncio.sleep(self.options.latency_seconds + self.options.call_seconds / 2)

    @property
    def busiest_seconds(self) -> float:
        """Of the line that was busy longest."""
        lines = (*self._out.values(), *self._in.values(), *self._local.values())
        return max((line.busy_seconds for line in lines), default=0.0)
