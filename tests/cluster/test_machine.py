"""What `homer doctor` says of machines: by made-up facts, and by those of this one."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.machine import Gpu, MachineFacts, port_is_free
from cluster.machine_checks import Check, check_machine, check_model_memory, check_nodes
from cluster.node_facts import gather_nodes
from homer.demo import MODEL_DIR
from tests.cluster.processes import BIN
from tests.project.command_line import Homer, homer

__all__ = ["homer"]

GIB = 1 << 30
H100 = Gpu("NVIDIA H100", 80 * GIB, 79 * GIB, "sm_90")
WELL = MachineFacts(
    host="node-a",
    node="10.0.0.1",
    python="3.11.7",
    versions={"homer-context": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"},
    cores=16,
    memory_bytes=128 * GIB,
    free_memory_bytes=100 * GIB,
    shared_memory_bytes=8 * GIB,
    open_files=65536,
    open_files_most=65536,
    free_disk_share=0.5,
    seen_gpus=("NVIDIA H100",),
    gpus=(H100,),
    driver="580.1",
    driver_cuda=(13, 0),
    torch_cuda=(12, 8),
    torch_architectures=("sm_80", "sm_90", "compute_90"),
)


def with_facts(**other: Any) -> MachineFacts:
    return dataclasses.replace(WELL, **other)


def not_well(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.status != "ok"]


def test_a_machine_that_has_all_is_well() -> None:
    assert not_well(check_machine(WELL)) == []
    assert len(check_machine(WELL)) == 6


@pytest.mark.parametrize(
    ("other", "status", "found", "change"),
    [
        (
            {"wrong_packages": ("torch>=2.11 (2.4.0 is installed)",)},
            "fail",
            "not met: torch>=2.11 (2.4.0 is installed)",
            "pip install 'torch>=2.11'",
        ),
        ({"gpus": (), "seen_gpus": ()}, "warn", "none", "--cpu"),
        ({"torch_cuda": None}, "fail", "torch was built without CUDA", "for CUDA"),
        (
            {"driver_cuda": (11, 8)},
            "fail",
            "driver 580.1 runs CUDA 11.8, torch is built for CUDA 12.8",
            "update the driver",
        ),
        ({"gpus": ()}, "fail", "torch sees 0 of 1", "CUDA_VISIBLE_DEVICES"),
        ({"seen_gpus": ("a", "b")}, "warn", "torch sees 1 of 2", "CUDA_VISIBLE_DEVICES"),
        (
            {"gpus": (dataclasses.replace(H100, architecture="sm_70"),)},
            "fail",
            "no kernels for sm_70",
            "a build of torch for this GPU",
        ),
        ({"shared_memory_bytes": 64 << 20}, "warn", "/dev/shm has 64.0 MiB", "--shm-size=2g"),
        ({"open_files": 4096}, "warn", "4,096 open files", "ulimit -n 65536"),
        ({"open_files": 256, "open_files_most": 9000}, "fail", "256 open files", "ulimit -n 9000"),
        ({"free_disk_share": 0.02}, "warn", "2% of the disk", "TMPDIR"),
    ],
)
def test_what_is_missing_comes_with_what_to_change(
    other: dict[str, Any], status: str, found: str, change: str
) -> None:
    (check,) = not_well(check_machine(with_facts(**other)))
    assert check.status == status
    assert found in check.found
    assert change in check.change
    assert check.host == "node-a"


@pytest.mark.parametrize(
    ("architecture", "runs"), [("sm_86", True), ("sm_90", True), ("sm_100", True), ("sm_75", False)]
)
def test_a_gpu_runs_older_kernels_of_its_generation_and_any_older_ptx(
    architecture: str, runs: bool
) -> None:
    gpu = dataclasses.replace(H100, architecture=architecture)
    assert (not not_well(check_machine(with_facts(gpus=(gpu,))))) is runs


def test_a_model_is_held_against_the_gpu_or_main_memory() -> None:
    assert check_model_memory(WELL, 79 * GIB, cpu=False).status == "ok"
    too_big = check_model_memory(WELL, 90 * GIB, cpu=False)
    assert too_big.status == "fail"
    assert "--ranks 2" in too_big.change
    assert check_model_memory(WELL, 90 * GIB, cpu=True).status == "ok"
    assert check_model_memory(WELL, 110 * GIB, cpu=True).status == "fail"


def test_nodes_must_agree_in_versions_and_clocks() -> None:
    other = with_facts(
        node="10.0.0.2", versions={**WELL.versions, "ray": "2.55.0", "torch": "2.11.0"}
    )
    clocks = {"10.0.0.1": 0.002, "10.0.0.2": -7.5}
    wrong = not_well(check_nodes([WELL, other], clocks, {"10.0.0.3": "No module named 'cluster'"}))
    assert [(check.subject, check.status) for check in wrong] == [
        ("ray of all nodes", "fail"),
        ("torch of all nodes", "warn"),
        ("clock", "warn"),
        ("node", "fail"),
    ]
    assert wrong[0].found == "2.60.0 on 10.0.0.1; 2.55.0 on 10.0.0.2"
    assert (wrong[2].host, wrong[2].found[:6]) == ("10.0.0.2", "-7.500")
    assert not_well(check_nodes([WELL, WELL], {}, {})) == []


def test_this_machine_s_facts_are_those_that_the_system_tells() -> None:
    facts = MachineFacts.here()
    assert facts.host == socket.gethostname()
    assert facts.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert facts.cores == len(os.sched_getaffinity(0))
    assert 0 < facts.free_memory_bytes < facts.memory_bytes
    assert facts.versions["ray"] == ray.__version__
    assert facts.python == sys.version.split()[0]
    # The environment of these tests is one that meets Homer's own requirements.
    assert facts.wrong_packages == ()


def test_each_node_of_a_cluster_tells_of_itself(ray_session: None) -> None:
    found = gather_nodes()
    assert found.silent == {}
    (node,) = found.nodes
    assert node.host == socket.gethostname()
    assert node.node in found.clock_offsets
    # One machine, one clock: what differs is how long a call takes.
    assert abs(found.clock_offsets[node.node]) < 1.0


def test_the_command_joins_a_cluster_and_checks_its_nodes(ray_session: None) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [str(BIN / "homer"), "doctor", "--cpu", "--json", "--address"]
    for given, alive in ((address, True), ("127.0.0.1:9", False)):
        done = subprocess.run([*command, given], capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        checks = {check["subject"]: check for check in json.loads(done.stdout)["checks"]}
        if alive:
            assert checks["ray of all nodes"]["found"] == ray.__version__
            assert checks["clock"]["status"] == "ok"
            assert "Ray cluster" not in checks
        else:
            assert done.returncode == 1
            assert checks["Ray cluster"]["status"] == "fail"
            assert "ray start" in checks["Ray cluster"]["change"]


def test_the_command_tells_of_this_machine_the_model_and_the_port(homer: Homer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        done = homer("doctor", "--model", MODEL_DIR, "--cpu", "--port", port, "--json")
    told = json.loads(done.stdout)
    checks = {check["subject"]: check for check in told["checks"]}
    assert {"packages", "GPU", "memory", "model memory"} <= {s.rstrip(" 0") for s in checks}
    assert checks["port"]["status"] == "warn"
    assert "--port" in checks["port"]["change"]
    assert checks["model memory"]["status"] == "ok"
    failed = any(check["status"] == "fail" for check in told["checks"])
    assert done.code == (1 if failed else 0)


def test_a_model_that_does_not_fit_fails_its_check(homer: Homer, tmp_path: Path) -> None:
    config = {"hidden_size": 65536, "num_hidden_layers": 100, "num_attention_heads": 512}
    sizes = {"intermediate_size": 262144, "vocab_size": 32000, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config, **sizes}))
    done = homer("doctor", "--model", tmp_path, "--cpu")
    assert done.code == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("fail"))
    assert "model memory" in line
