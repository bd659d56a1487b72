"""What the service adds to the work: client, coordinator and worker beside the same in one process.

A service of one worker on a local Ray cluster, as `homer serve` starts it, and `HomerModel` in this
process answer the same prompts in turn. Knows nothing about what the parts of the service do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.client import HomerClient
from cluster.launch import ray_cluster, running_service
from cluster.options import ServeOptions
from homer.bench.bench_model import BenchSize, random_prompt, save_bench_model
from homer.encode import NodeReport, TreeEncoder
from homer.load_options import LoadOptions
from homer.loading import load_model
from homer.model import HomerModel
from homer.v1 import long_context_pb2 as pb


@dataclass(frozen=True)
class AnswerTimes:
    """Seconds until the first token, and from each token to the next on average.

    `work` is the part of the first that ran nodes and the refreshed suffix, as whoever ran them
    timed it.
    """

    first_token: float
    per_token: float
    work: float


@dataclass(frozen=True)
class OverheadResult:
    """Rounds of one prompt length, each of one process and the service."""

    tokens: int
    new_tokens: int
    alone: tuple[AnswerTimes, ...]
    service: tuple[AnswerTimes, ...]

    @property
    def first_token_seconds(self) -> float:
        """What the service adds to the time to the first token: median over the rounds."""
        return self._added(lambda times: times.first_token)

    @property
    def per_token_seconds(self) -> float:
        """What it adds to the time of each further token: median over the rounds."""
        return self._added(lambda times: times.per_token)

    @property
    def around_work_seconds(self) -> float:
        """What it adds to the time to the first token outside of the work itself: median.

        The work varies by more than this from round to round, on a machine that does other things.
        """
        return self._added(lambda times: times.first_token - times.work)

    def medians(self, seconds: Callable[[AnswerTimes], float]) -> tuple[float, float]:
        """Of one process and of the service."""
        return (
            statistics.median(seconds(times) for times in self.alone),
            statistics.median(seconds(times) for times in self.service),
        )

    def _added(self, seconds: Callable[[AnswerTimes], float]) -> float:
        pairs = zip(self.alone, self.service, strict=True)
        return statistics.median(seconds(service) - seconds(alone) for alone, service in pairs)


def measure_overhead(
    tokens: int = 1024,
    new_tokens: int = 32,
    *,
    runs: int = 25,
    size: BenchSize | None = None,
    on_run: Callable[[AnswerTimes, AnswerTimes], None] | None = None,
) -> OverheadResult:
    """Answer `runs` prompts of `tokens` tokens with `new_tokens` tokens, each way in turn."""
    size = size or BenchSize()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="homer-bench-") as folder:
            save_bench_model(Path(folder), size)
            model = HomerModel(load_model(folder, dtype="float32", device="cpu"), size.config)
            options = ServeOptions(
                model=folder,
                cpu=True,
                workers=1,
                threads=1,
                load=LoadOptions(dtype="float32"),
                port=0,
            )
            with (
                ray_cluster(None, options) as joined,
                running_service(joined) as address,
                HomerClient(address) as client,
            ):
                alone, service = [], []
                for turn in range(-1, runs):
                    prompt = random_prompt(tokens, size.vocab, seed=turn + 1)
                    mine = _alone(model, prompt, new_tokens)
                    theirs = _service(client, prompt, new_tokens)
                    if turn < 0:
                        continue  # Both ways are warm now.
                    alone.append(mine)
                    service.append(theirs)
                    if on_run is not None:
                        on_run(mine, theirs)
        return OverheadResult(tokens, new_tokens, tuple(alone), tuple(service))
    finally:
        torch.set_num_threads(before)


def _alone(
    model: HomerModel, prompt: tuple[torch.Tensor, torch.Tensor, torch.Tensor], new_tokens: int
) -> AnswerTimes:
    work = 0.0

    def on_node(report: NodeReport) -> None:
        nonlocal work
        work += report.seconds

    started = time.perf_counter()
    prefix, context_ids, suffix = prompt
    plan = model.plan(len(prefix), len(context_ids), len(suffix))
    encoder = TreeEncoder(model.stack, plan, prefix, suffix)
    root = encoder.run_subtree(plan.root.id, context_ids, on_node)
    finishing = time.perf_counter()
    context = encoder.finish(root)
    work += time.perf_counter() - finishing
    moments = _moments(model.stream(context, max_new_tokens=new_tokens, ignore_eos=True))
    return AnswerTimes(moments[0] - started, _per_token(moments), work)


def _service(
    client: HomerClient,
    prompt: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    new_tokens: int,
) -> AnswerTimes:
    prefix, context, suffix = (part.tolist() for part in prompt)
    work = 0.0
    started = time.perf_counter()
    events = client.generate(
        prefix=prefix,
        context=context,
        question=suffix,
        sampling={"max_tokens": new_tokens, "ignore_eos": True},
    )

    def tokens() -> Iterable[pb.Token]:
        nonlocal work
        for event in events:
            if isinstance(event, pb.Progress):
                work += event.seconds
            elif isinstance(event, pb.Token):
                yield event

    moments = _moments(tokens())
    return AnswerTimes(moments[0] - started, _per_token(moments), work)


def _moments(tokens: Iterable[object]) -> list[float]:
    return [time.perf_counter() for _ in tokens]


def _per_token(moments: list[float]) -> float:
    return (moments[-1] - moments[0]) / (len(moments) - 1)
