"""The image's recipe: what can be said of it where no image can be built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.deploy.kubernetes import ROOT, tool

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORE = ROOT / "deploy" / "Dockerfile.dockerignore"


def instructions(word: str) -> list[str]:
    """The arguments of all instructions of a kind."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return re.findall(rf"^{word} +(.+)$", text, re.MULTILINE)


def arguments() -> dict[str, str]:
    found = (line.partition("=") for line in instructions("ARG") if "=" in line)
    return {name: value for name, _, value in found}


def copied_sources() -> list[str]:
    lines = [line.split() for line in instructions("COPY")]
    return [word for line in lines for word in line[:-1] if not word.startswith("--")]


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run(
        [tool("hadolint"), "--failure-threshold", "style", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_bites(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace("USER 1000", "USER root"))
    done = subprocess.run([tool("hadolint"), str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DL3002" in done.stdout


def test_everything_that_is_copied_is_there_and_is_sent() -> None:
    sent = {line[1:] for line in IGNORE.read_text().splitlines() if line.startswith("!")}
    sources = set(copied_sources())
    assert sources == sent
    for source in sources:
        assert (ROOT / source).exists(), source
        listed = subprocess.run(
            ["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert listed.stdout, f"{source} is not in the repository"


def test_every_stage_is_rays_image_of_the_pinned_version_and_a_python_that_will_do() -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = int(project["requires-python"].removeprefix(">=3."))
    assert arguments()["RAY_VERSION"] == pinned
    assert int(arguments()["PYTHON"].removeprefix("py3")) >= least
    stages = [line.split(" AS ")[0] for line in instructions("FROM")]
    assert set(stages) == {"rayproject/ray:${RAY_VERSION}-${PYTHON}-${VARIANT}"}
    assert len(stages) == 2
    assert set(arguments()["EXTRAS"].split(",")) <= set(project["optional-dependencies"])


@pytest.mark.timeout(600)
def test_the_wheel_of_the_build_stage_has_the_whole_project_but_no_model(tmp_path: Path) -> None:
    """The first stage by hand: what is sent, minus what is ignored, made into a wheel."""
    ignored = IGNORE.read_text().split("*\n", 1)[1].splitlines()
    source, wheels = tmp_path / "src", tmp_path / "wheels"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", *copied_sources()], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "homer/demo/model" in ignored
    for name in tracked:
        if not name.startswith("homer/demo/model/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(wheels), "."], cwd=source, check=True)
    (wheel,) = wheels.glob("homer_context-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    packages = ("homer/", "workers/", "cluster/")
    expected = {name for name in tracked if name.startswith(packages)}
    expected -= {name for name in expected if name.startswith("homer/demo/model/")}
    assert {name for name in packed if name.startswith(packages)} == expected
    assert not [name for name in packed if name.endswith((".safetensors", ".bin"))]
