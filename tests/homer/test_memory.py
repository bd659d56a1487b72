"""Memory grows with the logarithm of the length: tensors are weighed after every operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from homer import HomerConfig, HomerModel
from tests.homer.tiny import random_ids, tiny_llama


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still live; `peak` is the most so far.

    Tensors that were there before (`given`) and their views do not count.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def peak_bytes(context_len: int, config: HomerConfig) -> int:
    hm = HomerModel(tiny_llama(14), config)
    parts = random_ids(2), random_ids(context_len), random_ids(4)
    with LiveBytes([*hm.model.parameters(), *hm.model.buffers(), *parts]) as live:
        context = hm.compress(*parts)
    assert context.cache_len <= config.target_len
    return live.peak


@pytest.mark.parametrize("refresh_suffix", [True, False])
def test_peak_memory_grows_with_the_logarithm_of_the_length(refresh_suffix: bool) -> None:
    config = HomerConfig(
        max_chunk_len=64, target_len=64, warmup_layers=3, refresh_suffix=refresh_suffix
    )
    short, longer, longest = (peak_bytes(length, config) for length in (400, 1600, 5000))
    # Keeping all that is not needed any more would make it three or four times as much, each time.
    assert longer < 1.5 * short
    assert longest < 1.5 * longer


def test_what_is_weighed_is_what_lives() -> None:
    given = torch.zeros(1000)
    with LiveBytes([given]) as live:
        kept = [torch.zeros(100)]
        for _ in range(10):
            gone = given[:500] + 1
            del gone
        kept.append(kept[0][:50])
    assert live.peak == 4 * (100 + 500)
