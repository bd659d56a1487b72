"""A running service: its answers, its errors, and what it leaves behind when a client goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.client import HomerClient
from cluster.errors import ServiceError
from cluster.text import PromptTokenizer
from homer import HomerConfig, HomerModel
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc, sampling_pb2, worker_pb2
from tests.cluster.conftest import poll, worker_stub
from tests.golden_cases import GoldenCase

CONTEXT = "The quick brown fox jumps over the lazy dog. " * 12
LONG_CONTEXT = CONTEXT * 80
QUESTION = " What jumps?"


def answer(client: HomerClient, **request: Any) -> tuple[list[Any], pb.Summary]:
    events = list(client.generate(**request))
    summary = events[-1]
    assert isinstance(summary, pb.Summary)
    return events, summary


@pytest.fixture(scope="module")
def local(text_model: Any) -> tuple[HomerModel, PromptTokenizer]:
    config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=3)
    bias = GoldenCase.load("b_5c").bias
    tokenizer = PromptTokenizer.load(str(text_model))
    assert tokenizer is not None
    return HomerModel.from_pretrained(text_model, config=config, bias=bias), tokenizer


def test_text_is_answered_as_in_one_process(
    service: HomerClient, local: tuple[HomerModel, PromptTokenizer]
) -> None:
    import torch

    model, tokenizer = local
    events, summary = answer(
        service,
        prefix="Read: ",
        context=CONTEXT,
        question=QUESTION,
        sampling={"max_tokens": 24},
        return_kept_indices=True,
        request_id="mine",
    )
    ids = tokenizer.prompt_ids("Read: ", CONTEXT, QUESTION)
    assert ids.prefix[0] == 256
    prefix, document, suffix = (torch.tensor(part) for part in ids)
    context = model.compress(prefix, document, suffix)
    expected = model.generate(context, max_new_tokens=24).tolist()
    assert list(summary.token_ids) == expected
    assert list(summary.kept_context_indices) == context.context_indices.tolist()
    assert summary.text == tokenizer.decode(expected)
    assert summary.prompt_tokens == sum(len(part) for part in ids)
    assert summary.request_id == "mine"

    kinds = [type(event) for event in events]
    assert kinds[0] is pb.Accepted
    assert kinds[-1] is pb.Summary
    first_token = kinds.index(pb.Token)
    assert set(kinds[1:first_token]) == {pb.Progress}
    assert set(kinds[first_token:-1]) == {pb.Token}
    accepted = events[0]
    progress = [event for event in events if isinstance(event, pb.Progress)]
    assert progress[-1].kind == pb.Progress.KIND_GATHER
    assert progress[-2].leaves_done == progress[-2].leaves_total == accepted.leaves > 1
    assert progress[-2].merges_done == progress[-2].merges_total == accepted.merges
    streamed = "".join(event.text for event in events if isinstance(event, pb.Token))
    assert summary.text.startswith(streamed)


def test_token_ids_are_answered_without_text(service: HomerClient) -> None:
    case = GoldenCase.load("b_5c")
    prefix, context, suffix = (part[0].tolist() for part in case.parts)
    config = case.config
    _, summary = answer(
        service,
        prefix=prefix,
        context=context,
        question=suffix,
        sampling={"max_tokens": 17},
        compression={
            "max_chunk_len": config.max_chunk_len,
            "target_len": config.target_len,
            "warmup_layers": config.warmup_layers,
            "plan": "paper",
            "refresh_suffix": False,
        },
        return_kept_indices=True,
    )
    assert list(summary.token_ids) == case.expected["greedy_forward"].tolist()
    assert list(summary.kept_context_indices) == case.expected["kept_context_index"].tolist()


def test_a_request_may_bring_its_own_score(
    service: HomerClient, local: tuple[HomerModel, PromptTokenizer]
) -> None:
    case = GoldenCase.load("b_5c")
    prefix, context, suffix = (part[0].tolist() for part in case.parts)
    kept: dict[str | None, list[int]] = {}
    model, _ = local
    for score in (None, "softmax_mean", "query_window", "key_norm", "random"):
        events, summary = answer(
            service,
            prefix=prefix,
            context=context,
            question=suffix,
            sampling={"max_tokens": 1},
            compression={"score": score},
            return_kept_indices=True,
        )
        assert not events[0].uncalibrated
        kept[score] = list(summary.kept_context_indices)
        config = model.config if score is None else model.config.replace(score=score)
        alone = HomerModel(model.model, config, model.bias).compress(*case.parts)
        assert kept[score] == alone.context_indices.tolist(), score
    assert len({tuple(indices) for indices in kept.values()}) == len(kept)


def test_the_same_seed_gives_the_same_sample(service: HomerClient) -> None:
    sampling = {"max_tokens": 24, "temperature": 1.5, "seed": 7}
    first, second = (
        list(answer(service, context=CONTEXT, question=QUESTION, sampling=sampling)[1].token_ids)
        for _ in range(2)
    )
    other = answer(service, context=CONTEXT, question=QUESTION, sampling={**sampling, "seed": 8})[
        1
    ].token_ids
    assert first == second != list(other)


def test_requests_at_once_get_their_own_answers(service: HomerClient) -> None:
    questions = [f" Question {number}?" for number in range(6)]

    def ask(question: str) -> list[int]:
        sampling = {"max_tokens": 8}
        return list(
            answer(service, context=CONTEXT, question=question, sampling=sampling)[1].token_ids
        )

    alone = [ask(question) for question in questions]
    together: dict[str, list[int]] = {}
    threads = [
        threading.Thread(target=lambda q=question: together.update({q: ask(q)}))
        for question in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[question] for question in questions] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_server_info(service: HomerClient, text_model: Any) -> None:
    info = service.server_info()
    assert info.model == str(text_model)
    assert (info.num_layers, info.max_chunk_len, info.target_len) == (12, 64, 64)
    assert info.calibrated
    assert [(worker.name, worker.ready) for worker in info.workers] == [
        ("worker-0", True),
        ("worker-1", True),
    ]


def test_health_and_reflection(service: HomerClient) -> None:
    with grpc.insecure_channel(service.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "homer.v1.LongContext"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = reflection_pb2_grpc.ServerReflectionStub  # typed as if it could not be called
        reflection = stub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(iter(reflection.ServerReflectionInfo(iter([request]))))
        names = {entry.name for entry in reply.list_services_response.service}
        assert {"homer.v1.LongContext", "grpc.health.v1.Health"} <= names


ASK: dict[str, Any] = {"context": CONTEXT, "question": QUESTION}


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        ({**ASK, "context": ""}, "INVALID_ARGUMENT", "the context is empty"),
        ({**ASK, "question": ""}, "INVALID_ARGUMENT", "the suffix is empty"),
        ({**ASK, "prefix": "x" * 80}, "INVALID_ARGUMENT", "max_chunk_len"),
        ({**ASK, "compression": {"target_len": 0}}, "INVALID_ARGUMENT", "target_len is 0"),
        (
            {**ASK, "compression": {"score": "best"}},
            "INVALID_ARGUMENT",
            "score is 'best'; set it to",
        ),
        ({**ASK, "compression": {"warmup_layers": 12}}, "INVALID_ARGUMENT", "warmup_layers"),
        ({**ASK, "sampling": {"temperature": -1}}, "INVALID_ARGUMENT", "temperature must be"),
        ({**ASK, "sampling": {"top_p": 2}}, "INVALID_ARGUMENT", "top_p must be"),
        ({**ASK, "sampling": {"max_tokens": 10**6}}, "INVALID_ARGUMENT", "max_tokens is 1000000"),
        ({**ASK, "request_id": "x" * 200}, "INVALID_ARGUMENT", "request id has 200"),
        (
            {"context": [1, 320], "question": [1]},
            "INVALID_ARGUMENT",
            "context_ids has token id 320",
        ),
        ({**ASK, "context": "x" * (1 << 20) + "x"}, "INVALID_ARGUMENT", "takes at most 1048576"),
        ({**ASK, "context": "x" * (64 << 20)}, "RESOURCE_EXHAUSTED", "larger than max"),
        ({**ASK, "context": LONG_CONTEXT, "timeout_seconds": 0.3}, "DEADLINE_EXCEEDED", "Deadline"),
    ],
)
def test_bad_requests_are_refused_with_what_to_change(
    service: HomerClient, request_: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        list(service.generate(**request_))
    assert caught.value.code == code
    assert message in str(caught.value)
    assert_nothing_held(service)


def test_a_request_without_a_prompt_is_refused(service: HomerClient) -> None:
    with grpc.insecure_channel(service.address) as channel:
        stub = long_context_pb2_grpc.LongContextStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(sampling=sampling_pb2.SamplingParams())))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "set text or tokens" in str(caught.value.details())


def test_an_address_without_a_service() -> None:
    with HomerClient("127.0.0.1:9") as client, pytest.raises(ServiceError) as caught:
        list(client.generate(**ASK))
    assert caught.value.code == "UNAVAILABLE"
    assert "no Homer service answers at 127.0.0.1:9" in str(caught.value)


def worker_stats(service: HomerClient) -> Iterator[worker_pb2.GetWorkerStatsResponse]:
    for worker in service.server_info().workers:
        with worker_stub(worker.address) as stub:
            yield stub.GetWorkerStats(worker_pb2.GetWorkerStatsRequest())


def assert_nothing_held(service: HomerClient) -> None:
    """Every worker's own statistics say so, within a deadline."""
    held = (
        "requests",
        "node_states",
        "kv_shards",
        "state_bytes",
        "kv_shard_bytes",
        "running_calls",
    )

    def free() -> bool:
        return all(
            not any(getattr(stats, name) for name in held) for stats in worker_stats(service)
        )

    poll(free, f"workers hold {[MessageToDict(stats) for stats in worker_stats(service)]}")
    poll(lambda: service.server_info().running_requests == 0, "the service still runs requests")


def after_leaves(event: Any) -> bool:
    return isinstance(event, pb.Progress) and event.leaves_done >= 20


def after_a_token(event: Any) -> bool:
    return isinstance(event, pb.Token)


@pytest.mark.parametrize("moment", [after_leaves, after_a_token])
@pytest.mark.parametrize("way", ["cancel", "disconnect"])
def test_a_client_that_goes_away_leaves_nothing_behind(
    service: HomerClient, moment: Callable[[Any], bool], way: str
) -> None:
    client = HomerClient(service.address)
    events = client.generate(
        context=LONG_CONTEXT,
        question=QUESTION,
        sampling={"max_tokens": 60_000, "ignore_eos": True},
    )
    for event in events:
        if moment(event):
            break
    assert any(stats.requests for stats in worker_stats(service))
    left = time.monotonic()
    if way == "cancel":
        events.close()
    client.close()
    assert_nothing_held(service)
    assert time.monotonic() - left < 30
    # The service goes on.
    assert answer(service, **ASK, sampling={"max_tokens": 2})[1].generated_tokens > 0
