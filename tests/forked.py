"""Python programs that start at once: forked from a process that has imported torch already.

Importing torch and transformers is most of what a worker on a tiny model costs, and tests start
dozens. Such a program is a process of its own like any other; `tests/workers/test_process.py` also
starts one as a user does.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from typing import IO, Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["homer.model", "homer.parallel", "workers.server"])


class ForkedProgram:
    """What `subprocess.Popen([python, "-m", module, *arguments], stdout=PIPE, text=True)` would be.

    Of its methods, those that tests need.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        stderr: IO[Any] | None = None,
    ) -> None:
        reader, writer = os.pipe()
        self.stdout = os.fdopen(reader)
        fds = [writer, 2 if stderr is None else stderr.fileno()]
        self._process = _CONTEXT.Process(
            target=_run,
            args=(module, list(arguments), dict(env), [DupFd(fd) for fd in fds]),
            daemon=True,
        )
        self._process.start()
        os.close(writer)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """A descriptor that can be read once the program has ended."""
        return self._process.sentinel

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], env: dict[str, str], fds: list[Any]) -> None:
    for number, fd in enumerate(fds, start=1):
        os.dup2(fd.detach(), number)
    # The streams that were made before they led anywhere.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main())
