"""How much memory this process holds, by the system's own count."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


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
