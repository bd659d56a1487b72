"""The Kubernetes manifests against kustomize, the kinds' schemas, and the programs they start."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.serve import DoorArgs
from tests.deploy.commands import homer_commands, parse_homer, parse_ray_start
from tests.deploy.kubernetes import MANIFESTS, ROOT, containers, pod_specs, render, validate

FOLDERS = sorted(
    str(file.parent.relative_to(MANIFESTS)) for file in MANIFESTS.rglob("kustomization.yaml")
)

# Those with `homer serve` on a Ray cluster.
SERVICES = [folder for folder in FOLDERS if folder not in ("http", "batch")]


def of_kind(folder: str, kind: str) -> dict[str, Any]:
    (found,) = (one for one in render(folder) if one["kind"] == kind)
    return found


def ray_objects(folder: str) -> list[dict[str, Any]]:
    return [one for one in render(folder) if one["apiVersion"].startswith("ray.io/")]


def ray_clusters(folder: str) -> list[dict[str, Any]]:
    """The specs of the Ray clusters that a folder starts."""
    found = []
    for one in ray_objects(folder):
        spec = one["spec"]
        if one["kind"] == "RayCluster":
            found.append(spec)
        elif one["kind"] == "RayService":
            found.append(spec["rayClusterConfig"])
    return found


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


@pytest.mark.parametrize("folder", FOLDERS)
def test_rays_kinds_fit_their_definitions(folder: str) -> None:
    for one in ray_objects(folder):
        validate(one)


def test_a_field_that_does_not_exist_is_found() -> None:
    cluster = copy.deepcopy(of_kind("base", "RayCluster"))
    pod = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["containers"][0]["livenesProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="livenesProbe"):
        validate(cluster)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubernetes_own_kinds_fit_their_schemas(folder: str) -> None:
    others = [one for one in render(folder) if not one["apiVersion"].startswith("ray.io/")]
    for one in others:
        kubernetes_validate.validate(one, "1.34", strict=True)
    if folder == "base":
        assert others
        wrong = {**others[0], "dat": {}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.34", strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_commands_have_options_that_exist(folder: str) -> None:
    for one in render(folder):
        for container in containers(one):
            for command in commands_of(container):
                parse_homer(command)
        if one["kind"] == "RayJob":
            assert [parse_homer(command) for command in homer_commands(one["spec"]["entrypoint"])]


def commands_of(container: dict[str, Any]) -> list[list[str]]:
    """The `homer` commands of a container but for `homer serve`, which takes variables too."""
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    texts = [*container.get("args", []), shlex.join(hook)]
    probe = container.get("readinessProbe", {}).get("exec", {}).get("command", [])
    texts.append(shlex.join(probe))
    found = [command for text in texts for command in homer_commands(text)]
    return [command for command in found if command[0] != "serve"]


@pytest.mark.parametrize("folder", SERVICES)
def test_homer_serve_takes_its_settings_and_is_reached_where_others_look(folder: str) -> None:
    cluster = of_kind(folder, "RayCluster")
    (serve,) = (one for one in containers(cluster) if one["name"] == "homer")
    (reference,) = (source["configMapRef"]["name"] for source in serve["envFrom"])
    settings = of_kind(folder, "ConfigMap")
    assert settings["metadata"]["name"] == reference
    (command,) = homer_commands(serve["args"][0])
    options = parse_homer(command, settings["data"])
    service = of_kind(folder, "Service")["spec"]
    ports = {port["name"]: port["containerPort"] for port in serve["ports"]}
    assert {port["targetPort"] for port in service["ports"]} == set(ports)
    assert options["port"] == ports["grpc"]
    assert options["metrics_port"] == ports["metrics"]
    assert options["host"] == "0.0.0.0"
    # The coordinator and the workers, which are processes of Ray's containers, read them too.
    assert options["tokens_file"] is not None
    groups_pods = [group["template"]["spec"] for group in groups(cluster["spec"]).values()]
    for container in (one for pod in groups_pods for one in pod["containers"]):
        mounts = {one["mountPath"] for one in container["volumeMounts"]}
        for name, file in options.items():
            if file is not None and name.endswith(("tokens_file", "tls_cert", "tls_key", "tls_ca")):
                assert str(Path(file).parent) in mounts, (container["name"], name)
    selector = service["selector"]
    assert selector["ray.io/cluster"] == cluster["metadata"]["name"]
    group = groups(cluster["spec"])[selector["ray.io/group"]]
    assert serve in group["template"]["spec"]["containers"]
    workers = groups(cluster["spec"])["gpu"]
    assert options["max_workers"] <= workers["maxReplicas"]
    room = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    if options["cpu"]:
        assert "nvidia.com/gpu" not in room
        assert options["threads"] <= int(room["cpu"])
    else:
        assert float(room["nvidia.com/gpu"]) >= options["gpus_per_worker"]


@pytest.mark.parametrize("folder", SERVICES)
def test_requests_have_time_to_end_before_a_pod_is_killed(folder: str) -> None:
    cluster = of_kind(folder, "RayCluster")
    settings = of_kind(folder, "ConfigMap")["data"]
    grace = float(settings["HOMER_SERVE_GRACE_SECONDS"])
    for name, group in groups(cluster["spec"]).items():
        pod = group["template"]["spec"]
        ray = pod["containers"][0]
        (drain,) = (parse_homer(command) for command in commands_of(ray))
        assert grace < drain["timeout_seconds"] < pod["terminationGracePeriodSeconds"], name


@pytest.mark.parametrize("folder", FOLDERS)
def test_ray_starts_with_options_that_exist_and_the_head_runs_no_work(folder: str) -> None:
    for cluster in ray_clusters(folder):
        assert parse_ray_start(cluster["headGroupSpec"]["rayStartParams"], True)["num_cpus"] == 0
        for group in cluster["workerGroupSpecs"]:
            parse_ray_start(group["rayStartParams"], False)
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        workers = groups(cluster)["gpu"]
        assert cluster["enableInTreeAutoscaling"]
        assert workers["minReplicas"] < workers["maxReplicas"]
        head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert "nvidia.com/gpu" not in head["resources"]["limits"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_pod_is_one_image_of_ours_unprivileged_and_with_shared_memory(folder: str) -> None:
    images = set()
    for one in ray_objects(folder):
        for pod in pod_specs(one):
            assert pod["securityContext"]["runAsNonRoot"] is True
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            for container in pod["containers"]:
                images.add(container["image"])
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
                assert set(mounts.values()) <= set(volumes)
                assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert len(images) == (folder != "batch")


@pytest.mark.parametrize("folder", FOLDERS)
def test_ray_is_the_pinned_one_and_asks_for_a_token(folder: str) -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for cluster in ray_clusters(folder):
        assert cluster["rayVersion"] == pinned
        assert cluster["authOptions"]["mode"] == "token"


def test_the_batch_job_runs_on_the_cluster_of_the_base() -> None:
    job = of_kind("batch", "RayJob")["spec"]
    cluster = of_kind("base", "RayCluster")["metadata"]["name"]
    assert job["clusterSelector"] == {"ray.io/cluster": cluster}
    (command,) = homer_commands(job["entrypoint"])
    server = parse_homer(command)["server"]
    service = of_kind("base", "Service")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert server == f"{service['metadata']['name']}:{ports['grpc']}"


SERVE_FILES = [ROOT / "deploy" / "serve.yaml", MANIFESTS / "http" / "ray-service.yaml"]


@pytest.mark.parametrize("file", SERVE_FILES, ids=lambda file: file.name)
def test_serve_takes_its_config_and_the_application_its_arguments(
    file: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load(file.read_text())
    if config.get("kind") == "RayService":
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    read = ServeDeploySchema.model_validate(config)
    unknown = set(config) - set(read.model_dump(exclude_unset=True, by_alias=True))
    assert not unknown
    (application,) = read.applications
    arguments = dict(application.args)
    if arguments.get("host", "127.0.0.1") != "127.0.0.1":
        assert arguments["tokens_file"] == "/etc/homer/tokens/tokens"
        arguments["tokens_file"] = str(tmp_path / "tokens")
        (tmp_path / "tokens").write_text("user=0123456789abcdef")
    door = DoorArgs(**arguments)
    assert door.options().model == application.args["model"]
    assert {one.name for one in application.deployments} <= {"Service", "Door"}
