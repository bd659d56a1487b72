"""`homer chat`, on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.cli.chat import PROMPT
from cluster.client import HomerClient
from homer.v1 import long_context_pb2 as pb
from tests.cluster.conftest import DEADLINE_SECONDS, poll
from tests.cluster.processes import Sandbox, sandbox
from tests.cluster.test_cli import HOMER
from tests.cluster.test_service import CONTEXT, LONG_CONTEXT, QUESTION, assert_nothing_held

MAX_TOKENS = 6
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
# Python misses a Ctrl-C in the moment in which readline begins to wait for a key, until Enter.
INTERRUPT = f"{CTRL_C}\r"


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with sandbox() as made:
        yield made


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.md"
    path.write_text(CONTEXT, encoding="utf-8")
    return path


class Terminal:
    """A command on a terminal of its own: what is typed, and what the screen has shown."""

    def __init__(self, box: Sandbox, *command: str) -> None:
        self._keys, end = pty.openpty()
        # The screen shows what the command writes, not what is typed: readline echoes that itself.
        settings = termios.tcgetattr(end)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(end, termios.TCSANOW, settings)
        self.process = box.start(
            "setsid", "--ctty", "--wait", *command, stdin=end, stdout=end, stderr=end
        )
        os.close(end)
        self._shown = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._keys, 65536):
                self._shown += piece
        except OSError:
            # The other side is closed.
            return

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def wait_for(self, text: str, times: int = 1, seconds: float = DEADLINE_SECONDS) -> None:
        poll(lambda: self.shown.count(text) >= times, f"{times} times {text!r}", seconds)


@contextmanager
def chatting(box: Sandbox, *options: str | int | Path) -> Iterator[Terminal]:
    terminal = Terminal(box, HOMER, "chat", *map(str, options))
    try:
        yield terminal
    finally:
        if terminal.process.poll() is None:
            print(terminal.shown)
            terminal.process.kill()


def test_on_a_terminal_ctrl_c_cancels_the_answer_and_not_the_chat(
    box: Sandbox, service: HomerClient, document: Path
) -> None:
    document.write_text(LONG_CONTEXT, encoding="utf-8")
    with chatting(box, "--server", service.address, "--context", document) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("/help\r")
        terminal.wait_for("cancel the answer that comes now")
        terminal.wait_for(PROMPT, 2)
        terminal.type("/hlep\r")
        terminal.wait_for("there is no /hlep")
        # The question, and then the same again out of the history.
        for times, keys in enumerate((f"{QUESTION}\r", f"{UP}\r"), start=1):
            terminal.wait_for(PROMPT, 2 + times)
            terminal.type(keys)
            poll(lambda: service.server_info().running_requests > 0, "no request starts")
            terminal.type(CTRL_C)
            terminal.wait_for("homer: cancelled", times)
            assert_nothing_held(service)
        terminal.wait_for(PROMPT, 5)
        terminal.type(CTRL_D)
        assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.shown


def test_a_chat_with_a_pool_of_its_own_goes_on_after_ctrl_c_and_leaves_nothing_behind(
    box: Sandbox, text_model: Path, document: Path
) -> None:
    # Long enough to be cancelled in time, short enough to be asked about again.
    document.write_text(CONTEXT * 10, encoding="utf-8")
    options: list[str | Path] = [
        "--model",
        text_model,
        "--cpu",
        "--workers",
        "1",
        "--context",
        document,
    ]
    with chatting(box, *options, "--max-tokens", MAX_TOKENS) as terminal:
        terminal.wait_for(PROMPT, seconds=180)
        terminal.type(f"{QUESTION}\r")
        terminal.wait_for("prompt tokens: ")
        # A terminal tells every process of the command, Ray's and the worker's too.
        terminal.type(CTRL_C)
        terminal.wait_for("homer: cancelled")
        terminal.wait_for(PROMPT, 2)
        terminal.type(f"{QUESTION}\r")
        terminal.wait_for(PROMPT, 3)
        assert terminal.shown.count("prompt tokens: ") == 2
        assert terminal.shown.count("homer: ") == 1
        terminal.type(INTERRUPT)
        assert terminal.process.wait(60) == 130
    assert "Traceback" not in terminal.shown
    box.assert_empty()


def test_in_a_pipe_each_line_is_a_question(
    box: Sandbox, service: HomerClient, document: Path
) -> None:
    questions = ["Who did it?", "And where?"]
    expected = []
    for question in questions:
        *_, summary = service.generate(
            context=CONTEXT, question=question, sampling={"max_tokens": MAX_TOKENS}
        )
        assert isinstance(summary, pb.Summary)
        expected.append(list(summary.token_ids))
    command = [HOMER, "chat", "--server", service.address, "--context", str(document), "--json"]
    started = box.start(*command, "--max-tokens", str(MAX_TOKENS), stdin=subprocess.PIPE)
    lines = [questions[0], "", "/help", questions[1], "/quit", "never asked"]
    output, errors = started.communicate("\n".join(lines))
    assert started.returncode == 0, errors
    assert [json.loads(line)["token_ids"] for line in output.splitlines()] == expected
    assert "cancel the answer" in errors


def test_a_question_that_fails_does_not_end_a_chat_but_is_told_at_its_end(
    box: Sandbox, service: HomerClient, document: Path
) -> None:
    command = [HOMER, "chat", "--server", service.address, "--context", str(document), "--json"]
    started = box.start(*command, "--max-tokens", "2", stdin=subprocess.PIPE)
    # Longer than a chunk, which is no question that can be asked.
    output, errors = started.communicate(f"{'x' * 200}\n{QUESTION}\n")
    assert started.returncode == 2, errors
    assert errors.startswith("homer: ")
    assert "Traceback" not in errors
    assert len(output.splitlines()) == 1


def test_sigterm_ends_a_chat(box: Sandbox, service: HomerClient, document: Path) -> None:
    command = [HOMER, "chat", "--server", service.address, "--context", str(document)]
    started = box.start(*command, "--max-tokens", "2", stdin=subprocess.PIPE)
    assert started.stdin is not None
    assert started.stderr is not None
    started.stdin.write(f"{QUESTION}\n")
    started.stdin.flush()
    assert any("tokens in" in line for line in started.stderr)
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 130
