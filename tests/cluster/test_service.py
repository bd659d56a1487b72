"""A running service: its answers, its errors, and what it leaves behind when a client goes away."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import ray
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster import client_request
from cluster.client import AsyncHomerClient, HomerClient
from cluster.client_request import ClientRequest
from cluster.coordinator import NAMESPACE
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
        ({**ASK, "sampling": {"n": 17}}, "INVALID_ARGUMENT", "from 1 to 16 answers"),
        (
            {**ASK, "sampling": {"logprobs": 21}},
            "INVALID_ARGUMENT",
            "must be from 0 to 20",
        ),
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


def test_a_message_that_is_too_large_is_refused(service: HomerClient) -> None:
    prompt = pb.TextPrompt(context="x" * (64 << 20), suffix="?")
    with grpc.insecure_channel(service.address) as channel:
        stub = long_context_pb2_grpc.LongContextStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text=prompt)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in str(caught.value.details())


def test_errors_have_details_that_programs_read(service: HomerClient) -> None:
    with grpc.insecure_channel(service.address) as channel:
        stub = long_context_pb2_grpc.LongContextStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text=pb.TextPrompt(context="x"))))
    call: Any = caught.value
    details = dict(call.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    assert (status.code, status.message) == (call.code().value[0], call.details())
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert [status.details[0].Unpack(info), status.details[1].Unpack(bad)] == [True, True]
    assert (info.reason, info.domain) == ("PLAN", "homer")
    assert bad.field_violations[0].description == call.details()


def test_a_document_in_pieces_is_answered_as_in_one_message(
    service: HomerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {"context": [ord(c) for c in CONTEXT], "question": [ord(c) for c in QUESTION]}
    requests = [{**request, "sampling": {"max_tokens": 8}} for request in (ASK, ids)]
    whole = [answer(service, **request)[1] for request in requests]
    monkeypatch.setattr(client_request, "PIECE_LENGTH", 100)
    for request, expected in zip(requests, whole, strict=True):
        assert ClientRequest(**request).is_long
        assert list(answer(service, **request)[1].token_ids) == list(expected.token_ids)

    async def asked() -> list[Any]:
        async with AsyncHomerClient(service.address) as client:
            counts = await client.count_tokens(**ASK)
            assert counts.context_tokens == len(CONTEXT)
            assert (await client.model_info()).has_tokenizer
            return [event async for event in client.generate(**requests[0])]

    assert list(asyncio.run(asked())[-1].token_ids) == list(whole[0].token_ids)


def test_several_answers_come_from_one_tree(service: HomerClient) -> None:
    sampling: dict[str, Any] = {"max_tokens": 6, "temperature": 1.5, "seed": 7}
    events, summary = answer(service, **ASK, sampling={**sampling, "n": 3})
    answers = [list(one.token_ids) for one in summary.answers]
    assert len({tuple(tokens) for tokens in answers}) == 3
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for event in events:
        if isinstance(event, pb.Token):
            told[event.answer].append(event.token_id)
    assert list(told.values()) == answers
    assert list(summary.token_ids) == answers[0]
    assert [one.generated_tokens for one in summary.answers] == [6, 6, 6]
    leaves = [e for e in events if isinstance(e, pb.Progress) and e.kind == pb.Progress.KIND_LEAF]
    assert len(leaves) == summary.leaves
    # The first is the only one that there is without the others; more do not change it.
    alone = answer(service, **ASK, sampling=sampling)[1]
    assert list(alone.token_ids) == answers[0]
    assert not alone.answers
    again = answer(service, **ASK, sampling={**sampling, "n": 2})[1]
    assert [list(one.token_ids) for one in again.answers] == answers[:2]
    # A stop string ends the answer that has it, and no other.
    stop = summary.answers[1].text[:1]
    cut = answer(service, **ASK, sampling={**sampling, "n": 3, "stop": [stop]})[1]
    for number, one in enumerate(summary.answers):
        assert cut.answers[number].text == one.text.split(stop)[0]
    assert cut.answers[1].finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert_nothing_held(service)


def test_an_answer_that_a_stop_string_ended_is_decoded_no_further(service: HomerClient) -> None:
    def decoded() -> int:
        return sum(worker.generated_tokens for worker in service.server_info().workers)

    sampling: dict[str, Any] = {"max_tokens": 300, "temperature": 1.5, "seed": 7, "n": 2}
    first, second = answer(service, **ASK, sampling={**sampling, "ignore_eos": True})[1].answers
    starts = range(len(second.text) - 2)
    stop = next(s for at in starts if (s := second.text[at : at + 3]) not in first.text)
    before = decoded()
    cut = answer(service, **ASK, sampling={**sampling, "ignore_eos": True, "stop": [stop]})[1]
    assert cut.answers[1].text == second.text.split(stop)[0]
    assert cut.answers[0].generated_tokens == 300
    # What was on its way when the service said so is all that was made in vain.
    assert 300 < decoded() - before < 300 + 150


def test_logprobs_are_the_models_own(
    service: HomerClient, local: tuple[HomerModel, PromptTokenizer]
) -> None:
    import torch

    model, tokenizer = local
    prefix, document, suffix = map(torch.tensor, tokenizer.prompt_ids("", CONTEXT, QUESTION))
    context = model.compress(prefix, document, suffix)
    sampling = {"max_tokens": 4, "temperature": 0.7, "seed": 3, "top_k": 5, "logprobs": 3}
    events, summary = answer(service, **ASK, sampling=sampling)
    expected = model.score(context, torch.tensor(summary.token_ids)).log_softmax(-1)
    tokens = [event for event in events if isinstance(event, pb.Token)]
    assert [token.token_id for token in tokens] == list(summary.token_ids)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob.token_id == token.token_id
        assert token.logprob.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        top = row.topk(3)
        assert [one.token_id for one in token.top_logprobs] == top.indices.tolist()
        got = [one.logprob for one in token.top_logprobs]
        assert got == pytest.approx(top.values.tolist(), abs=1e-4)
        assert token.logprob.text == tokenizer.spell(token.token_id)
    only = answer(service, **ASK, sampling={**sampling, "logprobs": 0})[0]
    told = [event for event in only if isinstance(event, pb.Token)]
    assert all(token.HasField("logprob") and not token.top_logprobs for token in told)


def test_a_request_is_aborted_by_its_name(service: HomerClient) -> None:
    events = service.generate(
        context=LONG_CONTEXT,
        question=QUESTION,
        request_id="too-long",
        sampling={"max_tokens": 60_000, "ignore_eos": True},
    )
    next(events)
    with HomerClient(service.address) as other:
        assert other.abort("too-long") == 1
        with pytest.raises(ServiceError) as ended:
            list(events)
        assert (ended.value.code, str(ended.value)) == (
            "CANCELLED",
            "request 'too-long' was aborted",
        )
        with pytest.raises(ServiceError) as unknown:
            other.abort("too-long")
    assert unknown.value.code == "NOT_FOUND"
    assert_nothing_held(service)


def test_the_service_tells_what_it_takes(service: HomerClient, text_model: Any) -> None:
    counts = service.count_tokens("Ærø", "ab", "pre")
    # A byte each, and the beginning-of-sequence token.
    assert (counts.prefix_tokens, counts.context_tokens, counts.suffix_tokens) == (4, 5, 2)
    info = service.model_info()
    assert (info.model, info.num_layers, info.vocab_size) == (str(text_model), 12, 320)
    assert (info.has_tokenizer, info.calibrated, info.max_answers) == (True, True, 16)
    assert info.max_document_bytes > info.max_message_bytes > 0
    assert (info.compression.max_chunk_len, info.compression.warmup_layers) == (64, 3)


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


def test_the_coordinator_does_without_torch(service: HomerClient) -> None:
    coordinator: Any = ray.get_actor("shared", NAMESPACE)
    torch = ray.get(coordinator.__ray_call__.remote(lambda _: sys.modules["torch"]))
    assert torch is None
