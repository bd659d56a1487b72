"""The model of a worker and the one thread that runs it.

Knows nothing about requests, gRPC or peers.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from homer.bias import find_bias, load_bias
from homer.loading import load_model
from homer.stack import LayerStack
from workers.options import WorkerOptions

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and its calibration bias if there is one."""

    path: str
    stack: LayerStack
    bias: torch.Tensor | None

    @classmethod
    def load(cls, options: WorkerOptions) -> LoadedModel:
        """Load what `options` name.

        Raises
        ------
        ModelError, BiasError, ConfigError
            When the model or its bias cannot be used.
        """
        if options.threads:
            torch.set_num_threads(options.threads)
        model = load_model(options.model, device=options.device, dtype=options.dtype)
        stack = LayerStack(model)
        bias_path = options.bias or find_bias(options.model)
        bias = None
        if bias_path is not None:
            bias = load_bias(
                bias_path, num_layers=stack.num_layers, hidden_size=stack.hidden_size
            ).to(stack.device)
        return cls(path=options.model, stack=stack, bias=bias)

    @property
    def max_distance(self) -> int:
        """Largest distance that the bias covers; 0 without one."""
        return 0 if self.bias is None else self.bias.shape[1] - 1


class Engine:
    """Two threads beside the event loop: one for model runs, one for moving tensors.

    Whatever runs the model asks for one step at a time: a node, a token. Steps of different
    requests take turns in the order in which they were asked for. What other workers ask for is
    served by the second thread and never waits for the model.
    """

    def __init__(self) -> None:
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="homer-compute")
        self.io = ThreadPoolExecutor(1, thread_name_prefix="homer-io")

    async def step(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function` in the compute thread."""
        return await _run_in(self._compute, function, *args)

    def later(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Have `function` run in the compute thread after what is waiting already."""
        return self._compute.submit(function, *args)

    async def move(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function`, which runs no model, in the second thread."""
        return await _run_in(self.io, function, *args)

    def close(self) -> None:
        """Let both threads end after the step that they are at."""
        self._compute.shutdown(wait=False, cancel_futures=True)
        self.io.shutdown(wait=False, cancel_futures=True)


async def _run_in(executor: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
    """What a step logs is about what its caller is about."""
    run = contextvars.copy_context().run
    return await asyncio.get_running_loop().run_in_executor(executor, run, function, *args)
