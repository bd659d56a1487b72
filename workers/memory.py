"""How much memory this process holds, by the system's own count."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)


def resident_bytes() -> int:
    """Resident memory now; where the system does not tell, the most that it ever was."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def accelerator_bytes() -> int:
    """Memory that tensors hold on all GPUs of this process; 0 without any."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count()))


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still get: of the GPU, or of the machine within its limits.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [found for found in (_available_bytes(), _below_limit_bytes()) if found is not None]
    return min(found, default=0)


def _available_bytes() -> int | None:
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _below_limit_bytes() -> int | None:
    """What the control group (a container's limit) leaves, by version 2 or 1 of their files."""
    for limit, usage in _CGROUP_FILES:
        if limit.exists() and usage.exists():
            allowed = limit.read_text().strip()
            if allowed.isdigit():
                return max(0, int(allowed) - int(usage.read_text()))
    return None
