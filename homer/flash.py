"""Flash attention as transformers has it: which kinds are here, and what they can do.

Knows nothing about passes through layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from homer.errors import ConfigError
from homer.load_options import FLASH_PACKAGES

_HALF = (torch.float16, torch.bfloat16)
# What only some families pass on, and what the packages call it.
_EXTRAS = {"softcap": {"softcap"}, "s_aux": {"s_aux", "learnable_sink"}}


def is_flash(name: str) -> bool:
    """Whether an attention implementation is flash attention, as transformers itself tells it."""
    return "flash" in name


@dataclass(frozen=True)
class FlashAttention:
    """Flash attention by one name; `takes` are the extras of families that it computes with."""

    function: Callable[..., Any]
    takes: frozenset[str]

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> FlashAttention:
        """transformers' `function` of this name. It leaves sinks out that its package cannot do."""
        of_package = lazy_import_flash_attention(name)[0][1]
        known = inspect.signature(of_package).parameters.keys()
        return cls(function, frozenset(extra for extra, names in _EXTRAS.items() if names & known))

    def attend(
        self,
        module: torch.nn.Module,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scaling: float,
        extra: Mapping[str, Any],
    ) -> torch.Tensor:
        """Causal attention of the last rows; out comes (1, tokens, heads, head_dim).

        Positions stay unknown to it: where they start again it would see several prompts.
        """
        out, _ = self.function(module, *states, None, scaling=scaling, is_causal=True, **extra)
        return out


def check_flash(name: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """Refuse what the kernels cannot do, where that is known before a model is loaded.

    Raises
    ------
    ConfigError
        What to use.
    """
    if dtype is not None and dtype not in _HALF:
        raise ConfigError(
            f"{name} computes in float16 or bfloat16, and the model is in "
            f"{str(dtype).removeprefix('torch.')}; use dtype bfloat16, or attention sdpa"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(f"{name} needs a GPU, and device is cpu; use attention sdpa")


def missing_flash() -> list[str]:
    """The kinds of flash attention that cannot run here, for want of a package or a GPU."""
    return [
        name
        for name in FLASH_PACKAGES
        if not getattr(transformers.utils, f"is_flash_attn_{name[-1]}_available", bool)()
    ]
