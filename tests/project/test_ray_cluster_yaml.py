"""The cluster file against the schema and the checks that Ray ships."""

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

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ray_cluster.yaml"


@pytest.fixture
def cluster_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return config


def test_the_file_fits_rays_schema(cluster_config: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster_config, schema)
    # The schema bites: a misspelt key is refused.
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster_config | {"head_node_typ": "head"}, schema)


def test_ray_up_accepts_the_file(cluster_config: dict[str, Any]) -> None:
    """What `ray up` does before it speaks to the cloud: defaults filled in, then checked."""
    prepared = prepare_config(copy.deepcopy(cluster_config))
    validate_config(prepared)
    assert prepared["head_setup_commands"][0] == cluster_config["setup_commands"][0]


def test_the_head_has_no_gpu_and_the_workers_scale(cluster_config: dict[str, Any]) -> None:
    types = prepare_config(copy.deepcopy(cluster_config))["available_node_types"]
    head = types.pop(cluster_config["head_node_type"])
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    assert types
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1
        assert 0 <= worker["min_workers"] < worker["max_workers"] <= cluster_config["max_workers"]


def test_every_node_installs_the_project_that_file_mounts_brings(
    cluster_config: dict[str, Any],
) -> None:
    (target,) = cluster_config["file_mounts"]
    assert cluster_config["file_mounts"][target] == "."
    (install,) = cluster_config["setup_commands"]
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
