"""The `homer` command, started as a user starts it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.client import HomerClient
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import poll
from tests.cluster.processes import BIN, Sandbox, sandbox
from tests.cluster.test_service import CONTEXT, LONG_CONTEXT, QUESTION, assert_nothing_held
from tests.golden_cases import model_dir
from tests.project.command_line import Homer, homer

__all__ = ["homer"]

HOMER = str(BIN / "homer")
NEW_TOKENS = 12


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with sandbox() as made:
        yield made


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "document.txt"
    path.write_text(CONTEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def long_document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "long.txt"
    path.write_text(LONG_CONTEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(service: HomerClient) -> pb.Summary:
    """What the service answers to the question that every test here asks."""
    *_, summary = service.generate(
        context=CONTEXT,
        question=QUESTION,
        prefix="Read: ",
        sampling={"max_tokens": NEW_TOKENS},
        return_kept_indices=True,
    )
    assert isinstance(summary, pb.Summary)
    return summary


def ask(document: Path | str) -> list[str]:
    """The options of the question that every test here asks."""
    return [
        "--context",
        str(document),
        "--prefix",
        "Read: ",
        "--question",
        QUESTION,
        "--max-tokens",
        str(NEW_TOKENS),
    ]


def as_read(text: str) -> str:
    """A printed text as a pipe in text mode gives it: a model of random weights writes any sign."""
    return f"{text}\n".replace("\r\n", "\n").replace("\r", "\n")


def local_cluster(model: Path | str, workers: int = 2) -> list[str]:
    return ["--model", str(model), "--cpu", "--workers", str(workers)]


def assert_same_answer(output: str, expected: pb.Summary) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(output)
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["kept_context_indices"] == list(expected.kept_context_indices)
    assert answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] == expected.prompt_tokens
    assert set(answer["nodes_by_worker"]) == {"worker-0", "worker-1"}
    return answer


def test_generate_on_a_cluster_of_its_own(
    box: Sandbox, text_model: Path, document: Path, expected: pb.Summary
) -> None:
    done = box.run(HOMER, "generate", *local_cluster(text_model), *ask(document), "--json")
    assert done.returncode == 0, done.stderr
    assert_same_answer(done.stdout, expected)
    box.assert_empty()


def test_generate_on_a_service_prints_answer_and_progress_apart(
    box: Sandbox, service: HomerClient, document: Path, expected: pb.Summary
) -> None:
    done = box.run(HOMER, "generate", "--server", service.address, *ask(document))
    assert done.returncode == 0, done.stderr
    assert done.stdout == as_read(expected.text)
    assert "prompt tokens: " in done.stderr
    assert re.search(r"leaves (\d+)/\1, merges (\d+)/\2", done.stderr)
    assert "tokens in" in done.stderr


def test_progress_is_drawn_on_a_terminal(
    box: Sandbox, service: HomerClient, document: Path, expected: pb.Summary
) -> None:
    terminal, end = pty.openpty()
    started = box.start(HOMER, "generate", "--server", service.address, *ask(document), stderr=end)
    os.close(end)
    assert started.stdout is not None
    assert started.stdout.read() == as_read(expected.text)
    assert started.wait() == 0
    drawn = b""
    try:
        while piece := os.read(terminal, 65536):
            drawn += piece
    except OSError:
        # The end of a terminal whose other side is closed.
        pass
    os.close(terminal)
    assert "leaves" in drawn.decode()
    assert "━" in drawn.decode()


def test_the_document_can_come_from_stdin(
    box: Sandbox, service: HomerClient, expected: pb.Summary
) -> None:
    started = box.start(
        HOMER, "generate", "--server", service.address, *ask("-"), "--json", stdin=subprocess.PIPE
    )
    output, errors = started.communicate(CONTEXT)
    assert started.returncode == 0, errors
    assert errors == ""
    assert_same_answer(output, expected)


def test_several_answers_come_one_after_the_other_with_headings_and_log_probabilities(
    homer: Homer, service: HomerClient, document: Path
) -> None:
    sampling: dict[str, Any] = {"max_tokens": 3, "temperature": 1.5, "seed": 7, "n": 2}
    *events, summary = service.generate(
        context=CONTEXT, question=QUESTION, sampling={**sampling, "logprobs": 2}
    )
    assert isinstance(summary, pb.Summary)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    command = [
        "generate", "--server", service.address, "--context", document, "--question", QUESTION,
        *options, "--logprobs=2",
    ]  # fmt: skip
    told = homer(*command)
    assert told.code == 0, told.stderr
    first, second = (one.text for one in summary.answers)
    beginning, middle, rest = re.split(r"--- answer \d of 2 ---\n", told.stdout)
    assert beginning == ""
    for printed, text in ((middle, first), (rest, second)):
        assert printed.startswith(f"{text}\n\nlog-probability, token, and the likeliest there:\n")
        assert re.findall(r"^ +-\d\.\d{4}  \".*\"", printed, flags=re.MULTILINE)
    as_json = homer(*command, "--json")
    assert (as_json.code, as_json.stderr) == (0, "")
    fields = json.loads(as_json.stdout)
    assert [one["text"] for one in fields["answers"]] == [first, second]
    assert fields["logprobs"] == fields["answers"][0]["logprobs"]
    for number, one in enumerate(fields["answers"]):
        tokens = [event for event in events if isinstance(event, pb.Token)]
        own = [token for token in tokens if token.answer == number]
        assert [given["token_id"] for given in one["logprobs"]] == one["token_ids"]
        assert [given["text"] for given in one["logprobs"]] == [t.logprob.text for t in own]
        for given, token in zip(one["logprobs"], own, strict=True):
            assert given["logprob"] == pytest.approx(token.logprob.logprob, abs=1e-4)
            likeliest = [top["token_id"] for top in given["top_logprobs"]]
            assert likeliest == [top.token_id for top in token.top_logprobs]
    refused = homer(*command[:-1], "--logprobs=99")
    assert (refused.code, refused.stdout) == (2, "")
    assert "logprobs must be from 0 to 20" in refused.stderr


MISTAKES: list[tuple[list[str], int, str]] = [
    (["--server", "127.0.0.1:9", *ask("/no/such/file")], 2, "cannot read the document"),
    (["--server", "127.0.0.1:9", *ask(os.devnull)], 2, "is empty"),
    (["--server", "127.0.0.1:9", *ask(sys.executable)], 2, "is not UTF-8 text"),
    (["--server", "127.0.0.1:9", *ask(__file__)], 3, "no Homer service answers at 127.0.0.1:9"),
    (ask(__file__), 2, "give either --model or --server"),
    (["--model", "x", "--server", "y", *ask(__file__)], 2, "give either --model or --server"),
]


@pytest.mark.parametrize(("options", "code", "message"), MISTAKES)
def test_mistakes_are_told_in_one_line(
    box: Sandbox, options: list[str], code: int, message: str
) -> None:
    done = box.run(HOMER, "generate", *options)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_failure_on_a_cluster_of_its_own(box: Sandbox, document: Path) -> None:
    done = box.run(HOMER, "generate", *local_cluster(model_dir("A"), 1), *ask(document))
    assert done.returncode == 2, done.stderr
    assert "has no tokenizer: send token ids" in done.stderr
    assert "Traceback" not in done.stderr
    box.assert_empty()


def test_ctrl_c_cancels_on_a_service(
    box: Sandbox, service: HomerClient, long_document: Path
) -> None:
    started = box.start(
        HOMER, "generate", "--server", service.address, *ask(long_document), stdout=subprocess.PIPE
    )
    poll(lambda: service.server_info().running_requests > 0, "the request does not start")
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130
    assert_nothing_held(service)


def test_serve_answers_until_it_is_told_to_end(
    box: Sandbox, text_model: Path, expected: pb.Summary
) -> None:
    started = box.start(
        HOMER, "serve", *local_cluster(text_model), "--port", "0", stderr=subprocess.DEVNULL
    )
    assert started.stdout is not None
    ready = next(line for line in started.stdout if line.startswith("homer serves"))
    found = re.search(r" at (\S+) with 2 worker\(s\)", ready)
    assert found
    with HomerClient(found[1]) as client:
        # A cluster on this machine alone is reached from this machine alone.
        addresses = [worker.address for worker in client.server_info().workers]
        assert {address.split(":")[0] for address in addresses} == {"127.0.0.1"}
        *_, summary = client.generate(
            context=CONTEXT, question=QUESTION, prefix="Read: ", sampling={"max_tokens": NEW_TOKENS}
        )
    assert isinstance(summary, pb.Summary)
    assert list(summary.token_ids) == list(expected.token_ids)
    # Like Ctrl-C, but also what service managers send.
    started.terminate()
    assert started.wait(60) == 0
    box.assert_empty()


def test_ctrl_c_ends_a_cluster_of_its_own(
    box: Sandbox, text_model: Path, long_document: Path
) -> None:
    started = box.start(HOMER, "generate", *local_cluster(text_model, 1), *ask(long_document))
    assert started.stderr is not None
    assert any("leaves" in line for line in started.stderr)
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == 130
    box.assert_empty()


def test_the_demo_shows_what_survived_and_leaves_nothing_behind(box: Sandbox) -> None:
    done = box.run(sys.executable, "-m", "cluster.demo", "--context-tokens", "6000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"A document of (5,9|6,0)\d\d tokens", done.stdout)
    assert re.search(r"\d+ context tokens survived, in \d+ passages", done.stdout)
    assert "Right." in done.stdout
    assert "worker-0 ran" in done.stdout
    assert "worker-1 ran" in done.stdout
    box.assert_empty()
