"""How much memory there is to compute in: of a GPU, or of the machine within the process's limits.

Knows nothing about what takes it.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a GPU, or of the machine within this process's limits; 0 is unknown.

    Parameters
    ----------
    total_bytes : int
    free_bytes : int
        What this process can still get.
    own_bytes : int
        What this process has, and shares with no other.
    """

    total_bytes: int
    free_bytes: int
    own_bytes: int


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory of `device` as it is now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(int(total), int(free), torch.cuda.memory_reserved(device))
    known = [memory for memory in (_machine(), _control_group()) if memory is not None]
    return DeviceMemory(
        total_bytes=min((total for total, _ in known), default=0),
        free_bytes=min((free for _, free in known), default=0),
        own_bytes=_private_bytes(),
    )


def least_memory(devices: Iterable[torch.device]) -> DeviceMemory:
    """The memory of that device which has least of it free.

    Rows of a layer lie on the layer's device, and all layers of a leaf may be on one: what fits
    there fits whatever else is on the others.
    """
    return min(
        (device_memory(device) for device in dict.fromkeys(devices)),
        key=lambda memory: memory.free_bytes,
    )


def _private_bytes() -> int:
    if not _STATM.exists():
        return 0
    _, resident, shared = _STATM.read_text().split()[:3]
    return (int(resident) - int(shared)) * resource.getpagesize()


def _machine() -> tuple[int, int] | None:
    """All memory of the machine, and what is available of it."""
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, free


def _control_group() -> tuple[int, int] | None:
    """The control group's limit (a container's) and what it leaves, by version 2 or 1."""
    for limit, usage in _CGROUP_FILES:
        if limit.exists() and usage.exists():
            allowed = limit.read_text().strip()
            if allowed.isdigit():
                return int(allowed), max(0, int(allowed) - int(usage.read_text()))
    return None
