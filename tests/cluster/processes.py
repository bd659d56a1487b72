"""Starting commands as a user would, and finding what they leave behind."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.cluster.conftest import poll

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]
END_SECONDS = 120.0
# What `ray start` keeps for its workers, and refuses for anything else.
RAY_WORKER_PORTS = range(10002, 20000)


class Sandbox:
    """An environment whose mark every process started in it inherits."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._mark = f"HOMER_TEST_SANDBOX={folder}"
        # A cluster that this process has joined is none of the command's business.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = {
            **inherited,
            "HOMER_TEST_SANDBOX": folder,
            "TMPDIR": folder,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """Start a command from the repository's root, with pipes."""
        return subprocess.Popen(  # type: ignore[call-overload]
            command,
            env=self.env,
            cwd=REPOSITORY,
            text=True,
            # A shell starts background jobs with Ctrl-C ignored, and that is inherited.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def run(self, *command: str, seconds: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            command,
            env=self.env,
            cwd=REPOSITORY,
            text=True,
            capture_output=True,
            timeout=seconds,
            check=False,
        )

    def processes(self) -> dict[int, str]:
        """Command lines of the living processes that were started in here, by process id."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
        return {pid: line for pid, line in found.items() if line}

    def assert_empty(self) -> None:
        """Nothing runs any more, and no cluster's folder is left."""
        poll(lambda: not self.processes(), "processes go on", END_SECONDS)
        assert list(self.folder.glob("homer-*")) == []

    def kill(self) -> None:
        """End whatever still runs in here."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """A sandbox with a short path: those of Ray's sockets are limited to 107 characters."""
    folder = tempfile.mkdtemp(prefix="hs", dir="/tmp")
    box = Sandbox(folder)
    try:
        yield box
    finally:
        box.kill()
        shutil.rmtree(folder, ignore_errors=True)


class Lines:
    """The lines that a process writes, read in the background so that it never waits for us."""

    def __init__(self, stream: Any) -> None:
        self.lines: list[str] = []
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.append(line)

    def find(self, pattern: str) -> re.Match[str] | None:
        return next(filter(None, (re.search(pattern, line) for line in list(self.lines))), None)

    def wait_for(self, pattern: str, seconds: float = END_SECONDS) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while (found := self.find(pattern)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {''.join(self.lines)}"
            time.sleep(0.02)
        return found


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, of those that neither the system nor Ray gives away."""
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 32768
    # Where the system gives away all that Ray leaves, a port is as good as its neighbour.
    first = first if first > RAY_WORKER_PORTS.stop else 65536
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(RAY_WORKER_PORTS.stop, first)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)


def accepts(port: int) -> bool:
    """Whether something on this machine listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
