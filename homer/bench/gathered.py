"""How often ZeRO-3 puts weights together, and the bytes of it. Knows nothing about answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


def count_gathered(model: Any) -> tuple[Counter[str], Counter[str]]:
    """How often each weight is gathered from now on, and its bytes so far, by name.

    All bytes of the whole weight count: on each rank so many are in memory that were not before.
    """
    times: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    names = {weight.ds_id: name for name, weight in model.named_parameters()}

    def counted(gather: Callable[..., Any]) -> Callable[..., Any]:
        def count(weights: Sequence[Any], **options: Any) -> Any:
            for weight in weights:
                times[names[weight.ds_id]] += 1
                moved[names[weight.ds_id]] += weight.ds_numel * weight.element_size()
            return gather(weights, **options)

        return count

    for weight in model.parameters():
        weight.all_gather_coalesced = counted(weight.all_gather_coalesced)
    return times, moved
