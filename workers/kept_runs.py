"""Which tokens of a span were kept, as lengths of runs.

In turn dropped and kept, from the start of the span to the last that was kept: most are one byte as
they travel. Knows nothing about nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate


def write_runs(kept: Iterable[int], start: int) -> list[int]:
    """The runs of ascending indices `kept` of a span that begins at `start`."""
    runs: list[int] = []
    at = start
    for index in kept:
        if runs and index == at:
            runs[-1] += 1
        else:
            runs += (index - at, 1)
        at = index + 1
    return runs


def read_runs(runs: Sequence[int], start: int) -> list[range]:
    """The indices that were kept of a span that begins at `start`, run by run."""
    bounds = list(accumulate(runs, initial=start))
    return [range(*run) for run in zip(bounds[1::2], bounds[2::2], strict=True)]
