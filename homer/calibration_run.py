"""Calibration as a run of several processes that goes on where it was stopped.

Each process scores chunks; this one adds them up, always in the order of the text, so that the
result does not depend on how many there are. What is added up so far is in a file after each chunk.
Knows nothing about texts and tokenizers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from homer import __version__
from homer.calibration import MeanScores, chunk_scores
from homer.errors import ConfigError, HomerError
from homer.load_options import LoadOptions
from homer.loading import load_model
from homer.shape import load_config
from homer.stack import LayerStack

_METADATA_KEY = "homer"


@dataclass(frozen=True, kw_only=True)
class CalibrationRun:
    """What to measure, and with what.

    Parameters
    ----------
    model : str
        A folder in Hugging Face format, or a model id.
    chunks : sequence of sequences of int
        Token ids of ordinary text, all of one length.
    prefix_ids : sequence of int
        Put before each chunk.
    state_file : Path
        Holds what is added up so far, and is gone when all is done.
    workers : int
        Processes, each with a model of its own; on GPUs they take turns.
    threads : int
        CPU threads of each. Another number changes results in their last digits.
    load : LoadOptions
        How each loads the model.
    """

    model: str
    # No tensors: between processes those travel as handles, which need room in /dev/shm.
    chunks: Sequence[Sequence[int]]
    prefix_ids: Sequence[int]
    state_file: Path
    workers: int = 1
    threads: int = 1
    load: LoadOptions = field(default_factory=LoadOptions)

    def identity(self) -> str:
        """Equal where the scores of each chunk must be equal."""
        facts = {
            "homer": __version__,
            "model": _model_identity(self.model, self.load),
            "prefix": self.prefix_ids,
            "chunks": self.chunks,
            "threads": self.threads,
            "load": {**asdict(self.load), "token": None},
        }
        return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())


def run_calibration(run: CalibrationRun, on_chunk: Callable[[int], None]) -> torch.Tensor:
    """Measure a bias of shape (num_layers, chunk_len), float32; a stopped run goes on.

    `on_chunk` gets the number of chunks done, at the start those of earlier runs.

    Raises
    ------
    ConfigError
        When the state file is of another run.
    ModelError, HomerError
        When the model cannot be loaded; when a process ended.
    """
    identity = run.identity()
    done = _read_state(run.state_file, identity, len(run.chunks))
    on_chunk(done.chunks if done else 0)
    left = range(done.chunks if done else 0, len(run.chunks))
    scores = _scored_here(run, left) if run.workers == 1 else _scored_by_processes(run, left)
    with closing(scores):
        for chunk in scores:
            done = done or MeanScores(*chunk.shape)
            done.add(chunk)
            _write_state(run.state_file, identity, done)
            on_chunk(done.chunks)
    assert done is not None
    return done.mean


def _model_identity(model: str, load: LoadOptions) -> list[Any]:
    folder = Path(model)
    if not folder.is_dir():
        return [model, getattr(load_config(model, **load.hub), "_commit_hash", None)]
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")]
    about = [(file.name, file.stat()) for file in files if file.name != "bias.safetensors"]
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in about]
    return [(folder / "config.json").read_text(encoding="utf-8"), weights]


def _read_state(path: Path, identity: str, samples: int) -> MeanScores | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_METADATA_KEY])
            total = file.get_tensor("total")
        chunks = int(about["chunks"])
        fits = about["identity"] == identity and 0 < chunks <= samples
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        fits = False
    if not fits:
        raise ConfigError(
            f"{path} is what another calibration left unfinished (other text, model, settings or "
            "version of Homer): run that one again to finish it, or start over with --fresh"
        )
    done = MeanScores(*total.shape)
    done.total, done.chunks = total, chunks
    return done


def _write_state(path: Path, identity: str, done: MeanScores) -> None:
    about = json.dumps({"identity": identity, "chunks": done.chunks})
    new = path.with_name(path.name + ".new")
    save_file({"total": done.total}, new, metadata={_METADATA_KEY: about})
    # Whenever this process is killed, there is a whole file.
    new.replace(path)


class _Scorer:
    """One process's model."""

    def __init__(self, run: CalibrationRun, number: int) -> None:
        torch.set_num_threads(run.threads)
        device = run.load.device
        if device == "auto" and torch.cuda.is_available():
            device = f"cuda:{number % torch.cuda.device_count()}"
        self.run = run
        self.stack = LayerStack(load_model(run.model, run.load, device=device))

    def score(self, chunk: int) -> torch.Tensor:
        ids, prefix_ids = torch.tensor(self.run.chunks[chunk]), torch.tensor(self.run.prefix_ids)
        return chunk_scores(self.stack, ids, prefix_ids.to(ids.dtype))


def _scored_here(run: CalibrationRun, left: range) -> Generator[torch.Tensor]:
    threads = torch.get_num_threads()
    try:
        if left:
            yield from map(_Scorer(run, 0).score, left)
    finally:
        torch.set_num_threads(threads)


def _scored_by_processes(run: CalibrationRun, left: range) -> Generator[torch.Tensor]:
    # Forked from a process that has torch and has run nothing: its threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    numbers: Any = context.SimpleQueue()
    for number in range(run.workers):
        numbers.put(number)
    pool = ProcessPoolExecutor(run.workers, context, _start_process, (run, numbers))
    waiting: deque[Future[Any]] = deque()
    chunks = iter(left)
    try:
        # A slow first one must not let all others pile up behind it.
        for chunk in islice(chunks, 2 * run.workers):
            waiting.append(pool.submit(_score, chunk))
        while waiting:
            yield torch.from_numpy(waiting.popleft().result())
            for chunk in islice(chunks, 1):
                waiting.append(pool.submit(_score, chunk))
    except BrokenProcessPool as error:
        raise HomerError(
            "a process of the calibration ended, perhaps for want of memory: run the same again "
            "with fewer --workers; what is done is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_start: tuple[CalibrationRun, int]
_scorer: _Scorer | None = None


def _start_process(run: CalibrationRun, numbers: Any) -> None:
    global _start
    # Ctrl-C ends it at once, and so does the end of the process that asks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start = run, numbers.get()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _score(chunk: int) -> Any:
    global _scorer
    # Not when the process starts: there, a model that cannot be loaded would have no error.
    _scorer = _scorer or _Scorer(*_start)
    return _scorer.score(chunk).numpy()
