"""Workers and coordinators that die or hang: what comes back, and what a client sees of it."""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.client import HomerClient
from cluster.coordinator import NAMESPACE
from cluster.errors import ServiceError
from cluster.keeper import Keeper
from cluster.launch import LOOPBACK, running_service
from cluster.options import ServeOptions
from cluster.pool import WorkerPool
from cluster.scheduler import Scheduler
from cluster.slot import backoff_seconds
from homer.v1 import long_context_pb2 as pb
from homer.v1 import worker_pb2
from tests.cluster.conftest import WORKER_TOKEN, Run, poll, worker_stub
from tests.cluster.test_service import CONTEXT, LONG_CONTEXT, QUESTION, assert_nothing_held
from tests.golden_cases import model_dir


def process_of(address: str) -> int:
    """The process id of the worker at `address`."""
    with worker_stub(address) as stub:
        info = stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=10)
    return int(info.process_id)


def process_of_actor(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


class Pool:
    """A pool in the event loop of `run`, and the scheduler that it serves."""

    def __init__(self, options: ServeOptions, run: Run[Any]) -> None:
        async def begin() -> None:
            self.scheduler = Scheduler()
            keeper: Any = ray.remote(Keeper)
            self.pool = WorkerPool(
                options, keeper.options(num_cpus=0).remote(), LOOPBACK, self.scheduler
            )
            self.scheduler.on_worker_lost = self.pool.fence
            await self.pool.start()

        self.run = run
        run(begin())

    def stop(self) -> None:
        async def end() -> None:
            await self.pool.stop()
            await self.scheduler.close()

        self.run(end())

    def names(self) -> dict[int, str]:
        """The workers that may get work, by number."""
        names = [worker.name for worker in self.scheduler.workers]
        return {int(name.removeprefix("worker-").split(".")[0]): name for name in names}

    def process(self, number: int) -> int:
        name = self.names()[number]
        return process_of(next(w.address for w in self.scheduler.workers if w.name == name))

    def give_up(self, number: int) -> None:
        """What the scheduler does with a worker that does not answer."""

        async def lose() -> None:
            self.scheduler.lose_worker(self.names()[number], "it does not answer")

        self.run(lose())
        assert number not in self.names()

    def wait_for_another(self, number: int, name: str) -> None:
        """Until the worker is back under a new name."""
        poll(lambda: self.names().get(number, name) != name, f"worker-{number} is not back")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "M"
    shutil.copytree(model_dir("M"), folder)
    return folder


@pytest.fixture(scope="module")
def pool(ray_session: None, run: Run[Any], folder: Path) -> Iterator[Pool]:
    """Two workers; each test brings back those that it takes away."""
    made = Pool(ServeOptions(model=str(folder), cpu=True, workers=2), run)
    assert made.names() == {0: "worker-0", 1: "worker-1"}
    yield made
    made.stop()


def test_a_killed_worker_comes_back_under_a_new_name(pool: Pool) -> None:
    before = pool.process(1)
    os.kill(before, signal.SIGKILL)
    pool.wait_for_another(1, "worker-1")
    assert pool.names() == {0: "worker-0", 1: "worker-1.1"}
    assert pool.process(1) != before


def test_a_worker_that_hangs_is_ended_and_replaced(pool: Pool) -> None:
    stopped, name = pool.process(0), pool.names()[0]
    os.kill(stopped, signal.SIGSTOP)
    pool.give_up(0)
    pool.wait_for_another(0, name)
    assert pool.process(0) != stopped
    poll(lambda: not Path(f"/proc/{stopped}").exists(), "the process that hangs is still there")


def test_a_worker_that_was_given_up_while_it_was_well_is_ended_too(pool: Pool) -> None:
    before, name = pool.process(0), pool.names()[0]
    pool.give_up(0)
    pool.wait_for_another(0, name)
    assert pool.process(0) != before


def test_a_worker_that_cannot_load_its_model_says_why_and_waits(pool: Pool, folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    # Not written over: the other worker may have the file mapped.
    weights.unlink()
    weights.write_bytes(whole[:1000])
    os.kill(pool.process(1), signal.SIGKILL)
    slot = pool.pool.slots[1]
    poll(lambda: "tried again when files change" in slot.reason, f"no reason: {slot.reason}")
    assert f"{weights} (1,000 bytes) is no safetensors file" in slot.reason
    assert slot.state == "failed"
    # What `homer status` shows, for as long as nothing changes.
    assert pool.pool.absent() == {"worker-1": slot.reason}
    # The other one goes on.
    assert list(pool.names()) == [0]
    weights.write_bytes(whole)
    poll(lambda: slot.state == "serving", "it does not come back")
    assert slot.reason == ""
    assert set(pool.names()) == {0, 1}


def test_waits_between_tries_double_up_to_a_minute() -> None:
    waits = [backoff_seconds(failures) for failures in (1, 2, 3, 6, 7, 1000)]
    assert waits == [1, 2, 4, 32, 60, 60]


@contextmanager
def service_of(model: Path) -> Iterator[tuple[HomerClient, Any]]:
    """A service with two workers: a client that does not ask again, and the coordinator."""
    name = uuid.uuid4().hex
    options = ServeOptions(
        model=str(model), cpu=True, workers=2, port=0, name=name, worker_host=LOOPBACK,
        worker_token=WORKER_TOKEN,
    )  # fmt: skip
    with running_service(options) as address, HomerClient(address) as client:
        yield client, ray.get_actor(name, NAMESPACE)


def workers_of(client: HomerClient) -> dict[str, int]:
    workers = client.server_info().workers
    return {worker.name: process_of(worker.address) for worker in workers if worker.ready}


def test_a_killed_coordinator_is_back_with_the_same_workers(
    ray_session: None, text_model: Path
) -> None:
    request: dict[str, Any] = {
        "context": CONTEXT, "question": QUESTION, "sampling": {"max_tokens": 24}
    }  # fmt: skip
    with service_of(text_model) as (client, coordinator):
        *_, expected = client.generate(**request)
        assert isinstance(expected, pb.Summary)
        before = workers_of(client)

        # One request before its first token, one in the middle of its answer.
        early = client.generate(**{**request, "context": LONG_CONTEXT})
        assert isinstance(next(early), pb.Accepted)
        patient = HomerClient(client.address, retries=10)
        answer = patient.generate(**request)
        tokens = []
        for event in answer:
            if isinstance(event, pb.Token):
                tokens.append(event)
                break
        killed = process_of_actor(coordinator)
        os.kill(killed, signal.SIGKILL)

        with pytest.raises(ServiceError) as caught:
            list(early)
        assert caught.value.code == "UNAVAILABLE"
        for event in answer:
            if isinstance(event, pb.Token):
                tokens.append(event)
        assert isinstance(event, pb.Summary)
        assert [token.token_id for token in tokens] == list(expected.token_ids)
        assert expected.text.startswith("".join(token.text for token in tokens))
        patient.close()

        # The same processes as before, and nothing of the requests that were cut off.
        assert workers_of(client) == before
        assert process_of_actor(coordinator) != killed
        assert_nothing_held(client)

        # A worker that dies while there is no coordinator is back all the same.
        os.kill(before["worker-0"], signal.SIGKILL)
        os.kill(process_of_actor(coordinator), signal.SIGKILL)
        with HomerClient(client.address, retries=10) as patient:
            *_, again = patient.generate(**request)
        assert isinstance(again, pb.Summary)
        assert again.token_ids == expected.token_ids
        poll(lambda: set(workers_of(client)) == {"worker-0.1", "worker-1"}, "worker-0 is not back")
        assert workers_of(client)["worker-1"] == before["worker-1"]
