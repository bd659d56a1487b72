"""The attention heads of a model whose ranks (processes of one group) each hold some of them.

Tensor parallelism splits queries, keys and values by heads; hidden states are the same on every
rank. What depends on all heads is put together here. Knows nothing about how a model was split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from homer.errors import ModelError


@dataclass(frozen=True)
class HeadGroup:
    """This rank's part of the heads: part `rank` of `size` equal ones, in order.

    Every rank calls the same methods in the same order. Results are the same to the last bit on all
    of them, so that all ranks keep the same tokens.
    """

    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, model: Any) -> HeadGroup:
        """How `model` is split: by transformers' tensor parallelism, by DeepSpeed's, or not at all.

        Raises
        ------
        ModelError
            When it is split over other ranks than all of this process's group, or its heads cannot
            be split evenly.
        """
        size = getattr(model, "tp_size", None) or max(
            (getattr(module, "tp_world_size", None) or 1 for module in model.modules()), default=1
        )
        if size == 1:
            return cls()
        world = distributed.get_world_size()
        if size != world:
            raise ModelError(
                f"the model is split over {size} ranks of a group of {world}; use groups of as "
                f"many processes as the model has parts"
            )
        return cls(size, distributed.get_rank())

    def max(self, local: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks' values; `local` may be written over."""
        if self.size > 1:
            distributed.all_reduce(local, op=distributed.ReduceOp.MAX)
        return local

    def mean(self, local: torch.Tensor) -> torch.Tensor:
        """The mean of all ranks' values; `local` may be written over."""
        if self.size > 1:
            distributed.all_reduce(local)
            local /= self.size
        return local


ALL_HEADS = HeadGroup()
