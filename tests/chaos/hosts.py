"""Machines for workers: where a process listens, how it is reached, and how its network fails.

Here those of one machine, with links in between; `namespaces.py` has those with a network of their
own. Knows nothing about workers.
"""

from __future__ import annotations

import random
from typing import Protocol

from tests.chaos.faults import Kind
from tests.chaos.link import LOOPBACK, Link

SLOW_BYTES_PER_SECOND = 100_000.0
FLIPS = 1


class Host(Protocol):
    """A machine that one worker runs on."""

    name: str
    listen: str
    # What a command line begins with that runs there.
    prefix: list[str]

    async def expose(self, port: int) -> tuple[str, str]:
        """The addresses of a process there: for the coordinator, and for other workers."""
        ...

    async def fail(self, kind: Kind) -> None:
        """Let its network fail, until `heal`."""
        ...

    async def heal(self) -> bool:
        """Let it be whole again; returns whether the failure was felt."""
        ...

    async def close(self) -> None: ...


class LoopbackHost:
    """A process of this machine behind two links: one for the coordinator, one for workers."""

    kinds = frozenset({Kind.BLINK, Kind.CUT, Kind.CUT_PEERS, Kind.SLOW, Kind.RESET, Kind.DAMAGE})

    def __init__(self, name: str, draw: random.Random) -> None:
        self.name = name
        self.listen = LOOPBACK
        self.prefix: list[str] = []
        self._draw = draw
        self._links: list[Link] = []

    async def expose(self, port: int) -> tuple[str, str]:
        await self.close()
        self._links = [Link(port, self._draw), Link(port, self._draw)]
        control, peers = [await link.open() for link in self._links]
        return control, peers

    async def fail(self, kind: Kind) -> None:
        if not self._links:
            return
        peers = self._links[1]
        match kind:
            case Kind.BLINK | Kind.CUT:
                for link in self._links:
                    link.cut()
            case Kind.CUT_PEERS:
                peers.cut()
            case Kind.SLOW:
                for link in self._links:
                    link.slow(SLOW_BYTES_PER_SECOND)
            case Kind.RESET:
                for link in self._links:
                    link.reset()
            case Kind.DAMAGE:
                peers.damage(FLIPS)
            case _:
                raise ValueError(f"no network fails by {kind}")

    async def heal(self) -> bool:
        felt = not any(link.damages for link in self._links)
        for link in self._links:
            link.heal()
        return felt

    async def close(self) -> None:
        links, self._links = self._links, []
        for link in links:
            await link.close()
