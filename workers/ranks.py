"""A model over several processes as one worker: rank 0, which talks to others.

Rank 0 is the worker's process. It starts the other ranks on the same machine, and tells each of
them, in lines of JSON on a pipe, everything that it does with the model; they do the same with
their own heads (`follower.py`). What is there on all ranks has one name on all of them: a `Handle`
here, and when that is gone the others drop theirs. Where one rank fails all end: what they hold
would not fit together any more.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from homer.errors import HomerError
from workers.options import WorkerOptions

_log = logging.getLogger(__name__)

EXIT_RANK_LOST = 70
STOP_SECONDS = 10.0
# Longer than any step: who waits so long for the others waits for ever.
STEP_SECONDS = 900.0


class Handle:
    """The name, on all ranks, of something that each of them has."""

    def __init__(self, key: str, group: RankGroup) -> None:
        self.key = key
        self._group = group
        weakref.finalize(self, group.gone.put, key).atexit = False

    def copy(self) -> Handle:
        """A shard's copy on the other ranks."""
        copied = self._group.new_handle()
        self._group.tell("copy", of=self.key, key=copied.key)
        return copied

    def select(self, kept: torch.Tensor) -> None:
        """Drop the rows of a shard that are not in `kept`, on the other ranks."""
        self._group.tell("select", of=self.key, kept=kept.tolist())


class RankGroup:
    """The other ranks of this worker, as rank 0 sees them.

    Parameters
    ----------
    options : WorkerOptions
        With `ranks` of them in all.
    """

    def __init__(self, options: WorkerOptions) -> None:
        # A queue that may be filled in the middle of anything, garbage collection included.
        self.gone: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._keys = itertools.count()
        self._writing = threading.Lock()
        self._closing = False
        self._folder = tempfile.TemporaryDirectory(prefix="homer-ranks-")
        self._followers = [self._start(rank, options) for rank in range(1, options.ranks)]
        for rank, follower in enumerate(self._followers, 1):
            watch = threading.Thread(
                target=self._watch, args=(rank, follower), name=f"homer-rank-{rank}", daemon=True
            )
            watch.start()
        threading.Thread(target=self._drop_gone, name="homer-ranks-drop", daemon=True).start()
        try:
            join_ranks(options, 0, Path(self._folder.name))
        except BaseException:
            self.close()
            raise

    def new_handle(self) -> Handle:
        """A name that nothing has yet."""
        return Handle(str(next(self._keys)), self)

    def tell(self, operation: str, **arguments: Any) -> None:
        """Have all other ranks do something, after all that they were told before."""
        line = json.dumps({"do": operation, **arguments}).encode() + b"\n"
        with self._writing:
            for rank, follower in enumerate(self._followers, 1):
                assert follower.stdin is not None
                try:
                    follower.stdin.write(line)
                    follower.stdin.flush()
                except (OSError, ValueError) as error:
                    if self._closing:
                        return
                    self._fail(f"rank {rank} cannot be told anything any more ({error})")

    @contextmanager
    def together(self, operation: str, **arguments: Any) -> Iterator[None]:
        """Inside, rank 0 does what the others are told here to do.

        An error of ours comes from the request, and is the same on all ranks. Anything else is not.
        """
        self.tell(operation, **arguments)
        try:
            yield
        except HomerError:
            raise
        except Exception as error:
            _log.exception("rank 0 failed in the middle of %r", operation)
            self._fail(f"rank 0 failed: {error}")

    def close(self) -> None:
        """End the other ranks."""
        self._closing = True
        self.gone.put(None)
        for follower in self._followers:
            assert follower.stdin is not None
            with suppress(OSError):
                follower.stdin.close()
        for follower in self._followers:
            try:
                follower.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                follower.kill()
                follower.wait()
        self._folder.cleanup()

    def _start(self, rank: int, options: WorkerOptions) -> subprocess.Popen[bytes]:
        follower = subprocess.Popen(
            [sys.executable, "-m", "workers.follower"],
            stdin=subprocess.PIPE,
            # What a worker prints is for whoever started it.
            stdout=2,
            # It finds the code where this process found it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        told = dataclasses.asdict(options)
        # They have no port.
        del told["security"], told["metrics_security"]
        first = {"options": told, "rank": rank, "folder": self._folder.name}
        assert follower.stdin is not None
        follower.stdin.write(json.dumps(first).encode() + b"\n")
        follower.stdin.flush()
        return follower

    def _watch(self, rank: int, follower: subprocess.Popen[bytes]) -> None:
        status = follower.wait()
        if not self._closing:
            self._fail(f"rank {rank} (process {follower.pid}) ended with status {status}")

    def _drop_gone(self) -> None:
        while (key := self.gone.get()) is not None:
            keys = [key]
            while not self.gone.empty() and (key := self.gone.get()) is not None:
                keys.append(key)
            self.tell("drop", keys=keys)
            if key is None:
                return

    def _fail(self, reason: str) -> None:
        """End this process: whoever keeps the worker alive starts it again, with all its ranks."""
        _log.critical("%s; the ranks of a worker live and end together, so it ends", reason)
        print(f"error: {reason}; the worker ends", file=sys.stderr, flush=True)
        os._exit(EXIT_RANK_LOST)


def join_ranks(options: WorkerOptions, rank: int, folder: Path) -> None:
    """Join the process group of a worker's ranks; returns when all are there."""
    # All ranks are on this machine.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpu = options.load.device != "cpu" and torch.cuda.is_available()
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        # A file in a folder of our own: nothing listens for strangers.
        store=FileStore(str(folder / "store"), options.ranks),
        rank=rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=STEP_SECONDS),
    )


def encode_message(message: Any) -> str:
    """A protobuf message as text."""
    return base64.b64encode(message.SerializeToString()).decode()
