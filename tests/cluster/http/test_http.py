"""The HTTP door before a running service, asked by OpenAI's own client, by curl, and by hand."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from cluster.client import HomerClient
from cluster.http.app import HttpDoor, build_http
from cluster.http.middleware import HttpLimits
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import poll
from tests.cluster.test_service import CONTEXT, LONG_CONTEXT

MODEL = "B"
QUESTION = " What jumps?"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
CHAT: Any = [{"role": "system", "content": "Read."}, {"role": "user", "content": CONTEXT + "Who?"}]


@contextmanager
def listening(make: Callable[[], Any]) -> Iterator[int]:
    """An application, made in the event loop of its server; gives its port on this machine."""

    connections = socket.create_server(("127.0.0.1", 0))
    port = connections.getsockname()[1]
    ready = threading.Event()
    server: list[uvicorn.Server] = []

    async def run() -> None:
        server.append(uvicorn.Server(uvicorn.Config(make(), log_level="warning")))
        ready.set()
        await server[0].serve([connections])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    ready.wait()
    try:
        yield port
    finally:
        server[0].should_exit = True
        thread.join()


@contextmanager
def serving(
    address: str, door: Mapping[str, Any] = MappingProxyType({}), **settings: Any
) -> Iterator[str]:
    """The HTTP door of the service at `address`; gives its URL."""
    with listening(lambda: build_http(HttpDoor(address, **door), **settings)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def url(service: HomerClient) -> Iterator[str]:
    with serving(service.address) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(url: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def over_grpc(service: HomerClient, **request: Any) -> pb.Summary:
    *_, summary = service.generate(sampling={"max_tokens": 12}, return_kept_indices=True, **request)
    assert isinstance(summary, pb.Summary)
    return summary


def test_a_completion_is_the_answer_of_the_grpc_service(
    client: openai.OpenAI, service: HomerClient
) -> None:
    expected = over_grpc(service, prefix="Read: ", context=CONTEXT, question=QUESTION)
    body: Any = {"homer": {"prefix": "Read: ", "question": QUESTION, "return_kept_indices": True}}
    got = client.completions.create(model=MODEL, prompt=CONTEXT, extra_body=body, **GREEDY)
    assert got.object == "text_completion"
    assert got.choices[0].text == expected.text
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.prompt_tokens
    assert (got.usage.completion_tokens, got.usage.total_tokens) == (
        12,
        expected.prompt_tokens + 12,
    )
    facts = got.model_extra and got.model_extra["homer"]
    assert facts
    assert facts["kept_tokens"] == expected.kept_tokens
    assert facts["kept_context_indices"] == list(expected.kept_context_indices)
    assert facts["leaves"] == expected.leaves > 1
    assert facts["levels"] > 1
    assert facts["seconds"]["total"] > 0


def test_evidence_and_progress_come_with_a_stream(url: str, service: HomerClient) -> None:
    expected = over_grpc(
        service, prefix="", context=CONTEXT, question=QUESTION, return_evidence=True
    )
    homer = {"question": QUESTION, "return_evidence": True, "progress": True}
    body = {"model": MODEL, "prompt": CONTEXT, "stream": True, "homer": homer, **GREEDY}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [line.decode().removeprefix("data: ") for line in answer if line.strip()]
    assert lines.pop() == "[DONE]\n"
    chunks = [json.loads(line) for line in lines]
    told = [chunk["homer"] for chunk in chunks if not chunk["choices"]]
    accepted, *progress = told
    levels = accepted["accepted"]["level_nodes"]
    nodes = {(one["progress"]["height"], one["progress"]["index"]) for one in progress[:-1]}
    assert nodes == {(height, i) for height, count in enumerate(levels) for i in range(count)}
    assert all(one["progress"]["worker"] for one in progress[:-1])
    assert progress[-1]["progress"]["kind"] == "gather"
    evidence = chunks[-1]["homer"]["evidence"]
    assert [node["kept_runs"] for node in evidence["nodes"]] == [
        list(node.kept_runs) for node in expected.evidence.nodes
    ]
    assert [one["text"] for one in evidence["passages"]] == [
        one.text for one in expected.evidence.passages
    ]


def test_passages_of_a_chat_are_places_in_its_first_message(client: openai.OpenAI) -> None:
    document = f"First. {CONTEXT.strip()}"
    content: Any = [{"type": "text", "text": document}, {"type": "text", "text": "Who?"}]
    chat: Any = [{"role": "system", "content": "Read."}, {"role": "user", "content": content}]
    got = client.chat.completions.create(
        model=MODEL, messages=chat, extra_body={"homer": {"return_evidence": True}}, **GREEDY
    )
    facts = got.model_extra and got.model_extra["homer"]
    assert facts
    passages = facts["evidence"]["passages"]
    assert len(passages) > 1
    for one in passages:
        assert one["text"] == document[one["char_start"] : one["char_end"]]


def test_a_chat_comes_whole_or_as_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    text = whole.choices[0].message.content
    assert text
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=CHAT,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(delta or "" for delta in deltas) == text
    assert sum(bool(delta) for delta in deltas) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.completions.create(
            model=MODEL, prompt=CONTEXT + "Who?", temperature=0, max_tokens=24, **more
        )

    free = ask()
    text = free.choices[0].text
    stop = text[len(text) // 2 :][:2]
    assert len(stop) == 2
    cut = ask(stop=[stop, "never said"])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < free.usage.completion_tokens
    streamed = "".join(chunk.choices[0].text for chunk in ask(stop=stop, stream=True))
    assert streamed == cut.choices[0].text


def test_several_choices_and_their_logprobs(client: openai.OpenAI) -> None:
    more: Any = {"n": 2, "temperature": 1.5, "seed": 5, "max_tokens": 4}
    chat = client.chat.completions.create(
        model=MODEL, messages=CHAT, logprobs=True, top_logprobs=2, **more
    )
    assert [one.index for one in chat.choices] == [0, 1]
    texts = [one.message.content for one in chat.choices]
    assert len(set(texts)) == 2
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 8
    for one in chat.choices:
        assert one.logprobs is not None
        assert one.logprobs.content is not None
        assert len(one.logprobs.content) == 4
        for token in one.logprobs.content:
            assert token.logprob < 0
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    streamed: dict[int, str] = {0: "", 1: ""}
    logprobs: dict[int, list[float]] = {0: [], 1: []}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=CHAT, logprobs=True, stream=True, **more
    ):
        for part in chunk.choices:
            streamed[part.index] += part.delta.content or ""
            if part.logprobs and part.logprobs.content:
                logprobs[part.index] += [token.logprob for token in part.logprobs.content]
    assert list(streamed.values()) == texts
    for one in chat.choices:
        alone = [token.logprob for token in (one.logprobs and one.logprobs.content) or ()]
        # Other requests of the same moment make other batches, which round differently.
        assert logprobs[one.index] == pytest.approx(alone, abs=1e-4)

    ask: Any = {"model": MODEL, "prompt": CONTEXT + "Who?", "logprobs": 1, **more}
    whole = client.completions.create(**ask)
    found = [one.logprobs for one in whole.choices]
    for one in found:
        assert one is not None
        assert one.tokens is not None
        assert one.top_logprobs is not None
        assert [len(top) for top in one.top_logprobs] == [1] * 4
        starts = [sum(map(len, one.tokens[:at])) for at in range(4)]
        assert one.text_offset == starts
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in client.completions.create(stream=True, **ask):
        for part in chunk.choices:
            if part.logprobs:
                offsets[part.index] += part.logprobs.text_offset or []
    assert list(offsets.values()) == [one and one.text_offset for one in found]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == (MODEL, "homer")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("another")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b'{"model": "B"}', 400, "prompt: Field required"),
        ("/v1/completions", b'{"model": "C", "prompt": "a b"}', 404, "'C' does not exist"),
        ("/v1/completions", b'{"model": "B", "prompt": "a", "n": 0}', 400, "n: "),
        ("/v1/completions", b'{"model": "B", "prompt": "a b", "n": 99}', 400, "from 1 to 16"),
        (
            "/v1/chat/completions",
            b'{"model": "B", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}',
            400,
            "only for logprobs=true",
        ),
        ("/v1/completions", b'{"model": "B", "prompt": "a", "sop": "x"}', 400, "argument 'sop'"),
        (
            "/v1/completions",
            b'{"model": "B", "prompt": "a", "homer": {"progress": true}}',
            400,
            "stream",
        ),
        ("/v1/completions", b'{"model": "B", "prompt": " "}', 400, "the question is empty"),
        ("/v1/completions", b'{"model": "B", "prompt": "a", "max_tokens": 99999999}', 400, "most"),
        ("/v1/chat/completions", b'{"model": "B", "messages": []}', 400, "messages: "),
        (
            "/v1/chat/completions",
            b'{"model": "B", "messages": [{"role": "tool", "content": "x"}]}',
            400,
            "messages.0.role",
        ),
        ("/v1/nothing", b"{}", 404, "Not Found"),
        ("/health", b"{}", 405, "Method Not Allowed"),
    ],
)
def test_mistakes_are_told_in_openais_shape(
    url: str, path: str, body: bytes, status: int, problem: str
) -> None:
    code, answer = post(url, path, body)
    assert code == status
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert problem in error["message"]


def test_what_is_too_long_is_refused(service: HomerClient) -> None:
    with serving(service.address, limits=HttpLimits(body_bytes=1000)) as small:
        code, answer = post(small, "/v1/completions", json.dumps({"prompt": "x" * 2000}).encode())
        assert code == 413
        assert answer["error"]["code"] == "request_too_large"


def test_a_document_beyond_the_service_is_a_context_length_error(url: str) -> None:
    # More tokens than a service takes by default; a byte each.
    body = json.dumps({"model": MODEL, "prompt": "ab " * 400_000 + "\n\nWho?"}).encode()
    code, answer = post(url, "/v1/completions", body)
    assert (code, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_hanging_up_cancels_the_request(url: str, service: HomerClient) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.completions.create(
            model=MODEL, prompt=LONG_CONTEXT + "Who?", max_tokens=5000, stream=True
        )
        next(iter(stream))
        assert service.server_info().running_requests == 1
        stream.close()
    poll(lambda: service.server_info().running_requests == 0, "the request goes on")


def test_no_service_is_503_with_a_time_to_ask_again() -> None:
    with serving("127.0.0.1:1") as url:
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(f"{url}/health", timeout=60)
        assert health.value.code == 503
        assert int(health.value.headers["Retry-After"]) >= 1
        assert json.load(health.value)["error"]["type"] == "server_error"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url: str) -> None:
    def curl(*arguments: str) -> str:
        done = subprocess.run(
            ["curl", "-sS", "--noproxy", "*", "--fail-with-body", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    body = json.dumps({"model": MODEL, "messages": CHAT, "stream": True, **GREEDY})
    lines = curl("-N", f"{url}/v1/chat/completions", "--json", body).split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
    assert json.loads(events[-2])["homer"]["leaves"] > 1
    assert curl(f"{url}/health") == ""
    assert set(json.loads(curl(f"{url}/version"))) == {"version"}
    counted = {
        (sample.labels["path"], sample.labels["code"]): sample.value
        for family in text_string_to_metric_families(curl(f"{url}/metrics"))
        for sample in family.samples
        if sample.name == "homer_http_requests_total"
    }
    assert counted["/v1/chat/completions", "200"] >= 1
