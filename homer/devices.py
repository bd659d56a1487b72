"""Where the parts of a model compute, and where their weights lie when they don't.

accelerate spreads a model over devices and main memory or disk, by hooks on its modules; ZeRO-3
cuts weights in parts, one for each rank. A part of the model whose weights lie outside has them
brought in before each call and dropped after it; here they are kept for several calls. Knows
nothing about layers or plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook

_HOLDER = "homer"


def execution_device(module: torch.nn.Module) -> torch.device:
    """The device on which `module` computes, wherever its weights lie."""
    for part in module.modules():
        for hook in placing_hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return next(module.parameters()).device


def offloaded_parts(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of `module` whose weights are brought in when they are called."""
    return [
        part
        for part in module.modules()
        if weights_cut(part) or any(hook.offload for hook in placing_hooks(part))
    ]


def weights_cut(part: torch.nn.Module) -> list[Any]:
    """The weights of `part` alone that ZeRO-3 puts together for each call."""
    weights: Iterable[Any] = part.parameters(recurse=False)
    return [weight for weight in weights if hasattr(weight, "ds_id") and not weight.ds_persist]


@contextmanager
def weights_held(parts: Sequence[Any]) -> Iterator[None]:
    """Bring the weights of `offloaded_parts` in once for all calls inside the block."""
    with ExitStack() as held:
        for part in parts:
            if cut := weights_cut(part):
                _hold_together(cut)
                held.callback(_take_apart, cut)
                continue
            hook = part._hf_hook
            hook.pre_forward(part)
            part._hf_hook = ModelHook()
            held.callback(_let_go, part, hook)
        yield


def _hold_together(weights: Sequence[Any]) -> None:
    """Have DeepSpeed keep weights that it gathers; it does so when a part is called first."""
    for weight in weights:
        # One module more that is at work with it. Buffers for reading from a disk are few: those of
        # weights that persist are free as soon as they are read.
        weight.ds_active_sub_modules.add(_HOLDER)
        weight.ds_persist = True


def _take_apart(weights: Sequence[Any]) -> None:
    for weight in weights:
        weight.ds_active_sub_modules.discard(_HOLDER)
        weight.ds_persist = False
    # What no call has asked for is in parts still.
    if whole := [weight for weight in weights if weight.ds_status.name == "AVAILABLE"]:
        whole[0].partition(whole)


def _let_go(part: Any, hook: ModelHook) -> None:
    part._hf_hook = hook
    hook.post_forward(part, None)


def placing_hooks(part: torch.nn.Module) -> list[AlignDevicesHook]:
    """The hooks by which accelerate places `part`."""
    hook = getattr(part, "_hf_hook", None)
    every = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in every if isinstance(one, AlignDevicesHook)]
