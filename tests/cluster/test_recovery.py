"""Workers that die, hang, slow down or fail cost only what they held: the answer is the same."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cluster.storms import FAULTS, Storm
from tests.cluster.virtual_time import run_virtual

STORMS_PER_TEST = 60


@pytest.mark.parametrize("first_seed", range(0, 5 * STORMS_PER_TEST, STORMS_PER_TEST))
def test_whatever_happens_every_answer_is_right_and_nothing_is_left(first_seed: int) -> None:
    seen: Counter[str] = Counter()

    async def weather(seed: int) -> Counter[str]:
        return await Storm(seed, faults=25).run()

    for seed in range(first_seed, first_seed + STORMS_PER_TEST):
        seen += run_virtual(weather(seed), limit_seconds=20_000)
    assert seen["answered"] > STORMS_PER_TEST
    assert all(seen[fault] for fault in (*FAULTS, "cancelled"))
