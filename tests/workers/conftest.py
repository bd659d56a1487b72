"""Worker processes that the tests share: two for each golden model that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.golden_cases import model_dir
from tests.workers.processes import WorkerProcess, running_workers

WorkersOf = Callable[[str], list[WorkerProcess]]


@pytest.fixture(scope="session")
def workers_of() -> Iterator[WorkersOf]:
    """Two running workers that serve a golden model, by the model's name."""
    running: dict[str, list[WorkerProcess]] = {}
    with ExitStack() as stack:

        def get(model: str) -> list[WorkerProcess]:
            if model not in running:
                pair = running_workers(model_dir(model), count=2)
                running[model] = stack.enter_context(pair)
            return running[model]

        yield get


@pytest.fixture
def workers(workers_of: WorkersOf) -> Iterator[list[WorkerProcess]]:
    """Two workers of golden model A, which must hold nothing when the test ends."""
    pair = workers_of("A")
    yield pair
    assert all(worker.holds_nothing() for worker in pair)
