"""Files of results: what a crash leaves of them is found, whole and once."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.batch.lines import Line, read_lines
from cluster.batch.records import RecordFile, answered, failed
from cluster.http.errors import HttpError
from homer.errors import ConfigError, HomerError

TEXTS = st.text(st.characters(exclude_categories=[]), max_size=20)


def lines_of(contexts: list[str], ids: list[bool]) -> list[Line]:
    """Questions, some with an id and some without."""
    raw = []
    for number, (context, named) in enumerate(zip(contexts, ids, strict=True)):
        custom_id = {"custom_id": f"{number}\u2028é"} if named else {}
        raw.append(json.dumps({"context": context, "question": "Why?", **custom_id}).encode())
    return list(read_lines(raw))


def write(path: Path, lines: list[Line], texts: list[str]) -> None:
    with RecordFile(path) as file:
        for line, text in zip(lines, texts, strict=True):
            if line.key not in file.keys:
                file.append(line.key, answered(line, {"text": text}, "r"))


@given(data=st.data())
def test_any_cut_of_an_output_resumes_to_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    texts = data.draw(st.lists(TEXTS, min_size=1, max_size=6))
    ids = [data.draw(st.booleans()) for _ in texts]
    lines = lines_of([f"{n}" for n in range(len(texts))], ids)
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    write(path, lines, texts)
    whole = path.read_bytes()

    kept = data.draw(st.integers(0, len(whole)))
    nothing = data.draw(st.sampled_from([b"", b"\0" * 7]))
    torn = whole[:kept] + (nothing if whole[:kept].rpartition(b"\n")[2] else b"")
    path.write_bytes(torn)
    with RecordFile(path) as file:
        assert file.keys == {line.key for line in lines[: torn.count(b"\n")]}
    write(path, lines, texts)

    assert path.read_bytes() == whole
    records = [json.loads(raw) for raw in whole.split(b"\n")[:-1]]
    assert [record["text"] for record in records] == texts


@pytest.mark.parametrize(
    "other",
    [
        b"notes",
        b"notes\n",
        b'{"custom_id": "a"}\nnotes',
        b'{"id": 3}\n',
        b'{"custom_id": null}\n',
        b"[]\n",
        b"\xff\xfe",
    ],
)
def test_somebody_elses_file_is_refused_and_left_as_it_is(tmp_path: Path, other: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(other)
    with pytest.raises(ConfigError, match=r"line \d is no result of homer batch"):
        RecordFile(path)
    assert path.read_bytes() == other


def test_two_batches_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path), pytest.raises(ConfigError, match="another homer batch writes"):
        RecordFile(path)
    RecordFile(path).clear()


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        RecordFile(tmp_path / "missing" / "out.jsonl")
    with pytest.raises(ConfigError, match="is no plain file"):
        RecordFile(Path("/dev/full"))


def test_a_disk_that_is_full_says_so_and_leaves_what_was_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, second = lines_of(["a", "b"], [True, False])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordFile(path) as file:
        file.append(first.key, answered(first, {}, "r"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, before[1]))
        try:
            with pytest.raises(HomerError, match=r"cannot write .*out.jsonl: File too large"):
                file.append(second.key, answered(second, {}, "r"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with RecordFile(path) as file:
        assert file.keys == {first.key}


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        '{"\ud800": 1}'.encode("utf-8", "surrogatepass"),
        json.dumps({"custom_id": "\ud800", "\udfff": 1}).encode(),
        b'{"custom_id": "a", "method": "GET"}',
        b'{"method": "GET"}',
    ],
)
def test_a_line_that_failed_is_found_again_whatever_it_was(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "errors.jsonl"
    (line,) = read_lines([raw])
    assert isinstance(line.asks, HttpError)
    with RecordFile(path) as file:
        file.append(line.key, failed(line, line.asks))
    with RecordFile(path) as file:
        assert file.keys == {line.key}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    error = record["response"]["body"]["error"] if line.openai else record["error"]
    assert error["message"] == str(line.asks)
