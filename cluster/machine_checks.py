"""Whether machines have what Homer needs, and what to change where they do not.

Judges facts. Knows nothing about where they are from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.machine import PACKAGE, MachineFacts
from homer.report import format_bytes

Status = Literal["ok", "warn", "fail"]
OPEN_FILES_LEAST, OPEN_FILES_GOOD = 1024, 8192
SHARED_MEMORY_GOOD = 1 << 30
FREE_DISK_SHARE = 0.05
CLOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """What was found of one thing on one machine, and what to change."""

    subject: str
    status: Status
    found: str
    change: str = ""
    host: str = ""


def check_machine(facts: MachineFacts) -> list[Check]:
    """All that one machine says of itself."""
    checks = (_packages(facts), *_gpus(facts), _memory(facts), _shared(facts), _files(facts))
    return [*checks, _disk(facts)]


def check_port(host: str, port: int, free: bool) -> Check:
    """The port of the door."""
    if free:
        return Check("port", "ok", f"{host}:{port} is free")
    return Check(
        "port",
        "warn",
        f"{host}:{port} is taken",
        "by a running homer serve? else give homer serve another --port",
    )


def check_model_memory(facts: MachineFacts, need_bytes: int, *, cpu: bool) -> Check:
    """Whether one worker with the model fits on the machine's GPU, or in its main memory."""
    if facts.gpus and not cpu:
        place, free = "the freest GPU", max(gpu.free_bytes for gpu in facts.gpus)
    else:
        place, free = "main memory", facts.free_memory_bytes
    found = (
        f"a worker takes about {format_bytes(need_bytes)}, {place} has {format_bytes(free)} free"
    )
    if not free or need_bytes <= free:
        return Check("model memory", "ok", found, host=facts.host)
    return Check(
        "model memory",
        "fail",
        found,
        f"split the model (--engine transformers-tp --ranks {-(-need_bytes // free)}), quantize it "
        "(--quantization), or keep its weights elsewhere (--engine deepspeed-zero3)",
        facts.host,
    )


def check_nodes(
    nodes: Sequence[MachineFacts], clock_offsets: Mapping[str, float], silent: Mapping[str, str]
) -> list[Check]:
    """What the nodes of a cluster must agree in; `clock_offsets` are to this machine.

    `silent` are nodes that could not tell of themselves, with the reason.
    """
    checks = [one for facts in nodes for one in check_machine(facts)]
    for name in (PACKAGE, "ray", "torch", "transformers", "python"):
        by_version: dict[str, list[str]] = {}
        for facts in nodes:
            version = facts.python if name == "python" else facts.versions.get(name, "none")
            by_version.setdefault(version, []).append(facts.node or facts.host)
        found = "; ".join(f"{version} on {', '.join(on)}" for version, on in by_version.items())
        if len(by_version) == 1:
            checks.append(Check(f"{name} of all nodes", "ok", next(iter(by_version))))
        else:
            status: Status = "fail" if name in (PACKAGE, "ray") else "warn"
            checks.append(
                Check(f"{name} of all nodes", status, found, f"install one {name} on every node")
            )
    for facts in nodes:
        offset = clock_offsets.get(facts.node, 0.0)
        far = abs(offset) > CLOCK_SECONDS
        checks.append(
            Check(
                "clock",
                "warn" if far else "ok",
                f"{offset:+.3f} s from this machine's",
                "let NTP set it: log lines of several nodes come in the wrong order" if far else "",
                facts.node or facts.host,
            )
        )
    for node, reason in silent.items():
        change = "install homer-context there, with the Python of this machine"
        checks.append(Check("node", "fail", reason, change, node))
    return checks


def _packages(facts: MachineFacts) -> Check:
    shown = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    found = f"Python {facts.python}, {shown}"
    if not facts.wrong_packages:
        return Check("packages", "ok", found, host=facts.host)
    wanted = " ".join(f"'{wrong.split(' (')[0]}'" for wrong in facts.wrong_packages)
    return Check(
        "packages",
        "fail",
        f"{found}; not met: {', '.join(facts.wrong_packages)}",
        f"pip install {wanted}",
        facts.host,
    )


def _gpus(facts: MachineFacts) -> Iterator[Check]:
    if not facts.gpus and not facts.seen_gpus:
        found, change = "none", "workers need --cpu here"
        yield Check("GPU", "warn", found, change, facts.host)
        return
    driver = f"driver {facts.driver or 'unknown'}"
    if facts.torch_cuda is None:
        yield Check(
            "GPU",
            "fail",
            f"{', '.join(facts.seen_gpus)}, {driver}; torch was built without CUDA",
            "install a build of torch for CUDA (pytorch.org/get-started), or use --cpu",
            facts.host,
        )
        return
    built = f"torch is built for CUDA {_version(facts.torch_cuda)}"
    runs = f"runs CUDA {_version(facts.driver_cuda)}" if facts.driver_cuda else "of unknown CUDA"
    # Within one major version a driver runs newer minor ones too.
    if facts.driver_cuda is not None and facts.driver_cuda[0] < facts.torch_cuda[0]:
        yield Check(
            "GPU driver",
            "fail",
            f"{driver} {runs}, {built}",
            f"update the driver, or install a torch that is built for CUDA {facts.driver_cuda[0]}",
            facts.host,
        )
    if len(facts.gpus) < len(facts.seen_gpus):
        yield Check(
            "GPU",
            "fail" if not facts.gpus else "warn",
            f"torch sees {len(facts.gpus)} of {len(facts.seen_gpus)}; {driver} {runs}, {built}",
            "look at CUDA_VISIBLE_DEVICES, and at what python -c 'import torch; "
            "torch.cuda.init()' says",
            facts.host,
        )
    for number, gpu in enumerate(facts.gpus):
        free, total = format_bytes(gpu.free_bytes), format_bytes(gpu.total_bytes)
        found = f"{gpu.name}, {free} of {total} free; {driver}"
        if _has_kernels(gpu.architecture, facts.torch_architectures):
            yield Check(f"GPU {number}", "ok", f"{found}, {built}", host=facts.host)
        else:
            yield Check(
                f"GPU {number}",
                "fail",
                f"{found}; torch has no kernels for {gpu.architecture}, only for "
                f"{', '.join(facts.torch_architectures)}",
                "install a build of torch for this GPU (pytorch.org/get-started)",
                facts.host,
            )


def _has_kernels(architecture: str, built: Sequence[str]) -> bool:
    """Kernels run on the minor versions above their own; PTX (compute_*) on all that is newer."""
    own = int(architecture.removeprefix("sm_"))
    for one in built:
        kind, _, number = one.partition("_")
        digits = int("".join(filter(str.isdigit, number)) or 0)
        if kind == "compute" and digits <= own:
            return True
        if kind == "sm" and digits // 10 == own // 10 and digits <= own:
            return True
    return False


def _memory(facts: MachineFacts) -> Check:
    found = f"{format_bytes(facts.free_memory_bytes)} of {format_bytes(facts.memory_bytes)} free, "
    return Check("memory", "ok", f"{found}{facts.cores} cores", host=facts.host)


def _shared(facts: MachineFacts) -> Check:
    found = f"/dev/shm has {format_bytes(facts.shared_memory_bytes)}"
    if facts.shared_memory_bytes >= SHARED_MEMORY_GOOD:
        return Check("shared memory", "ok", found, host=facts.host)
    return Check(
        "shared memory",
        "warn",
        found,
        "Ray's object store wants 1 GiB or more: docker run --shm-size=2g, or an emptyDir of "
        "medium Memory on Kubernetes",
        facts.host,
    )


def _files(facts: MachineFacts) -> Check:
    found = f"{facts.open_files:,} open files for a process, {facts.open_files_most:,} at most"
    if facts.open_files >= OPEN_FILES_GOOD or facts.open_files < 0:
        return Check("open files", "ok", found, host=facts.host)
    return Check(
        "open files",
        "warn" if facts.open_files >= OPEN_FILES_LEAST else "fail",
        found,
        f"ulimit -n {max(OPEN_FILES_GOOD, min(65536, facts.open_files_most))} before homer serve "
        "and ray start",
        facts.host,
    )


def _disk(facts: MachineFacts) -> Check:
    found = f"{facts.free_disk_share:.0%} of the disk with temporary files is free"
    if facts.free_disk_share >= FREE_DISK_SHARE:
        return Check("disk", "ok", found, host=facts.host)
    return Check("disk", "warn", found, "make room, or set TMPDIR: Ray stops at 5%", facts.host)


def _version(pair: tuple[int, int] | None) -> str:
    return "?" if pair is None else f"{pair[0]}.{pair[1]}"
