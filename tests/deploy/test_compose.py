"""The compose files as Docker Compose reads them, and their commands as our programs do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.serve import DoorArgs
from tests.deploy.commands import parse_homer
from tests.deploy.kubernetes import ROOT, tool
from workers.tokens import Tokens

FOLDER = ROOT / "deploy"
GPU = ["compose.yaml"]
TOKEN = "0123456789abcdef0123456789abcdef"
CPU = ["compose.yaml", "compose.cpu.yaml"]


def composed(files: list[str], **variables: str) -> dict[str, Any]:
    """What `docker compose config` makes of the files; it refuses keys that do not exist."""
    options = [word for file in files for word in ("-f", str(FOLDER / file))]
    done = subprocess.run(
        [tool("docker-compose"), *options, "--profile", "*", "config", "--format", "json"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOMER_TOKEN": TOKEN, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def settings(service: dict[str, Any]) -> dict[str, str]:
    return {k: v for k, v in service["environment"].items() if k.startswith("HOMER_SERVE_")}


@pytest.mark.parametrize("files", [GPU, CPU], ids=["gpu", "cpu"])
def test_homer_serve_takes_its_settings(files: list[str]) -> None:
    services = composed(files, WORKERS="3", MODELS="/srv/models")["services"]
    serve = services["homer"]
    options = parse_homer(serve["command"][1:], settings(serve))
    assert options["workers"] == 3
    assert options["host"] == "0.0.0.0"
    assert options["port"] == serve["ports"][0]["target"]
    assert options["cpu"] is (files is CPU)
    assert ("deploy" in serve) is (files is GPU)
    folder, model = Path(serve["volumes"][0]["target"]), Path(options["model"])
    assert model.is_relative_to(folder)
    minutes, seconds = serve["stop_grace_period"].removesuffix("s").split("m")
    assert options["grace_seconds"] < 60 * int(minutes) + int(seconds)
    # The variants differ in the build argument alone.
    assert services["homer"]["image"] == services["http"]["image"]
    assert serve["build"]["args"]["VARIANT"] == ("cpu" if files is CPU else "gpu")
    assert (Path(serve["build"]["context"]) / serve["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("files", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_http_door_stands_before_that_service(files: list[str]) -> None:
    read = composed(files)
    config = yaml.safe_load(read["configs"]["serve"]["content"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    name, _, port = str(DoorArgs(**application.args).service).partition(":")
    serve = read["services"][name]
    assert int(port) == serve["ports"][0]["target"]
    assert config["http_options"]["port"] == read["services"]["http"]["ports"][0]["target"]
    assert "homer" in read["services"]["http"]["depends_on"]
    check = serve["healthcheck"]["test"]
    assert check[:2] == ["CMD", "homer"]
    assert parse_homer(check[2:])["server"] == f"127.0.0.1:{port}"


def test_who_calls_must_show_the_token_that_was_exported() -> None:
    read = composed(GPU)
    for name in ("homer", "http"):
        lines = read["services"][name]["environment"]["HOMER_TOKENS"]
        assert Tokens(lines).name_of(f"Bearer {TOKEN}") == "user"
    assert read["services"]["homer"]["environment"]["HOMER_TOKEN"] == TOKEN
    assert read["configs"]["token"] == {"environment": "HOMER_TOKEN", "name": "homer_token"}
    with pytest.raises(AssertionError, match="openssl rand"):
        composed(GPU, HOMER_TOKEN="")


def test_ports_are_the_loopbacks_and_files_that_are_mounted_are_there() -> None:
    read = composed(GPU, MODELS="/srv/models")
    for service in read["services"].values():
        for port in service["ports"]:
            assert port["host_ip"] == "127.0.0.1"
        for volume in service["volumes"]:
            if volume["type"] == "bind" and volume["source"] != "/srv/models":
                assert Path(volume["source"]).exists(), volume["source"]
    # Elsewhere only where somebody says so.
    wide = composed(GPU, HOST="0.0.0.0")["services"]["homer"]["ports"]
    assert wide[0]["host_ip"] == "0.0.0.0"


def test_a_key_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "compose.yaml"
    bad.write_text("services: {homer: {image: homer, comand: [homer]}}")
    done = subprocess.run(
        [tool("docker-compose"), "-f", str(bad), "config"], capture_output=True, check=False
    )
    assert done.returncode != 0
