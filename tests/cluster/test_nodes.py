"""A service over several nodes, on Ray's own test cluster: raylets side by side on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from cluster.client import HomerClient
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import poll
from tests.cluster.processes import BIN, Lines, Sandbox, accepts, free_ports, sandbox
from tests.cluster.test_service import CONTEXT, LONG_CONTEXT, QUESTION

# Ray, a node for each raylet and the service start side by side, on as few cores as there are.
START_SECONDS = 240.0
LONG_ANSWER_TOKENS = 200
AUTOSCALER_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)
# A node whose processes are gone is given up after a second or two instead of twelve.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    # A raylet that a busy machine lets wait is not dead.
    "health_check_failure_threshold": 4,
}


@contextmanager
def ray_nodes(box: Sandbox) -> Iterator[Any]:
    """A cluster with a head that has no room for workers; this process does not join it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        # Its processes inherit this from us, and commands in the sandbox have it too.
        environment.setenv("RAY_AUTH_MODE", "disabled")
        # Where it writes which cluster is the last that was started here.
        environment.setenv("RAY_TMPDIR", str(box.folder))
        box.env["RAY_AUTH_MODE"] = "disabled"
        nodes = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "temp_dir": f"{box.folder}/ray",
                "_system_config": HEALTH_CHECKS,
            },
        )
        try:
            yield nodes
        finally:
            nodes.shutdown()


@contextmanager
def autoscaling_ray(box: Sandbox) -> Iterator[str]:
    """A head without processors, and Ray's autoscaler, whose nodes are raylets on this machine."""
    box.env |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    port, agent, agent_grpc, client, metrics, runtime = free_ports(6)
    node = {"node_config": {}, "min_workers": 0}
    config = {
        "cluster_name": "test",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05,
        # The provider's own type needs a file that Ray's package leaves out.
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        # What would be run on a machine of its own.
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in AUTOSCALER_COMMANDS},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**node, "resources": {"CPU": 0}, "max_workers": 0},
            "one-cpu": {**node, "resources": {"CPU": 1}, "max_workers": 2},
        },
    }
    file = box.folder / "autoscaler.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    of_the_head = {
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    head = box.start(
        "env", *(f"{name}={value}" for name, value in of_the_head.items()),
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0", "--include-dashboard=false",
        "--node-ip-address=127.0.0.1", f"--temp-dir={box.folder}/ray", f"--port={port}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={runtime}", f"--autoscaling-config={file}",
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    poll(lambda: accepts(port), "Ray does not start")
    yield f"127.0.0.1:{port}"
    head.terminate()
    head.wait(60)


@contextmanager
def served(
    box: Sandbox, address: str, model: Path, *options: str
) -> Iterator[tuple[HomerClient, subprocess.Popen[str]]]:
    """`homer serve` on the Ray cluster at `address`: a patient client, and the process."""
    started = box.start(
        str(BIN / "homer"), "serve", "--address", address, "--model", str(model), "--cpu",
        "--port", "0", *options, stderr=subprocess.STDOUT,
    )  # fmt: skip
    ready = Lines(started.stdout).wait_for(r"homer serves .* at (\S+) with", START_SECONDS)
    with HomerClient(ready[1], retries=10) as client:
        yield client, started
    started.terminate()
    assert started.wait(60) == 0


def answer(client: HomerClient) -> list[int]:
    *_, summary = client.generate(
        context=CONTEXT, question=QUESTION, sampling={"max_tokens": 8}, timeout_seconds=120
    )
    assert isinstance(summary, pb.Summary)
    return list(summary.token_ids)


def long_answer(client: HomerClient, request_id: str) -> list[int]:
    *_, summary = client.generate(
        context=LONG_CONTEXT,
        question=QUESTION,
        request_id=request_id,
        sampling={"max_tokens": LONG_ANSWER_TOKENS, "ignore_eos": True},
    )
    assert isinstance(summary, pb.Summary)
    return list(summary.token_ids)


@contextmanager
def busy(client: HomerClient) -> Iterator[None]:
    """Several requests at a time, one after the other, for as long as this lasts."""
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            with closing(client.generate(context=LONG_CONTEXT, question=QUESTION)) as events:
                for event in events:
                    if enough.is_set() or isinstance(event, pb.Token):
                        break

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            yield
        finally:
            enough.set()
    for asked in asking:
        asked.result()


def ready_workers(client: HomerClient) -> list[pb.ServerWorker]:
    return [worker for worker in client.server_info().workers if worker.ready]


def absent_workers(client: HomerClient) -> int:
    """How many workers the service says are absent, and why."""
    workers = client.server_info().workers
    return sum(w.state == pb.WORKER_STATE_ABSENT and bool(w.problem) for w in workers)


def raylets_of(client: HomerClient) -> dict[str, int]:
    """The workers, each with the process id of its node's raylet, which is its parent."""
    return {w.name: parent_of(listener(w.address)) for w in ready_workers(client)}


def listener(address: str) -> int:
    """The process that listens at an address: a service's workers tell nobody else who they are."""
    host, _, port = address.rpartition(":")
    # gRPC's sockets are those of IPv6, for addresses of IPv4 too.
    wanted = {(host, int(port)), (f"::ffff:{host}", int(port))}
    listens = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    (pid,) = {c.pid for c in listens if tuple(c.laddr) in wanted}
    assert pid is not None
    return pid


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/stat").read_text()
    return int(status.rpartition(")")[2].split()[1])


def keeps_the_service(node: Any) -> bool:
    """Whether the coordinator runs on a node: its raylet is the parent."""
    parents = set()
    for entry in Path("/proc").glob("[0-9]*"):
        # Processes come and go meanwhile.
        with suppress(OSError):
            if (entry / "cmdline").read_text().startswith("ray::Coordinator"):
                parents.add(parent_of(int(entry.name)))
    return raylet(node) in parents


def add_node(nodes: Any, number: int, labels: dict[str, str]) -> Any:
    """A node with an address of its own, so that no driver on this machine takes it for its own."""
    return nodes.add_node(num_cpus=2, labels=labels, node_ip_address=f"127.0.0.{10 + number}")


def raylet(node: Any) -> int:
    (process,) = node.all_processes["raylet"]
    return int(process.process.pid)


# Five nodes of Ray and three starts of workers, one after the other.
@pytest.mark.timeout(600)
def test_nodes_are_lost_and_join(text_model: Path) -> None:
    with sandbox() as box, ray_nodes(box) as nodes:
        first, second = (add_node(nodes, number, {"zone": "a"}) for number in (1, 2))
        add_node(nodes, 3, {})
        options = ["--workers", "2", "--placement", "strict-spread", "--labels", '{"zone": "a"}']
        with served(box, nodes.address, text_model, *options) as (client, _):
            # Each on its own node, and none where the label is not.
            assert set(raylets_of(client).values()) == {raylet(first), raylet(second)}
            expected = answer(client)
            # Ray joins `homer serve` to any of the nodes; the one beside it is to be lost.
            first, second = sorted((first, second), key=keeps_the_service, reverse=True)
            (lost,) = (n for n, pid in raylets_of(client).items() if pid == raylet(second))
            nodes.remove_node(second, allow_graceful=False)
            poll(lambda: absent_workers(client) == 1, "the service does not say what it misses")
            # The node without the label stays free.
            assert lost not in [worker.name for worker in ready_workers(client)]
            assert answer(client) == expected
            third = add_node(nodes, 4, {"zone": "a"})
            poll(lambda: f"{lost}.1" in raylets_of(client), "no worker on the new node", 120)
            assert set(raylets_of(client).values()) == {raylet(first), raylet(third)}
            assert answer(client) == expected

            # A node that is drained first costs nothing: what runs there ends there.
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(long_answer, client, "while-draining")
                poll(lambda: bool(client.server_info().running_requests), "nothing runs")
                given = box.run(
                    str(BIN / "homer"), "drain", "--address", nodes.address,
                    "--node", third.node_id, "--json",
                )  # fmt: skip
                assert json.loads(given.stdout) == {"drained": [f"{lost}.1"], "left": []}, given
                assert len(ready_workers(client)) == 1
                nodes.remove_node(third, allow_graceful=False)
                assert len(running.result(120)) == LONG_ANSWER_TOKENS
            assert not [one for one in client.trace("while-draining").slices if one.lost]
            assert answer(client) == expected
        box.assert_empty()


def test_the_pool_grows_with_its_work_and_gives_back_what_is_idle(text_model: Path) -> None:
    options = ["--max-workers", "2", "--grow-after-seconds", "0.5", "--idle-seconds", "2"]
    with sandbox() as box, autoscaling_ray(box) as address:
        # The autoscaler starts a node for the first worker, too.
        with served(box, address, text_model, *options) as (client, serve):
            (alone,) = raylets_of(client).values()
            with busy(client):
                poll(lambda: len(raylets_of(client)) == 2, "the pool does not grow", 120)
                (joined,) = set(raylets_of(client).values()) - {alone}
            poll(lambda: len(ready_workers(client)) == 1, "the pool does not shrink")
            poll(
                lambda: not (Path(f"/proc/{alone}").exists() and Path(f"/proc/{joined}").exists()),
                "the node of the worker that was given back is still there",
            )
            assert len(answer(client)) == 8

            # Told to end twice, the service does not wait for a request that runs.
            running = client.generate(
                context=LONG_CONTEXT,
                question=QUESTION,
                sampling={"max_tokens": 60_000, "ignore_eos": True},
            )
            assert isinstance(next(running), pb.Accepted)
            serve.send_signal(signal.SIGTERM)
            port = int(client.address.rpartition(":")[2])
            poll(lambda: not accepts(port), "the door stays open")
            assert serve.poll() is None
            serve.send_signal(signal.SIGINT)
            assert serve.wait(60) == 0
        actors = ("ray::WorkerActor", "ray::Coordinator", "ray::Keeper")
        poll(
            lambda: not [line for line in box.processes().values() if line.startswith(actors)],
            "something of the service stays on the cluster",
        )
