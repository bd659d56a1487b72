"""A service whose workers are groups of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.client import HomerClient
from cluster.launch import LOOPBACK, running_service
from cluster.options import ServeOptions
from homer.errors import ConfigError
from homer.v1 import worker_pb2
from tests.cluster.conftest import WORKER_TOKEN, poll, worker_stub
from tests.cluster.test_service import CONTEXT, QUESTION, answer


def follower_of(worker: str) -> psutil.Process:
    """The rank beside the one that serves at this address."""
    with worker_stub(worker) as stub:
        info = stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    (follower,) = (
        child
        for child in psutil.Process(info.process_id).children()
        if "workers.follower" in child.cmdline()
    )
    return follower


def test_a_group_is_placed_answers_and_is_started_again(
    service: HomerClient, text_model: Path
) -> None:
    request: dict[str, Any] = {
        "context": CONTEXT,
        "question": QUESTION,
        "sampling": {"max_tokens": 12},
    }
    expected = list(answer(service, **request)[1].token_ids)
    options = ServeOptions(
        model=str(text_model),
        cpu=True,
        engine="transformers-tp",
        ranks=2,
        port=0,
        name="ranked",
        worker_host=LOOPBACK,
        worker_token=WORKER_TOKEN,
    )
    free = ray.available_resources()["CPU"]
    with running_service(options) as address, HomerClient(address) as client:
        assert ray.available_resources()["CPU"] == free - 2
        assert list(answer(client, **request)[1].token_ids) == expected
        (first,) = client.server_info().workers
        follower_of(first.address).kill()
        poll(
            lambda: any(w.ready and w.name != first.name for w in client.server_info().workers),
            "the group was not started again",
        )
        assert list(answer(client, **request)[1].token_ids) == expected
        (second,) = (worker for worker in client.server_info().workers if worker.ready)
        follower = follower_of(second.address)
    poll(lambda: not follower.is_running(), "a rank is left behind")


def test_ranks_are_placed_with_what_each_needs() -> None:
    with pytest.raises(ConfigError, match="each of 2 ranks needs a GPU of its own"):
        ServeOptions(model="", engine="transformers-tp", ranks=2, gpus_per_worker=0.5)
    placed = ServeOptions(model="", engine="transformers-tp", ranks=2)
    assert placed.main_spec.bundle == {"CPU": 2.0, "GPU": 2.0}
    assert placed.memory_share(placed.main_spec, 8) == 1.0
    on_cpu = ServeOptions(
        model="", engine="transformers-tp", ranks=2, cpu=True, threads=3, workers=4
    )
    worker = on_cpu.worker_options(on_cpu.main_spec, name="", host="127.0.0.1", node_cpus=12)
    assert (on_cpu.main_spec.cpus, worker.threads, worker.ranks) == (6, 3, 2)
    assert worker.memory_share == 0.5
