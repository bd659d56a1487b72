"""Rotary position embeddings of a model, by layer, independent of what ran before.

Some rotations depend on the prompt's length (dynamic NTK, LongRoPE): transformers takes it from the
largest position of each call and keeps it between calls. Here every run of a request names the
length of its whole prompt, so that all its keys are rotated alike on every machine, whatever ran
before, and stay so while the answer grows. Knows nothing about trees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from homer.families import length_dependent, rotary_kinds


class Rotary:
    """The rotations of `module`, a decoder's own.

    `kinds` are the names of each layer's rotations; None where all layers have the same.
    """

    def __init__(self, module: torch.nn.Module, config: Any) -> None:
        self._module = module
        self.kinds = rotary_kinds(config)
        self._length_dependent = length_dependent(config)
        self._plain: Callable[..., Any] = inspect.unwrap(type(module).forward)

    def __call__(
        self, hidden: torch.Tensor, positions: torch.Tensor, spans: Sequence[int], layers: range
    ) -> dict[str | None, Any]:
        """What `layers` take as position embeddings, by their `kinds`.

        Parameters
        ----------
        hidden : torch.Tensor of shape (1, tokens, hidden_size)
        positions : torch.Tensor of shape (1, tokens)
        spans : sequence of int
            Length of the prompt in positions: one for all tokens, or one for each.
        layers : range
        """
        return {
            kind: self._rotations(hidden, positions, spans, () if kind is None else (kind,))
            for kind in {self.kinds[layer] for layer in layers}
        }

    def _rotations(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        spans: Sequence[int],
        kind: tuple[str, ...],
    ) -> Any:
        if not self._length_dependent:
            return self._module(hidden, positions, *kind)
        if len(set(spans)) == 1:
            self._set_span(hidden, spans[0], kind)
            with torch.no_grad():
                return self._plain(self._module, hidden, positions, *kind)
        pieces = []
        for token, span in enumerate(spans):
            here = slice(token, token + 1)
            pieces.append(self._rotations(hidden[:, here], positions[:, here], [span], kind))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))

    def _set_span(self, hidden: torch.Tensor, span: int, kind: tuple[str, ...]) -> None:
        """Have the module take the frequencies of a prompt of `span` positions."""
        module: Any = self._module
        original = module.original_max_seq_len
        # Below its original length all are the same; a module that thinks that it went beyond goes
        # back, and one that thinks that it did not makes frequencies anew.
        beyond = span > original
        for prefix in ("", *(f"{name}_" for name in kind)):
            setattr(module, f"{prefix}max_seq_len_cached", original + (0 if beyond else 1))
        last = span - 1 if beyond or "longrope" in str(module.rope_type) else 0
        module(hidden[:, :1], torch.tensor([[last]], device=hidden.device), *kind)
