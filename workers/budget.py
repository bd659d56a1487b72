"""The memory budget of a worker: work is refused before it takes memory that is not there.

Knows nothing about models or plans.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from homer.errors import ConfigError
from workers.errors import MemoryBudgetError

if TYPE_CHECKING:
    # It needs torch, which the command line does not wait for.
    from homer.memory import DeviceMemory

# The rest is for allocators' slack, buffers of calls, and other programs.
AUTO_PART = 0.8
_UNITS = {
    "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """A number of bytes from text like "4GiB", "500MB" or "123456".

    Raises
    ------
    ConfigError
        When it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is no amount of memory; write it like 4GiB, 500MB or 123456")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def automatic_bytes(memory: DeviceMemory, share: float = 1.0) -> int:
    """A budget for a worker that has loaded its model, where `share` of `memory` is its own.

    What is free may be so only until the others have loaded theirs: it counts as far as this
    worker's part of the whole has room beside what it has taken. 0 where the system does not tell
    what is free.

    Raises
    ------
    ConfigError
        When the model alone takes more than the share.
    """
    if not memory.free_bytes:
        return 0
    if share == 1.0:
        return int(AUTO_PART * memory.free_bytes)
    room = share * memory.total_bytes - memory.own_bytes
    if room <= 0:
        raise ConfigError(
            f"a worker with its model takes {_mib(memory.own_bytes)}, but {share:.2g} of "
            f"{_mib(memory.total_bytes)} is its share of the memory: put fewer workers on a "
            "node or GPU, or set --memory-budget"
        )
    return int(AUTO_PART * min(room, share * memory.free_bytes))


class Reserved:
    """What work has taken; it may give back parts of it before it ends."""

    def __init__(self, budget: Budget, nbytes: int) -> None:
        self._budget = budget
        self.nbytes = nbytes
        budget.reserved_bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """Let others have `nbytes` of it."""
        self.nbytes -= nbytes
        self._budget.reserved_bytes -= nbytes


class Budget:
    """What all requests of a worker together may take.

    Parameters
    ----------
    held : callable
        Bytes that are held for requests now.
    total_bytes : int
        0 is no limit.
    """

    def __init__(self, held: Callable[[], int], total_bytes: int = 0) -> None:
        self.total_bytes = total_bytes
        self.reserved_bytes = 0
        self._held = held

    @property
    def free_bytes(self) -> int | None:
        """What is neither held nor reserved; None where there is no limit."""
        if not self.total_bytes:
            return None
        return max(0, self.total_bytes - self._held() - self.reserved_bytes)

    @contextmanager
    def reserve(self, need_bytes: int, what: str, spare_bytes: int = 0) -> Iterator[Reserved]:
        """Take `need_bytes` for work inside the block, and leave `spare_bytes` free beside it.

        Raises
        ------
        MemoryBudgetError
            When they are not there; the message has the numbers, and what to change.
        """
        held = self._held()
        wanted = held + self.reserved_bytes + need_bytes + spare_bytes
        if self.total_bytes and wanted > self.total_bytes:
            alone = need_bytes + spare_bytes > self.total_bytes
            advice = (
                "it fits on no worker like this: raise --memory-budget, or lower max_chunk_len, "
                "target_len or max_tokens"
                if alone
                else "try again when other work is done, on another worker, or raise "
                "--memory-budget"
            )
            spare = f" and {_mib(spare_bytes)} left free for merges" if spare_bytes else ""
            raise MemoryBudgetError(
                f"{what} needs {_mib(need_bytes)}{spare}, but of a budget of "
                f"{_mib(self.total_bytes)} {_mib(held)} are held and {_mib(self.reserved_bytes)} "
                f"reserved; {advice}"
            )
        reserved = Reserved(self, need_bytes)
        try:
            yield reserved
        finally:
            reserved.give_back(reserved.nbytes)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
