"""Workers without Ray that ask for a token and a certificate, of callers and of each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import torch

from homer import HomerConfig, MergePlan
from homer.v1 import worker_pb2, worker_pb2_grpc
from tests.certificates import Authority
from tests.golden_cases import model_dir
from tests.workers.processes import Prompt, WorkerProcess, release, run_across, running_workers
from workers.channels import Credentials
from workers.tls import Tls

OLD, NEW = "the-token-from-before", "the-token-from-now-on"


@dataclass
class Guarded:
    workers: list[WorkerProcess]
    tokens: Path
    tls: Tls


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    tls = replace(Authority(folder, "authority").issue("homer-worker"), server_name="homer-worker")
    tokens = folder / "tokens"
    tokens.write_text(f"old={OLD}\n")
    options = ["--tokens-file", str(tokens), "--tls-ca", str(tls.ca), "--tls-cert", str(tls.cert)]
    options += ["--tls-key", str(tls.key), "--tls-server-name", "homer-worker"]
    running = running_workers(model_dir("A"), *options, count=2, credentials=Credentials(OLD, tls))
    with running as pair:
        yield Guarded(pair, tokens, tls)


def prompt(request_id: str) -> Prompt:
    plan = MergePlan.build(
        2, 60, 3, 8, HomerConfig(max_chunk_len=24, target_len=24, warmup_layers=1)
    )
    parts = [torch.arange(1, 1 + length) for length in (2, 60, 3)]
    return Prompt.of(request_id, plan, parts)


def code_of(address: str, credentials: Credentials) -> grpc.StatusCode:
    channel = credentials.channel(address, ())
    try:
        stub = worker_pb2_grpc.WorkerStub(channel)
        stub.GetWorkerStats(worker_pb2.GetWorkerStatsRequest(), timeout=60)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    finally:
        channel.close()
    return grpc.StatusCode.OK


def test_workers_fetch_from_each_other(guarded: Guarded) -> None:
    answer = run_across(prompt("across"), guarded.workers, 0)
    assert len(answer.tokens) == 8
    assert sum(worker.stats().received_bytes for worker in guarded.workers) > 0
    release(prompt("across"), guarded.workers)


def test_who_lacks_the_token_or_the_certificate_is_refused(guarded: Guarded) -> None:
    address, tls = guarded.workers[0].address, guarded.tls
    assert code_of(address, Credentials(OLD, tls)) is grpc.StatusCode.OK
    assert code_of(address, Credentials(NEW, tls)) is grpc.StatusCode.UNAUTHENTICATED
    assert code_of(address, Credentials(None, tls)) is grpc.StatusCode.UNAUTHENTICATED
    without = Tls(ca=tls.ca, server_name=tls.server_name)
    assert code_of(address, Credentials(OLD, without)) is grpc.StatusCode.UNAVAILABLE
    assert code_of(address, Credentials(OLD)) is grpc.StatusCode.UNAVAILABLE


def test_a_new_token_is_brought_in_below_the_old_one(guarded: Guarded) -> None:
    address = guarded.workers[0].address
    guarded.tokens.write_text(f"old={OLD}\nnew={NEW}\n")
    for token in (OLD, NEW):
        assert code_of(address, Credentials(token, guarded.tls)) is grpc.StatusCode.OK
    guarded.tokens.write_text(f"old={OLD}\n")
    assert code_of(address, Credentials(NEW, guarded.tls)) is grpc.StatusCode.UNAUTHENTICATED


def test_an_address_that_is_none_is_the_fault_of_the_call(guarded: Guarded) -> None:
    asked = prompt("elsewhere")
    (first, *_) = guarded.workers
    root = asked.plan.root
    with pytest.raises(grpc.RpcError) as caught:
        first.stub.Merge(asked.merge(root.id, ["unix:/run/x"] * len(root.children)), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "write host:port" in str(caught.value)
    release(asked, guarded.workers)


def test_without_a_token_a_worker_does_not_leave_the_loopback() -> None:
    command = [sys.executable, "-m", "workers", "--model", str(model_dir("A")), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "everybody who reaches 0.0.0.0 could call this port" in done.stderr
    assert "Traceback" not in done.stderr
