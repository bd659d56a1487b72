"""`homer batch`, started as a user starts it, on a running service."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from cluster.client import HomerClient
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import poll
from tests.cluster.processes import BIN, REPOSITORY, Sandbox, sandbox
from tests.cluster.test_service import CONTEXT, QUESTION, assert_nothing_held

HOMER = str(BIN / "homer")
PAGE = REPOSITORY / "docs" / "batch.md"
SAMPLING: dict[str, Any] = {"max_tokens": 12}


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with sandbox() as made:
        yield made


def batch(folder: Path, server: str, *more: str) -> list[str]:
    files = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    return [HOMER, "batch", *files, "--server", server, *more]


def write(folder: Path, *lines: Any) -> None:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    (folder / "in.jsonl").write_text(text, encoding="utf-8")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in path.read_bytes().split(b"\n") if raw]


def over_grpc(service: HomerClient, **request: Any) -> pb.Summary:
    *_, summary = service.generate(sampling=SAMPLING, **request)
    assert isinstance(summary, pb.Summary)
    return summary


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server with the folder `web`."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_kind_of_line_is_answered_as_the_service_answers_it(
    box: Sandbox, service: HomerClient, tmp_path: Path, web: str
) -> None:
    (tmp_path / "near.txt").write_text(CONTEXT, encoding="utf-8")
    page = f"<html><body><p>{CONTEXT}</p><script>no()</script></body></html>"
    (tmp_path / "web" / "far.html").write_text(page, encoding="utf-8")
    own = {"prefix": "Read: ", "question": QUESTION, **SAMPLING}
    envelope = {"method": "POST", "url": "/v1/completions"}
    greedy = {"model": "B", "temperature": 0, **SAMPLING}
    marked = {"prompt": CONTEXT, "homer": {"prefix": "Read: ", "question": QUESTION}}
    chat = [{"role": "user", "content": CONTEXT + "Who?"}]
    write(
        tmp_path,
        {"context": CONTEXT, **own},
        {"custom_id": "near", "context_path": "near.txt", **own},
        {"custom_id": "far", "context_path": f"{web}/far.html", **own},
        {"custom_id": "gone", "context_path": f"{web}/gone.txt", **own},
        {"custom_id": "completion", **envelope, "body": {**greedy, **marked}},
        {
            "custom_id": "chat",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**greedy, "messages": chat},
        },
        {"custom_id": "model", **envelope, "body": {**greedy, **marked, "model": "C"}},
        "{",
    )
    done = box.run(*batch(tmp_path, service.address, "--json"))
    assert done.returncode == 4, done.stderr
    told = json.loads(done.stdout)
    assert (told["lines"], told["answered"], told["failed"]) == (8, 5, 3)
    assert re.search(r"8 of 8 lines, 3 failed, [\d.]+ lines/min", done.stderr)
    assert "5 of 8 lines are answered" in done.stderr
    assert "line 8: the line is not JSON" in done.stderr
    assert "Traceback" not in done.stderr

    answers = {record["custom_id"]: record for record in records(tmp_path / "out.jsonl")}
    expected = over_grpc(service, prefix="Read: ", context=CONTEXT, question=QUESTION)
    for name in (None, "near"):
        assert answers[name]["text"] == expected.text
        assert answers[name]["token_ids"] == list(expected.token_ids)
        assert answers[name]["prompt_tokens"] == expected.prompt_tokens
    assert answers[None]["line"] == 1
    # A browser shows no line break or space at the end of a paragraph.
    shown = over_grpc(service, prefix="Read: ", context=CONTEXT.strip(), question=QUESTION)
    assert answers["far"]["prompt_tokens"] - shown.prompt_tokens in (0, 1)
    for name, kind in (("completion", Completion), ("chat", ChatCompletion)):
        response = answers[name]["response"]
        assert (response["status_code"], answers[name]["error"]) == (200, None)
        kind.model_validate(response["body"])
        assert response["body"]["usage"]["completion_tokens"] == 12
    (choice,) = answers["completion"]["response"]["body"]["choices"]
    assert choice["text"] == expected.text

    failures = {record["custom_id"]: record for record in records(Path(told["errors"]))}
    assert f"{web}/gone.txt" in failures["gone"]["error"]["message"]
    assert failures["model"]["response"]["status_code"] == 404
    assert failures["model"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert failures[None]["line"] == 8


def test_a_batch_that_was_killed_goes_on_and_answers_each_line_once(
    box: Sandbox, service: HomerClient, tmp_path: Path
) -> None:
    count = 18
    out = tmp_path / "out.jsonl"
    line = {"context": CONTEXT * 2, "max_tokens": 24}
    ids: list[dict[str, Any]] = [{"custom_id": f"n{n}"} if n % 2 else {} for n in range(count)]
    write(tmp_path, *[{**line, "question": f" {n}?", **ids[n]} for n in range(count)])
    command = batch(tmp_path, service.address, "--concurrency", "3")
    killed = box.start(*command)
    poll(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3, "no answers come")
    killed.kill()
    killed.wait()
    before = out.read_bytes().count(b"\n")
    assert before < count
    # As if the machine had gone down in the middle of a line.
    with out.open("ab") as file:
        file.write(b'{"custom_id": "n1", "line":')

    terminal, end = pty.openpty()
    stopped = box.start(*command, stderr=end)
    os.close(end)
    poll(lambda: out.read_bytes().count(b"\n") >= before + 3, "no further answers come")
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(60) == 130
    drawn = b""
    try:
        while piece := os.read(terminal, 65536):
            drawn += piece
    except OSError:
        # The end of a terminal whose other side is closed.
        pass
    os.close(terminal)
    said = " ".join(drawn.decode().split())
    assert f"{before} of {count} lines are answered already" in said
    assert "━" in said
    assert "The same command goes on from there" in said
    assert_nothing_held(service)

    done = box.run(*command)
    assert done.returncode == 0, done.stderr
    answers = records(out)
    assert sorted(record["line"] for record in answers) == list(range(1, count + 1))
    assert {r["line"]: r["custom_id"] for r in answers} == {
        n + 1: ids[n].get("custom_id") for n in range(count)
    }
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_the_example_of_the_documents_is_answered(
    box: Sandbox, service: HomerClient, tmp_path: Path
) -> None:
    example = PAGE.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    (tmp_path / "in.jsonl").write_text(example, encoding="utf-8")
    (tmp_path / "minutes.txt").write_text("Dredging was moved to May.", encoding="utf-8")
    done = box.run(*batch(tmp_path, service.address, "--served-model-name", "model"))
    assert done.returncode == 0, done.stderr
    assert {r["custom_id"] for r in records(tmp_path / "out.jsonl")} == {"key", "moved", "chat"}


def test_a_service_that_is_not_there_is_one_line_and_code_3(box: Sandbox, tmp_path: Path) -> None:
    write(tmp_path, {"context": "A text.", "question": "Why?"})
    done = subprocess.run(
        batch(tmp_path, "127.0.0.1:9"), env=box.env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 3
    assert "no Homer service answers at 127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == b""
