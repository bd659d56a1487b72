"""Commands as Ray jobs, on a cluster that `ray start` made."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.client import HomerClient
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import poll
from tests.cluster.processes import BIN, Sandbox, accepts, free_ports, sandbox
from tests.cluster.test_service import CONTEXT, LONG_CONTEXT, QUESTION

RAY = str(BIN / "ray")
TOKEN = Path.home() / ".ray" / "auth_token"
NEW_TOKENS = 12
# A command, and actors: all processes of a job.
OURS = re.compile(r"homer (generate|batch) |^ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)")
# A machine that is busy starts processes slowly.
JOB_SECONDS = 240.0


@dataclass(frozen=True)
class Cluster:
    """A head node and its dashboard."""

    box: Sandbox
    address: str

    def submit(self, *command: str, options: tuple[str, ...] = ()) -> Any:
        """`ray job submit`, to its end."""
        address, folder = f"--address={self.address}", "--working-dir=."
        return self.box.run(RAY, "job", "submit", address, folder, *options, "--", *command)

    def look(self, path: str) -> Any:
        """What the dashboard says."""
        request = urllib.request.Request(self.address + path)
        request.add_header("Authorization", f"Bearer {TOKEN.read_text().strip()}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def states(self, kind: str) -> set[str]:
        """In which states actors or placement groups are."""
        return {one["state"] for one in self.look(f"/api/v0/{kind}")["data"]["result"]["result"]}

    def assert_nothing_left(self) -> None:
        """No actor, no placement group, and no process but Ray's own."""
        poll(lambda: self.states("actors") <= {"DEAD"}, "actors live on", JOB_SECONDS)
        poll(lambda: self.states("placement_groups") <= {"REMOVED"}, "places are kept")

        def ours() -> list[str]:
            return [line for line in self.box.processes().values() if OURS.search(line)]

        poll(lambda: not ours(), f"processes go on: {ours()}")


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    port, dashboard, agent, agent_grpc, client, metrics, runtime = free_ports(7)
    with sandbox() as box:
        # Ray gives its own processes half a minute to start, and the lowest priority to workers.
        box.env |= {"RAY_agent_register_timeout_ms": "120000", "RAY_worker_niceness": "0"}
        started = box.start(
            RAY,
            "start",
            "--head",
            "--block",
            "--num-cpus=4",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={box.folder}/ray",
            f"--port={port}",
            "--include-dashboard=true",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--ray-client-server-port={client}",
            f"--metrics-export-port={metrics}",
            f"--runtime-env-agent-port={runtime}",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        poll(lambda: accepts(dashboard), "the dashboard does not start", JOB_SECONDS)
        # Ray asks for a token by default, but its job client sends one only when told so.
        box.env["RAY_AUTH_MODE"] = "token"
        yield Cluster(box, f"http://127.0.0.1:{dashboard}")
        started.terminate()
        started.wait(60)
        box.assert_empty()


@pytest.mark.timeout(900)
def test_a_question_as_a_job(
    head: Cluster, text_model: Path, service: HomerClient, tmp_path: Path
) -> None:
    document = tmp_path / "document.txt"
    document.write_text(CONTEXT, encoding="utf-8")
    done = head.submit(
        "homer", "generate", "--model", str(text_model), "--cpu", "--workers", "2",
        "--context", str(document), "--prefix", "Read: ", "--question", QUESTION,
        "--max-tokens", str(NEW_TOKENS), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (output,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    answer = json.loads(output)
    *_, expected = service.generate(
        context=CONTEXT, question=QUESTION, prefix="Read: ", sampling={"max_tokens": NEW_TOKENS}
    )
    assert isinstance(expected, pb.Summary)
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert set(answer["nodes_by_worker"]) == {"worker-0", "worker-1"}


@pytest.mark.timeout(900)
def test_a_batch_that_is_stopped_leaves_nothing_behind_and_goes_on_as_another_job(
    head: Cluster, text_model: Path, service: HomerClient, tmp_path: Path
) -> None:
    count = 6
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "long.txt").write_text(LONG_CONTEXT[:8_000], encoding="utf-8")
    line = {"context_path": "long.txt", "max_tokens": NEW_TOKENS}
    lines = [json.dumps({**line, "question": f" {n}?"}) for n in range(count)]
    source.write_text("\n".join([*lines, "no question"]), encoding="utf-8")
    batch = ["homer", "batch", "--input", str(source), "--output", str(out)]

    own = [*batch, "--model", str(text_model), "--cpu", "--concurrency", "2"]
    done = head.submit(*own, options=("--no-wait", "--submission-id=stopped"))
    assert done.returncode == 0, done.stdout + done.stderr
    poll(lambda: out.exists() and b"\n" in out.read_bytes(), "no answer comes", JOB_SECONDS)
    assert "CREATED" in head.states("placement_groups")
    done = head.box.run(RAY, "job", "stop", f"--address={head.address}", "stopped")
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.look("/api/jobs/stopped")["status"] == "STOPPED"
    head.assert_nothing_left()
    answered = out.read_bytes().count(b"\n")
    assert 0 < answered < count

    served = [*batch, "--server", service.address]
    done = head.submit(*served, options=("--submission-id=goes-on",))
    assert done.returncode == 1
    assert f"{answered} of {count + 1} lines are answered already" in done.stdout
    assert re.search(rf"{count + 1} of {count + 1} lines, 1 failed, [\d.]+ lines/min", done.stdout)
    assert "━" not in done.stdout
    job = head.look("/api/jobs/goes-on")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 4)
    records = [json.loads(raw) for raw in out.read_bytes().splitlines()]
    assert sorted(record["line"] for record in records) == list(range(1, count + 1))
    head.assert_nothing_left()
