"""The compute thread is shared by time between nodes and answers."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from homer.bias import warn_uncalibrated
from homer.load_options import LoadOptions
from homer.shape import UNCALIBRATED
from tests.golden_cases import model_dir
from workers.engine import Engine, LoadedModel
from workers.options import WorkerOptions


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


class Load:
    """Steps that busy the thread for a time, and what ran when."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.took: list[float] = []
        self.seconds = {"node": 0.0, "decode": 0.0}
        self.ended = threading.Event()

    def busy(self, name: str, seconds: float) -> None:
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            pass
        self.ran.append(name)
        self.took.append(time.perf_counter() - started)
        self.seconds[name] += self.took[-1]

    def decoding(self, seconds: float) -> Callable[[], bool]:
        def step() -> bool:
            self.busy("decode", seconds)
            return not self.ended.is_set()

        return step


async def run_both(engine: Engine, node_seconds: float, decode_seconds: float, nodes: int) -> Load:
    """Nodes one after the other beside a decode that does not end before they do."""
    load = Load()
    engine.decode(load.decoding(decode_seconds))
    for _ in range(nodes):
        await engine.step(load.busy, "node", node_seconds)
    load.ended.set()
    await engine.step(lambda: None)
    return load


@pytest.mark.parametrize(("node_seconds", "decode_seconds"), [(0.06, 0.01), (0.01, 0.03)])
def test_nodes_and_answers_get_the_same_time(
    engine: Engine, node_seconds: float, decode_seconds: float
) -> None:
    load = asyncio.run(run_both(engine, node_seconds, decode_seconds, nodes=12))
    # Neither is ever further ahead than the longest step, at which the run may also have ended.
    apart = abs(load.seconds["decode"] - load.seconds["node"])
    assert apart < 2.5 * max(load.took)
    assert len(load.ran) > 12


def test_neither_kind_waits_for_long(engine: Engine) -> None:
    """However long the other has run alone before."""
    load = Load()
    engine.decode(load.decoding(0.01))

    async def nodes() -> None:
        while len(load.ran) < 30:
            await asyncio.sleep(0)
        before = len(load.ran)
        await engine.step(load.busy, "node", 0.05)
        # It had to wait for the step that was running, and for what an answer may be ahead.
        assert sum(load.took[before:-1]) < 3 * max(load.took) + 0.1
        for _ in range(8):
            await engine.step(load.busy, "node", 0.05)
        load.ended.set()
        await engine.step(lambda: None)

    asyncio.run(nodes())
    # A step that the machine held up is made up for; otherwise one node is run at a time.
    waited = [0.0]
    for name, seconds in zip(load.ran, load.took, strict=True):
        waited = [0.0] if name == "decode" else [*waited, seconds]
        assert sum(waited[:-1]) < 2 * max(load.took) + 0.1


def test_steps_of_an_answer_go_before_decoding(engine: Engine) -> None:
    load = Load()

    async def answer() -> None:
        gate = threading.Event()
        waiting = asyncio.ensure_future(engine.step(gate.wait))
        await asyncio.sleep(0)
        engine.decode(load.decoding(0.005))
        step = asyncio.ensure_future(engine.answer_step(load.busy, "node", 0.0))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(waiting, step)
        load.ended.set()
        await engine.step(lambda: None)

    asyncio.run(answer())
    assert load.ran[0] == "node"


def test_a_step_that_nobody_waits_for_any_more_is_not_run(engine: Engine) -> None:
    load = Load()

    async def cancel() -> None:
        gate = threading.Event()
        running = asyncio.ensure_future(engine.step(gate.wait))
        gone = asyncio.ensure_future(engine.step(load.busy, "node", 0.0))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.set()
        await running
        assert await engine.step(lambda: 7) == 7

    asyncio.run(cancel())
    assert load.ran == []


def test_an_error_of_a_step_is_its_callers(engine: Engine) -> None:
    def fail() -> None:
        raise ValueError("of this step")

    async def run() -> None:
        with pytest.raises(ValueError, match="of this step"):
            await engine.step(fail)
        assert await engine.step(lambda: 1) == 1

    asyncio.run(run())


def test_a_model_without_a_bias_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir("A") / name, tmp_path)
    warn_uncalibrated.cache_clear()
    LoadedModel.load(WorkerOptions(model=str(model_dir("A")), load=LoadOptions(device="cpu")))
    assert not caplog.records
    for _ in range(2):
        LoadedModel.load(WorkerOptions(model=str(tmp_path), load=LoadOptions(device="cpu")))
    assert [record.message for record in caplog.records] == [UNCALIBRATED]
