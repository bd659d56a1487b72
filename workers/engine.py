"""The model of a worker and the one thread that runs it.

Knows nothing about requests, gRPC or peers.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from homer.bias import find_bias, load_bias, warn_uncalibrated
from homer.context import CompressedContext
from homer.decode import DecodeCache, decode_step
from homer.encode import TreeEncoder
from homer.loading import LoadReport, load_model
from homer.parallel import load_on_ranks
from homer.plan import MergePlan
from homer.stack import LayerStack
from homer.state import KVShard, NodeState
from homer.v1 import worker_pb2
from workers.errors import is_out_of_memory
from workers.options import WorkerOptions
from workers.tensor_stream import Spec
from workers.wire import gather_tensors

T = TypeVar("T")

NEXT_STEP_SECONDS = 0.002


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its calibration bias if there is one, and what loading it took."""

    path: str
    stack: LayerStack
    bias: torch.Tensor | None
    report: LoadReport

    @classmethod
    def load(cls, options: WorkerOptions) -> LoadedModel:
        """Load what `options` name, or this rank's part of it.

        Raises
        ------
        ModelError, BiasError, ConfigError
            When the model or its bias cannot be used.
        """
        if options.threads:
            torch.set_num_threads(options.threads)
        started = time.perf_counter()
        if options.engine == "torch":
            model = load_model(options.model, options.loading)
        else:
            model = load_on_ranks(
                options.model, options.engine, options.load, offload=options.zero_offload
            )
        report = LoadReport.of(model, time.perf_counter() - started)
        stack = LayerStack(model)
        bias_path = options.bias or find_bias(options.model, options.load.revision)
        bias = None
        if bias_path is None:
            warn_uncalibrated()
        else:
            bias = load_bias(
                bias_path, num_layers=stack.num_layers, hidden_size=stack.hidden_size
            ).to(stack.device)
        return cls(path=options.model, stack=stack, bias=bias, report=report)

    @property
    def max_distance(self) -> int:
        """Largest distance that the bias covers; 0 without one."""
        return 0 if self.bias is None else self.bias.shape[1] - 1

    def encoder(
        self,
        spec: worker_pb2.RequestSpec,
        plan: MergePlan,
        prefix_ids: torch.Tensor,
        suffix_ids: torch.Tensor,
    ) -> TreeEncoder:
        """What runs the nodes of a request."""
        return TreeEncoder(self.stack, plan, prefix_ids, suffix_ids, self.bias)

    def decode_cache(
        self, context: CompressedContext, room_tokens: int, beside: bool = False
    ) -> DecodeCache:
        """A cache for an answer of so many tokens: in the context's own room where it has that.

        One that is decoded `beside` another has memory of its own.
        """
        if context.room_tokens >= room_tokens and not beside:
            return DecodeCache.over(context)
        return DecodeCache.copy_of(context, room_tokens)

    def decode(self, tokens: Sequence[int], caches: Sequence[DecodeCache]) -> torch.Tensor:
        """One decode step; logits of shape (answers, vocab)."""
        return decode_step(self.stack, tokens, caches)

    async def rows(
        self, engine: Engine, shards: Sequence[KVShard], kept: torch.Tensor
    ) -> tuple[list[Spec], Iterable[torch.Tensor]]:
        """The rows of `shards` that are in `kept`, of all heads, as they travel."""
        return await engine.move(gather_tensors, shards, kept, self.stack)

    async def whole_state(self, engine: Engine, state: NodeState) -> NodeState:
        """A state with the suffix rows of all heads."""
        return state

    def close(self) -> None:
        """Let go of what runs beside this process."""


class Engine:
    """Two threads beside the event loop: one for model runs, one for moving tensors.

    Whatever runs the model asks for one step at a time. There are two kinds of work, which share
    the compute thread by time: nodes of trees (`step`), one after the other in the order in which
    they were asked for; and answers, that is the last steps to a final cache (`answer_step`) and,
    after those, decode steps (`decode`), which give a token to every answer at once. Where both
    wait, the kind that has run for less time is next. So an answer beside a long document gets half
    of the thread, and never waits longer than about two nodes; and a document beside many answers
    goes on at half of its speed. Neither kind saves up the time that it did not need: one is never
    further ahead than the longest step lasts.

    What other workers ask for is served by the second thread and never waits for the model.
    """

    def __init__(self) -> None:
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="homer-compute")
        self.io = ThreadPoolExecutor(1, thread_name_prefix="homer-io")
        self._asked = threading.Condition()
        self._nodes: deque[Callable[[], None]] = deque()
        self._answers: deque[Callable[[], None]] = deque()
        self._decode: Callable[[], bool] | None = None
        self._last: deque[Callable[[], None]] | None = None
        # Seconds by which answers have run longer than nodes, and those of the longest step lately.
        self._answers_ahead = 0.0
        self._longest = 0.0

    async def step(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function`, a node's step, in the compute thread."""
        return await self._wait_for(self._nodes, function, *args)

    async def answer_step(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function`, a step of one answer, in the compute thread."""
        return await self._wait_for(self._answers, function, *args)

    def decode(self, step: Callable[[], bool]) -> None:
        """Have `step` called in the compute thread until it returns False; from any thread.

        There is one such step at a time: calls while it is waiting change nothing.
        """
        with self._asked:
            if self._decode is not None:
                return
            self._decode = step
        self._compute.submit(self._turn)

    async def move(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function`, which runs no model, in the second thread."""
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self.io, run, function, *args)

    def close(self) -> None:
        """Let both threads end after the step that they are at."""
        self._compute.shutdown(wait=False, cancel_futures=True)
        self.io.shutdown(wait=False, cancel_futures=True)

    async def _wait_for(
        self, queue: deque[Callable[[], None]], function: Callable[..., T], *args: Any
    ) -> T:
        future: Future[T] = Future()
        # What a step logs is about what its caller is about.
        run = contextvars.copy_context().run

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(run(function, *args))
                except BaseException as error:
                    if is_out_of_memory(error) and torch.cuda.is_available():
                        # What other sizes left behind may be just what the next step needs.
                        torch.cuda.empty_cache()
                    future.set_exception(error)

        with self._asked:
            queue.append(work)
            self._asked.notify()
        self._compute.submit(self._turn)
        return await asyncio.wrap_future(future)

    def _turn(self) -> None:
        """Run what is next. There are as many turns waiting as there is work."""
        with self._asked:
            # Who has just run a step asks for the next one in a moment; it shall not lose its turn
            # for that.
            behind = self._nodes if self._answers_ahead > 0 else self._answers
            if behind is self._last:
                self._asked.wait_for(lambda: behind, NEXT_STEP_SECONDS)
            answers_wait = bool(self._answers) or self._decode is not None
            is_answer = answers_wait and (not self._nodes or self._answers_ahead <= 0)
            decode = None
            if is_answer and not self._answers:
                decode, self._decode, self._last = self._decode, None, None
            elif is_answer or self._nodes:
                self._last = self._answers if is_answer else self._nodes
                work = self._last.popleft()
            else:
                return
        started = time.perf_counter()
        if decode is None:
            work()
        elif decode():
            self._decode_again(decode)
        seconds = time.perf_counter() - started
        self._longest = max(seconds, 0.9 * self._longest)
        ahead = self._answers_ahead + (seconds if is_answer else -seconds)
        self._answers_ahead = min(max(ahead, -self._longest), self._longest)

    def _decode_again(self, step: Callable[[], bool]) -> None:
        try:
            self.decode(step)
        except RuntimeError:
            # Closed in the meantime: what waits for tokens has been stopped.
            with self._asked:
                self._decode = None
