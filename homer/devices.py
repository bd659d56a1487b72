"""Where the parts of a model compute, and where their weights lie when they don't.

accelerate spreads a model over devices and main memory or disk, by hooks on its modules. A part
whose weights lie outside has them brought in before each call and dropped after it; here they are
kept for several calls. Knows nothing about layers or plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook


def execution_device(module: torch.nn.Module) -> torch.device:
    """The device on which `module` computes, wherever its weights lie."""
    for part in module.modules():
        for hook in placing_hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return next(module.parameters()).device


def offloaded_parts(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of `module` whose weights are brought in when they are called."""
    return [part for part in module.modules() if any(hook.offload for hook in placing_hooks(part))]


@contextmanager
def weights_held(parts: Sequence[Any]) -> Iterator[None]:
    """Bring the weights of `offloaded_parts` in, and keep them for all calls inside the block."""
    with ExitStack() as held:
        for part in parts:
            hook = part._hf_hook
            hook.pre_forward(part)
            part._hf_hook = ModelHook()
            held.callback(_let_go, part, hook)
        yield


def _let_go(part: Any, hook: ModelHook) -> None:
    part._hf_hook = hook
    hook.post_forward(part, None)


def placing_hooks(part: torch.nn.Module) -> list[AlignDevicesHook]:
    """The hooks by which accelerate places `part`."""
    hook = getattr(part, "_hf_hook", None)
    every = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in every if isinstance(one, AlignDevicesHook)]
