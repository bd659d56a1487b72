"""The cluster files against the schema and the checks that Ray ships."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.commands import parse_ray_options

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ray_cluster.yaml"
LOCAL = ROOT / "deploy" / "ray_local.yaml"
both_files = pytest.mark.parametrize("file", [FILE, LOCAL], ids=lambda file: file.name)


@pytest.fixture
def cluster_config() -> dict[str, Any]:
    return read(FILE)


def read(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    return config


@both_files
def test_the_file_fits_rays_schema(file: Path) -> None:
    cluster_config = read(file)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster_config, schema)
    # The schema bites: a misspelt key is refused.
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster_config | {"head_node_typ": "head"}, schema)


@both_files
def test_ray_up_accepts_the_file(file: Path) -> None:
    """What `ray up` does before it speaks to anybody: defaults filled in, then checked."""
    cluster_config = read(file)
    prepared = prepare_config(copy.deepcopy(cluster_config))
    validate_config(prepared)
    assert prepared["head_setup_commands"][0] == cluster_config["setup_commands"][0]


@both_files
def test_ray_is_started_with_options_that_exist_and_asks_for_a_token(file: Path) -> None:
    config = read(file)
    for role in ("head", "worker"):
        (start,) = (one for one in config[f"{role}_start_ray_commands"] if "ray start" in one)
        setting, _, options = start.rpartition(";")[2].partition("ray start ")
        assert "RAY_AUTH_MODE=token" in setting
        read_options = parse_ray_options(shlex.split(options))
        assert read_options["head"] is (role == "head")
        assert (read_options["port"] or read_options["address"].rpartition(":")[2]) in (
            6379,
            "6379",
        )
    assert any("get-auth-token --generate" in one for one in config["head_setup_commands"])
    (token,) = config["cluster_synced_files"]
    assert token.endswith("/.ray/auth_token")


def test_all_machines_that_one_has_are_used() -> None:
    prepared = prepare_config(read(LOCAL))
    machines = len(read(LOCAL)["provider"]["worker_ips"])
    (node_type,) = prepared["available_node_types"].values()
    assert prepared["max_workers"] == machines
    assert node_type["min_workers"] == node_type["max_workers"] == machines


def test_the_head_has_no_gpu_and_the_workers_scale(cluster_config: dict[str, Any]) -> None:
    types = prepare_config(copy.deepcopy(cluster_config))["available_node_types"]
    head = types.pop(cluster_config["head_node_type"])
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    assert types
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1
        assert 0 <= worker["min_workers"] < worker["max_workers"] <= cluster_config["max_workers"]


@both_files
def test_every_node_installs_the_project_that_file_mounts_brings(file: Path) -> None:
    cluster_config = read(file)
    (target,) = cluster_config["file_mounts"]
    assert cluster_config["file_mounts"][target] == "."
    install = cluster_config["setup_commands"][0]
    words = shlex.split(install)
    assert words[:2] == ["cd", target]
    assert (ROOT / words[words.index("--constraint") + 1]).is_file()


def test_images_carry_the_pinned_ray_and_a_python_that_the_project_runs_on(
    cluster_config: dict[str, Any],
) -> None:
    """Nodes of one Ray cluster must agree on both."""
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = int(project["requires-python"].removeprefix(">=3."))
    images = [cluster_config["docker"][f"{role}_image"] for role in ("head", "worker")]
    tags = [re.fullmatch(r"rayproject/ray:(.+?)-py3(\d+)(-gpu)?", image) for image in images]
    found = {(tag[1], int(tag[2])) for tag in tags if tag}
    assert len(found) == 1
    version, python = found.pop()
    assert version == pinned
    assert python >= least
