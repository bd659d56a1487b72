"""Why a service does not start, and that nothing of it stays on the Ray cluster."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.client import HomerClient
from cluster.errors import PlacementError
from cluster.launch import START_ATTEMPTS, _start_ray, running_service
from cluster.options import CompressionOverrides, ServeOptions
from homer.errors import ConfigError, HomerError
from tests.cluster.conftest import LOGICAL_CPUS, poll
from tests.golden_cases import model_dir


def options(**given: object) -> ServeOptions:
    settings = {"model": str(model_dir("M")), "cpu": True, "port": 0, "name": "broken", **given}
    return ServeOptions(**settings)  # type: ignore[arg-type]


def refusal(made: ServeOptions) -> HomerError:
    with pytest.raises(HomerError) as caught, running_service(made):
        pytest.fail("the service started")
    assert "Traceback" not in str(caught.value)
    return caught.value


def free_cpus() -> float:
    return float(ray.available_resources()["CPU"])


def test_no_room_says_what_is_missing(ray_session: None) -> None:
    made = options(workers=2, threads=LOGICAL_CPUS, placement_timeout_seconds=1)
    error = refusal(made)
    assert isinstance(error, PlacementError)
    assert f"no room for 2 worker(s) of {LOGICAL_CPUS} CPU each" in str(error)
    assert f"has {LOGICAL_CPUS} CPU (" in str(error)
    assert "lower --workers or --threads" in str(error)


def test_a_model_that_is_not_there(ray_session: None) -> None:
    assert "/no/such/model" in str(refusal(options(model="/no/such/model")))


def test_a_checkpoint_that_is_broken_or_another_model(ray_session: None, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir("M"), broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "model.safetensors is truncated" in str(refusal(options(model=str(broken))))
    weights.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    other = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (broken / "config.json").write_text(json.dumps({**config, **other}))
    assert "gpt2" in str(refusal(options(model=str(broken))))


def test_a_port_that_is_taken(ray_session: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refusal(options(port=port))
    assert isinstance(error, PlacementError)
    assert f"cannot listen on 127.0.0.1:{port}" in str(error)
    assert "choose another --port" in str(error)


def test_settings_that_cannot_be(ray_session: None) -> None:
    error = refusal(options(compression=CompressionOverrides(target_len=0)))
    assert isinstance(error, ConfigError)
    assert "target_len is 0" in str(error)


def test_a_name_that_is_in_use(service: HomerClient) -> None:
    error = refusal(options(name="shared"))
    assert isinstance(error, PlacementError)
    assert "a service named 'shared' is running" in str(error)


def test_a_service_that_ended_gives_back_its_place(ray_session: None, text_model: Path) -> None:
    with running_service(options(model=str(text_model), name="short")) as address:
        with HomerClient(address) as client:
            assert client.server_info().model == str(text_model)
        taken = free_cpus()
    poll(lambda: free_cpus() == taken + 1, "the place is not given back")


@pytest.mark.parametrize("in_time", [True, False])
def test_a_ray_that_is_too_slow_is_ended_and_started_again(
    in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def init(**settings: Any) -> None:
        started.append(subprocess.Popen(["sleep", "600"]))
        if len(started) < START_ATTEMPTS or not in_time:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if in_time:
        _start_ray()
        last = started.pop()
        assert last.poll() is None
        last.kill()
        last.wait()
    else:
        with pytest.raises(PlacementError, match="too busy"):
            _start_ray()
    assert len(started) == START_ATTEMPTS - in_time
    assert {process.wait(10) for process in started} == {-signal.SIGKILL}


def test_another_failure_of_ray_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> None:
        raise ValueError("no such setting")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="no such setting"):
        _start_ray()
