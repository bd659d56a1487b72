"""Worker processes that the tests share: two for each golden model that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.golden_cases import model_dir
from tests.workers.processes import WorkerProcess

WorkersOf = Callable[[str], list[WorkerProcess]]


@pytest.fixture(scope="session")
def workers_of() -> Iterator[WorkersOf]:
    """Two running workers that serve a golden model, by the model's name."""
    running: dict[str, list[WorkerProcess]] = {}

    def get(model: str) -> list[WorkerProcess]:
        if model not in running:
            running[model] = []
            for _ in range(2):
                running[model].append(WorkerProcess(model_dir(model)))
        return running[model]

    yield get
    for workers in running.values():
        for worker in workers:
            worker.stop()


@pytest.fixture
def workers(workers_of: WorkersOf) -> Iterator[list[WorkerProcess]]:
    """Two workers of golden model A, which must hold nothing when the test ends."""
    pair = workers_of("A")
    yield pair
    assert all(worker.holds_nothing() for worker in pair)
