"""What a measurement ran on: processor, cores, versions.

Knows nothing about what is measured.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import homer


@dataclass(frozen=True)
class Machine:
    """Hardware and versions, as printed above every table.

    `load` is the one-minute load average when the measurement began: more than the cores that it
    uses itself means that the figures were taken beside other work.
    """

    processor: str
    cores: int
    device: str
    load: float
    python: str
    torch: str
    transformers: str
    homer: str

    @classmethod
    def here(cls, device: str = "cpu") -> Machine:
        """This machine; `device` is the one that computes."""
        if device.startswith("cuda"):
            device = torch.cuda.get_device_name(device)
        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)),
            device=device,
            load=os.getloadavg()[0],
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            homer=homer.__version__,
        )

    def __str__(self) -> str:
        device = "" if self.device == "cpu" else f", {self.device}"
        return (
            f"{self.processor}, {self.cores} cores{device} (load {self.load:.1f}); "
            f"Python {self.python}, torch {self.torch}, transformers {self.transformers}, "
            f"homer {self.homer}"
        )


def _processor() -> str:
    """The processor's name, with AMX named where it is there: bfloat16 speed depends on it."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in facts.splitlines())
    values = {name.strip(): value.strip() for name, _, value in lines}
    name = values.get("model name") or platform.machine()
    return f"{name} with AMX" if "amx_bf16" in values.get("flags", "").split() else name
