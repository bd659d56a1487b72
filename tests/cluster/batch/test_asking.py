"""How lines are asked: as many at once as a service takes, and again when it is away."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster import retry
from cluster.batch.gate import Gate
from cluster.batch.lines import Line
from cluster.batch.options import BatchOptions
from cluster.batch.run import Batch, Counts
from cluster.client import AsyncHomerClient
from cluster.errors import ServiceError
from cluster.http.errors import HttpError
from homer.errors import ConfigError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import long_context_pb2_grpc
from tests.cluster.conftest import Run

LINES = 12


class Small(long_context_pb2_grpc.LongContextServicer):
    """Answers `room` requests at once, and each question in capitals.

    Those whose question begins with the name of a status fail with it.
    """

    def __init__(self, room: int = 100, ready: bool = True) -> None:
        self.asked: list[str] = []
        self.priorities: set[int] = set()
        self.most = 0
        self._room = room
        self._ready = ready
        self._running = 0
        self._lock = threading.Lock()

    def GetServerInfo(  # noqa: N802 - gRPC's name
        self, request: pb.GetServerInfoRequest, context: Any
    ) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(workers=[pb.ServerWorker(name="w", ready=self._ready)])

    def Generate(  # noqa: N802 - gRPC's name
        self, request: pb.GenerateRequest, context: Any
    ) -> Iterator[pb.GenerateResponse]:
        question = request.text.suffix
        status = question.split()[0]
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
            self.asked.append(question)
            self.priorities.add(request.priority)
            full = self._running > self._room
        try:
            if full:
                context.set_trailing_metadata(((retry.RETRY_AFTER, "0.05"),))
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "others wait already")
            if status in grpc.StatusCode.__members__:
                context.abort(grpc.StatusCode[status], "so it is")
            # Long enough for others to come meanwhile.
            time.sleep(0.02)
            yield pb.GenerateResponse(summary=pb.Summary(text=question.upper()))
        finally:
            with self._lock:
                self._running -= 1


@contextmanager
def served(servicer: Small) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(16))
    long_context_pb2_grpc.add_LongContextServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


class Told:
    """What a batch tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.problems: list[str] = []

    def began(self, counts: Counts) -> None:
        pass

    def went_on(self, counts: Counts) -> None:
        pass

    def problem(self, line: Line, error: HttpError) -> None:
        self.problems.append(f"{line.number}: {error}")

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.01)


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def questions(*texts: str) -> list[dict[str, Any]]:
    return [{"custom_id": text, "context": "A text.", "question": text} for text in texts]


def options(source: Path, **given: Any) -> BatchOptions:
    output = source.parent / "out.jsonl"
    return BatchOptions(
        input=str(source), output=output, errors=source.parent / "errors.jsonl", **given
    )


def texts(path: Path) -> dict[str, str]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({record["custom_id"] for record in records}) == len(records)
    return {record["custom_id"]: record["text"] for record in records}


def do(run: Run[Any], service: Small, asked: BatchOptions) -> tuple[Counts, Told]:
    told = Told()

    async def ask_all() -> Counts:
        async with AsyncHomerClient(address) as client:
            with Batch(asked, told) as batch:
                await batch.run(client)
                return batch.counts

    with served(service) as address:
        return run(ask_all()), told


def test_a_service_that_is_full_is_asked_less_until_all_is_answered(
    run: Run[Any], tmp_path: Path
) -> None:
    service = Small(room=2)
    names = [f"q{n}" for n in range(LINES)]
    asked = options(write(tmp_path, *questions(*names)), concurrency=6)
    counts, told = do(run, service, asked)
    assert (counts.answered, counts.failed) == (LINES, 0)
    assert texts(asked.output) == {name: name.upper() for name in names}
    assert service.most > 2
    assert "the service has no room; 3 line(s) at a time" in told.notes[0]
    # Some were refused, and few: not six again and again.
    assert LINES < len(service.asked) < 4 * LINES
    assert not asked.errors.exists()


def test_no_more_lines_are_asked_at_once_than_wanted(run: Run[Any], tmp_path: Path) -> None:
    service = Small()
    asked = options(write(tmp_path, *questions("a", "b", "c", "d", "e")), concurrency=2)
    do(run, service, asked)
    assert service.most <= 2


def test_lines_that_fail_are_told_apart_and_asked_again_by_the_next_run(
    run: Run[Any], tmp_path: Path
) -> None:
    names = ["fine", "INVALID_ARGUMENT", "INTERNAL 2", "RESOURCE_EXHAUSTED 3", "UNAVAILABLE 4"]
    lost = {"custom_id": "lost", "context_path": "missing.txt", "question": "Why?"}
    twice = {"custom_id": "fine", "context": "Another.", "question": "How?"}
    own = {"context": "A text.", "question": "named by none", "priority": 3}
    source = write(tmp_path, *questions(*names), lost, twice, {"question": "no text"}, own)
    asked = options(source, retries=2)
    service = Small()
    counts, told = do(run, service, asked)
    assert (counts.lines, counts.answered, counts.failed) == (9, 2, 7)
    failures = [json.loads(line) for line in asked.errors.read_text().splitlines()]
    assert {failure["line"]: failure["error"]["code"] for failure in failures} == {
        2: "invalid_argument",
        3: "internal",
        4: "resource_exhausted",
        5: "unavailable",
        6: None,
        7: None,
        8: "invalid_value",
    }
    assert any("missing.txt: No such file" in problem for problem in told.problems)
    assert any("7: custom_id 'fine' is that of a line above" in p for p in told.problems)
    # Workers that are lost under a line are others the next time; what is wrong stays so.
    assert service.asked.count("UNAVAILABLE 4") == 3
    assert service.asked.count("INTERNAL 2") == 1
    assert service.priorities == {-1, 3}

    (tmp_path / "missing.txt").write_text("Found.", encoding="utf-8")
    again = Small()
    counts, _ = do(run, again, asked)
    assert (counts.before, counts.answered, counts.failed) == (2, 1, 6)
    assert "fine" not in again.asked
    assert len(asked.output.read_text().splitlines()) == 3
    assert len(asked.errors.read_text().splitlines()) == 6


@pytest.mark.parametrize("status", ["UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"])
def test_a_service_that_is_gone_or_closed_ends_the_batch_and_fails_no_line(
    run: Run[Any], tmp_path: Path, status: str
) -> None:
    asked = options(write(tmp_path, *questions(f"{status} 1", f"{status} 2")), retries=1)
    with pytest.raises(ServiceError) as caught:
        do(run, Small(ready=False), asked)
    assert caught.value.code == status
    assert not asked.errors.exists()
    assert asked.output.read_bytes() == b""


def test_results_of_lines_that_are_gone_stay_and_are_told(run: Run[Any], tmp_path: Path) -> None:
    asked = options(write(tmp_path, *questions("a", "b")))
    do(run, Small(), asked)
    write(tmp_path, *questions("b", "c"))
    service = Small()
    _, told = do(run, service, asked)
    assert service.asked == ["c"]
    assert "1 result(s) of lines that are not in" in told.notes[0]
    assert texts(asked.output) == {"a": "A", "b": "B", "c": "C"}


def test_a_document_that_lines_share_is_read_once(
    run: Run[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MemoryFileSystem().pipe("/shared.txt", b"A long text.")
    read, opened = MemoryFileSystem._open, []

    def counted(self: MemoryFileSystem, path: str, *args: Any, **settings: Any) -> Any:
        opened.append(path)
        return read(self, path, *args, **settings)

    monkeypatch.setattr(MemoryFileSystem, "_open", counted)
    line = {"context_path": "memory://shared.txt", "question": "Why?"}
    source = write(tmp_path, *[{**line, "custom_id": str(n)} for n in range(4)])
    counts, _ = do(run, Small(), options(source, concurrency=2))
    assert counts.answered == 4
    assert opened == ["/shared.txt"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"input": "missing.jsonl"}, "cannot read .*missing.jsonl: No such file"),
        ({"input": "s9://bucket/in.jsonl"}, "cannot read s9://.*Protocol not known"),
        ({"output": "in.jsonl"}, "are not three files"),
        ({"errors": "out.jsonl"}, "are not three files"),
        ({"output": "other/out.jsonl"}, "cannot write .*out.jsonl: No such file"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_anything_is_asked(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    write(tmp_path, *questions("a"))
    names = {"input": "in.jsonl", "output": "out.jsonl", "errors": "errors.jsonl", **files}
    paths: dict[str, Any] = {key: tmp_path / name for key, name in names.items()}
    paths["input"] = names["input"] if "://" in names["input"] else str(paths["input"])
    with pytest.raises(ConfigError, match=said):
        Batch(BatchOptions(**paths), Told())


def test_an_input_without_lines_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no lines"):
        Batch(options(write(tmp_path)), Told())


def test_a_gate_grows_by_one_for_each_round_of_answers() -> None:
    async def scenario() -> list[float]:
        gate = Gate(8)
        assert gate.refused(0.0)
        limits = [gate.limit]
        for _ in range(5):
            async with gate:
                gate.answered()
            limits.append(gate.limit)
        for _ in range(100):
            gate.answered()
        return [*limits, gate.limit]

    half, *grown, end = asyncio.run(scenario())
    assert half == 4
    assert 4.9 < grown[3] <= 5 < grown[4]
    assert end == 8


def test_refusals_of_one_moment_count_once() -> None:
    async def scenario() -> tuple[list[bool], float]:
        gate = Gate(8)
        news = [gate.refused(30.0) for _ in range(4)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await gate.__aenter__()
        return news, gate.limit

    assert asyncio.run(scenario()) == ([True, False, False, False], 4)
