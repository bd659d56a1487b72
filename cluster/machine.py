"""What a machine has that Homer needs, as plain facts. Knows nothing about what is enough."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

PACKAGE = "homer-context"
_SHARED_MEMORY = Path("/dev/shm")
_SMI_SECONDS = 20.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    total_bytes: int
    free_bytes: int
    architecture: str


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """One machine, as a process on it sees it.

    Parameters
    ----------
    host, node : str
        Its name, and its address on a Ray cluster.
    clock : float
        Seconds since 1970 when this was made.
    wrong_packages : tuple of str
        Requirements of Homer that are not met, and what is there instead.
    seen_gpus : tuple of str
        GPUs that the driver has, whether torch can use them or not.
    driver_cuda, torch_cuda : tuple of int, optional
        The newest CUDA that the driver runs, and the one that torch was built for.
    torch_architectures : tuple of str
        What torch has kernels for, like sm_90.
    memory_bytes, free_memory_bytes, shared_memory_bytes : int
        Main memory within this process's limits, and `/dev/shm`; 0 is unknown.
    """

    host: str
    node: str = ""
    clock: float = 0.0
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    wrong_packages: tuple[str, ...] = ()
    cores: int = 0
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    shared_memory_bytes: int = 0
    open_files: int = 0
    open_files_most: int = 0
    free_disk_share: float = 1.0
    seen_gpus: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None
    torch_cuda: tuple[int, int] | None = None
    torch_architectures: tuple[str, ...] = ()

    @classmethod
    def here(cls, node: str = "") -> MachineFacts:
        """The machine that this runs on."""
        import torch

        from homer.memory import device_memory

        memory = device_memory(torch.device("cpu"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        disk = shutil.disk_usage(os.environ.get("TMPDIR", "/tmp"))
        names, driver = _driver_gpus()
        return cls(
            host=socket.gethostname(),
            node=node,
            clock=time.time(),
            python=platform.python_version(),
            versions=_versions(),
            wrong_packages=_wrong_packages(),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=memory.total_bytes,
            free_memory_bytes=memory.free_bytes,
            shared_memory_bytes=(
                shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else 0
            ),
            open_files=soft,
            open_files_most=hard,
            free_disk_share=disk.free / disk.total,
            seen_gpus=names,
            gpus=_torch_gpus(),
            driver=driver,
            driver_cuda=_driver_cuda(),
            torch_cuda=_version_pair(torch.version.cuda),
            torch_architectures=tuple(torch.cuda.get_arch_list()),
        )


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _versions() -> dict[str, str]:
    """The packages in which processes of one service have to agree."""
    found = {}
    for name in (PACKAGE, "ray", "torch", "transformers", "grpcio"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _wrong_packages() -> tuple[str, ...]:
    from packaging.requirements import Requirement

    try:
        required = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return ()
    wrong = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} (none is installed)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} ({version} is installed)")
    return tuple(wrong)


def _torch_gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found.append(Gpu(name, int(total), int(free), f"sm_{major}{minor}"))
    return tuple(found)


def _driver_gpus() -> tuple[tuple[str, ...], str]:
    """Names of the GPUs that NVIDIA's driver has, and its version."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return (), ""
    lines = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return tuple(name.strip() for name, _ in lines), lines[0][1].strip() if lines else ""


def _driver_cuda() -> tuple[int, int] | None:
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def _version_pair(text: str | None) -> tuple[int, int] | None:
    if not text:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
