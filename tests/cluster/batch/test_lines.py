"""What a line of a batch may be, and what is said of one that is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.batch.lines import Line, Question, read_lines
from cluster.http.bodies import ChatBody, CompletionBody
from cluster.http.errors import HttpError

OWN = {"context": "A long text.", "question": "Why?"}
CHAT = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "messages": [{"role": "user", "content": "Why?"}]},
}


def read(*lines: Any) -> list[Line]:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(read_lines(line + b"\n" for line in raw))


def problem(line: Any) -> str:
    (read_line,) = read(line)
    assert isinstance(read_line.asks, HttpError)
    assert read_line.asks.status == 400
    return str(read_line.asks)


def test_a_line_of_homers_own_is_a_question_with_what_the_client_takes() -> None:
    settings = {"max_tokens": 8, "temperature": 0.5, "seed": 3, "stop": ["\n"]}
    (line,) = read({**OWN, **settings, "compression": {"score": "max_logit"}, "priority": 2})
    assert isinstance(line.asks, Question)
    assert line.asks.sampling == settings
    assert (line.openai, line.custom_id) == (False, None)


def test_lines_of_openais_become_the_bodies_of_the_http_door() -> None:
    completion = {"model": "m", "prompt": "A text. Why?"}
    chat, other = read(
        CHAT, {**CHAT, "custom_id": "b", "url": "/v1/completions", "body": completion}
    )
    assert isinstance(chat.asks, ChatBody)
    assert isinstance(other.asks, CompletionBody)
    assert chat.openai
    assert (chat.key, other.key) == ("a", "b")


def test_a_line_without_an_id_is_known_by_its_number_and_what_it_says() -> None:
    first, second, third = read(OWN, OWN, {**OWN, "question": "How?"})
    assert first.key == (1, first.digest)
    assert len({line.key for line in (first, second, third)}) == 3
    assert first.digest == second.digest != third.digest
    assert read(b"", OWN)[0].key == (2, first.digest)


def test_what_editors_leave_in_a_file_is_no_mistake() -> None:
    own = json.dumps(OWN).encode()
    lines = read(b"\xef\xbb\xbf" + own + b"\r", b"", b"   ", own)
    assert [line.number for line in lines] == [1, 4]
    assert all(isinstance(line.asks, Question) for line in lines)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "the line is not JSON"),
        (b"\xff", "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        ([1], "no JSON object"),
        ({"question": "Why?"}, "context or as context_path, one of them"),
        ({**OWN, "context_path": "a.txt"}, "context or as context_path, one of them"),
        ({"context": "A text."}, "question: Field required"),
        ({**OWN, "question": ""}, "question: "),
        ({**OWN, "question": "\ud800"}, "question: "),
        ({**OWN, "max_token": 3}, "unknown argument 'max_token'"),
        ({**OWN, "max_tokens": 0}, "max_tokens: "),
        ({**OWN, "max_tokens": 1 << 40}, "max_tokens: "),
        ({**OWN, "temperature": -1}, "temperature: "),
        ({**OWN, "priority": 9}, "priority: "),
        ({**OWN, "custom_id": 7}, "custom_id: "),
        ({**CHAT, "url": "/v1/embeddings"}, "url: "),
        ({**CHAT, "method": "GET"}, "method: "),
        ({"method": "POST", "url": CHAT["url"], "body": CHAT["body"]}, "custom_id: "),
        ({**CHAT, "body": {"model": "m"}}, "messages: Field required"),
        ({**CHAT, "body": {**CHAT["body"], "n": 0}}, "n: "),  # type: ignore[dict-item]
        ({**CHAT, "body": {**CHAT["body"], "stream": True}}, "leave stream out"),  # type: ignore[dict-item]
    ],
)
def test_a_line_that_is_wrong_says_what_is(line: Any, said: str) -> None:
    assert said in problem(line)
