"""Messages that nobody means, to workers, to the gRPC door and to the HTTP door.

FUZZ says how many go to each gRPC service (to each HTTP route a twentieth of that), SEED which.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest
import schemathesis
import torch
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error

from cluster.client import HomerClient
from homer import HomerConfig, MergePlan
from homer.v1 import long_context_pb2 as pb
from homer.v1 import tensor_pb2, worker_pb2
from tests.cluster.conftest import Run
from tests.cluster.fuzz.campaign import MOST_TOKENS, Report, fuzz
from tests.cluster.http.test_http import serving
from tests.cluster.test_service import CONTEXT, QUESTION, answer, assert_nothing_held
from tests.golden_cases import model_dir
from tests.workers.processes import Prompt, WorkerProcess, release, run_across, running_workers

MESSAGES = int(os.environ.get("FUZZ", "400"))
SEED = int(os.environ.get("SEED", "1"))
REQUESTS = 12
LAYERS = 8
ASK: Any = {"context": CONTEXT, "question": QUESTION, "sampling": {"max_tokens": 4}}


def prompt(request_id: str) -> Prompt:
    config = HomerConfig(max_chunk_len=24, target_len=24, warmup_layers=1)
    plan = MergePlan.build(2, 60, 3, LAYERS, config)
    draw = torch.Generator().manual_seed(7)
    parts = [torch.randint(100, (length,), generator=draw) for length in (2, 60, 3)]
    return Prompt.of(request_id, plan, parts)


def worker_seeds(addresses: Sequence[str]) -> Any:
    """Valid calls of a worker, for one of a few requests: some find what others left."""

    def seeds(method: str, draw: random.Random) -> list[Message]:
        asked = prompt(f"fuzz-{draw.randrange(REQUESTS)}-{draw.randrange(1 + MESSAGES // 200)}")
        plan, attempt = asked.plan, draw.randrange(3)
        node = draw.choice(plan.nodes)
        wanted = tensor_pb2.TransferOptions()
        match method:
            case "RunSubtree":
                return [asked.subtree(node.id, attempt)]
            case "Merge":
                merge = draw.choice([one for one in plan.nodes if one.children])
                places = [draw.choice(("", *addresses)) for _ in merge.children]
                return [asked.merge(merge.id, places, attempt)]
            case "FetchState":
                id_ = worker_pb2.NodeId(height=node.id.height, index=node.id.index)
                return [
                    worker_pb2.FetchStateRequest(
                        request_id=asked.request_id, node=id_, transfer=wanted
                    )
                ]
            case "GatherKv":
                kept = sorted(draw.sample(range(60), 9))
                return [
                    worker_pb2.GatherKvRequest(
                        request_id=asked.request_id, context_indices=kept, transfer=wanted
                    )
                ]
            case "GenerateTokens":
                return [asked.generate(draw.sample(addresses, 1), 4, attempt)]
            case "Prune":
                return [asked.prune(node.id, range(node.context_start, node.context_end, 2))]
            case "Drop":
                return [asked.drop(node.id, attempt)]
            case "Release" if draw.random() < 0.3:
                return [worker_pb2.ReleaseRequest(request_id=asked.request_id)]
        return []

    return seeds


def worker_sequence(draw: random.Random) -> list[tuple[str, list[Message]]]:
    """One request on one worker, from its leaves to its answer, and what is asked of it then."""
    asked = prompt(f"whole-{draw.randrange(1 << 32)}")
    plan, wanted = asked.plan, tensor_pb2.TransferOptions()
    calls: list[tuple[str, Message]] = [
        ("Merge", asked.merge(node.id, [""] * len(node.children)))
        if node.children
        else ("RunSubtree", asked.subtree(node.id))
        for node in plan.nodes
    ]
    name, leaf = asked.request_id, plan.leaves[-1]
    root = worker_pb2.NodeId(height=plan.root.id.height, index=plan.root.id.index)
    calls += [
        ("FetchState", worker_pb2.FetchStateRequest(request_id=name, node=root, transfer=wanted)),
        ("GenerateTokens", asked.generate([], 2)),
        ("GatherKv", worker_pb2.GatherKvRequest(request_id=name, transfer=wanted)),
        ("Prune", asked.prune(leaf.id, [leaf.context_start])),
        ("Drop", asked.drop(leaf.id)),
    ]
    # Some stay, for others to find.
    if draw.random() < 0.7:
        calls.append(("Release", worker_pb2.ReleaseRequest(request_id=name)))
    return [(method, [message]) for method, message in calls]


def door_sequence(draw: random.Random) -> list[tuple[str, list[Message]]]:
    """A document as a whole and in pieces, and what is known of them then."""
    name, text = f"whole-{draw.randrange(1 << 32)}", pb.TextPrompt(suffix=QUESTION)
    asked = pb.GenerateRequest(text=text, request_id=name, sampling={"max_tokens": 2})
    whole = pb.GenerateRequest()
    whole.CopyFrom(asked)
    whole.text.context = CONTEXT
    part = pb.GenerateFromStreamRequest
    pieces = [part(context_utf8=CONTEXT[at : at + 300].encode()) for at in (0, 300)]
    return [
        ("CountTokens", [pb.CountTokensRequest(text=whole.text)]),
        ("Generate", [whole]),
        ("GenerateFromStream", [part(request=asked), *pieces]),
        ("GetTrace", [pb.GetTraceRequest(request_id=name)]),
        ("Abort", [pb.AbortRequest(request_id=name)]),
    ]


def assert_reached(report: Report, service: Any, but: Sequence[str] = ()) -> None:
    """Some calls of each method were work, else the others met nothing and show little."""
    done = {one.name: report.succeeded(one.name) for one in service.methods if one.name not in but}
    assert min(done.values()) >= max(1, MESSAGES // 400), done


def door_seeds(method: str, draw: random.Random) -> list[Message]:
    if method != "Generate":
        return []
    text = pb.TextPrompt(
        prefix="Read: ", context=CONTEXT[: draw.randrange(5, 400)], suffix=QUESTION
    )
    ids = pb.TokenPrompt(prefix_ids=[1], context_ids=range(100), suffix_ids=[2, 3])
    sampling: Any = {"max_tokens": 2, "temperature": draw.choice((0, 0.7)), "stop": ["x"]}
    compression: Any = {
        "max_chunk_len": 64,
        "target_len": 48,
        "warmup_layers": 1,
        "score": "random",
    }
    return [
        pb.GenerateRequest(text=text, sampling=sampling),
        pb.GenerateRequest(tokens=ids, sampling=sampling, compression=compression, priority=3),
    ]


async def run_fuzz(address: str, service: Any, seeds: Any, sequence: Any, **more: Any) -> Report:
    async with grpc.aio.insecure_channel(address) as channel:
        return await fuzz(channel, service, seeds, sequence, MESSAGES, SEED, **more)


@pytest.fixture(scope="module")
def fuzzed_workers() -> Iterator[list[WorkerProcess]]:
    with running_workers(model_dir("A"), "--peer-stall-seconds", "1", count=2) as pair:
        yield pair


@pytest.mark.timeout(60 + MESSAGES)
def test_workers_answer_whatever_comes(fuzzed_workers: list[WorkerProcess], run: Run[Any]) -> None:
    before = run_across(prompt("before"), fuzzed_workers, 0).tokens
    release(prompt("before"), fuzzed_workers)
    service = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
    addresses = [worker.address for worker in fuzzed_workers]
    sent = run_fuzz(addresses[0], service, worker_seeds(addresses), worker_sequence, rare=["Reset"])
    report = run(sent)
    print(report)
    assert report.faults == []
    assert report.calls == MESSAGES
    # What could be ended is over before it is heard of.
    assert_reached(report, service, but=["Reset", "EndAnswer"])
    for worker in fuzzed_workers:
        worker.stub.Reset(worker_pb2.ResetRequest())
        assert worker.holds_nothing()
        assert worker.stats().reserved_bytes == 0
    assert run_across(prompt("after"), fuzzed_workers, 0).tokens == before
    release(prompt("after"), fuzzed_workers)


@pytest.mark.timeout(60 + MESSAGES)
def test_the_grpc_door_answers_whatever_comes(service: HomerClient, run: Run[Any]) -> None:
    before = answer(service, **ASK)[1].text
    described = pb.DESCRIPTOR.services_by_name["LongContext"]
    report = run(run_fuzz(service.address, described, door_seeds, door_sequence))
    print(report)
    assert report.faults == []
    assert report.calls == MESSAGES
    # What could be aborted has ended by then.
    assert_reached(report, described, but=["Abort"])
    assert_nothing_held(service)
    assert answer(service, **ASK)[1].text == before


@pytest.mark.timeout(60 + MESSAGES)
def test_the_http_door_answers_whatever_comes(service: HomerClient) -> None:
    with serving(service.address) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        found: Any = schema.get_all_operations()
        operations = [one.ok() for one in found]
        assert len(operations) > 3
        for operation in operations:
            ask_http(operation)
    assert_nothing_held(service)


def ask_http(operation: Any) -> None:
    """Call a route with whatever its schema allows, and some that it does not."""

    @seed(SEED)
    @settings(
        max_examples=max(5, MESSAGES // 20),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        body = case.body
        if isinstance(body, dict):
            # Nearly no random name is a model's, and a long answer is no fault.
            body["model"] = "B"
            for name in ("max_tokens", "max_completion_tokens"):
                if isinstance(body.get(name), int) and body[name] > MOST_TOKENS:
                    body[name] = MOST_TOKENS
            body.setdefault("max_tokens", MOST_TOKENS)
        response = case.call(timeout=60)
        case.validate_response(response, checks=[not_a_server_error])

    ask()
