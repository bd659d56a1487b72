"""Kubernetes' side of the manifests: rendered by kustomize, held against the kinds' own schemas."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
CRDS = ROOT.parent / "shared" / "kuberay-crds"


def tool(name: str) -> str:
    """A program that `make tools` brings; the test is skipped where it is not."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}; `make tools` brings it")
    return found


@cache
def render(folder: str) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k` would send."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(MANIFESTS / folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@cache
def crd_schema(kind: str) -> dict[str, Any]:
    """The schema of a kind of `ray.io/v1`, as JSON schema that refuses unknown fields."""
    if not CRDS.is_dir():
        pytest.skip(f"there are no definitions of Ray's kinds in {CRDS}")
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    # Of these the definition says only that they are there; Kubernetes knows the rest.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON schema, in which what is not named is refused."""
    made = dict(schema)
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if "properties" in made:
        made["properties"] = {name: strict(of) for name, of in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(made["additionalProperties"])
    if "items" in made:
        made["items"] = strict(made["items"])
    return made


def validate(manifest: dict[str, Any]) -> None:
    """Hold an object of `ray.io/v1` against its definition.

    Raises
    ------
    jsonschema.ValidationError
    """
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(crd_schema(manifest["kind"])).validate(manifest)


def containers(manifest: Any) -> Iterator[dict[str, Any]]:
    """All containers in an object, however deep."""
    if isinstance(manifest, dict):
        for key, value in manifest.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from containers(value)


def pod_specs(manifest: Any) -> Iterator[dict[str, Any]]:
    """All pod specs in an object."""
    if isinstance(manifest, dict):
        if "containers" in manifest:
            yield manifest
        for value in manifest.values():
            yield from pod_specs(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pod_specs(value)
