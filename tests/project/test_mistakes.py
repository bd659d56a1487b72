"""A user's mistake is one line on stderr that says what to change, whatever the command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.golden_cases import model_dir
from tests.project.command_line import Homer, homer

__all__ = ["homer"]

NOWHERE = "127.0.0.1:9"
ASK = ["--context", "words.txt", "--question", "?"]


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """What the commands below are pointed at; they run in this folder."""
    (tmp_path / "words.txt").write_text("Words.", encoding="utf-8")
    (tmp_path / "noise.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "empty.html").write_text("<html></html>", encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text('{"body": 1}\n', encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "no-config").mkdir()
    (tmp_path / "costs.json").write_text("[]", encoding="utf-8")
    (tmp_path / "model").symlink_to(model_dir("A"))


MISTAKES = [
    ("serve", 2, "Missing option '--model'"),
    ("serve --model m --port many", 2, "'--port': Input should be a valid integer"),
    ("serve --model m --workers 0", 2, "'--workers'"),
    ("serve --model m --labels x", 2, "is not JSON"),
    ("serve --model m --resources [1]", 2, "is not a JSON object"),
    ("serve --model m --attention flash", 2, "use auto, sdpa"),
    ("serve --model m --hub-token-file nowhere.txt", 2, "cannot read the token file nowhere.txt"),
    ("serve --model m --tokens-file nowhere.txt", 2, "nowhere.txt"),
    ("serve --model m --host 0.0.0.0", 2, "token"),
    ("status --server S --token-file nowhere.txt", 2, "nowhere.txt"),
    ("serve --model m --engine fast", 2, "fast"),
    ("serve --model m --placement anywhere", 2, "anywhere"),
    ("serve --model m --memory-budget lots", 2, "lots"),
    ("serve --model m --log-format xml", 2, "xml"),
    ("serve --model m --address S", 3, "no Ray cluster answers at S"),
    ("serve --model m --score best", 2, "'--score'"),
    ("generate --question ?", 2, "Missing option '--context'"),
    ("generate --context words.txt --question ?", 2, "give either --model or --server"),
    ("generate --server S --context nowhere.txt --question ?", 2, "No such file or directory"),
    ("generate --server S --context broken --question ?", 2, "Is a directory"),
    ("generate --server S --context noise.txt --question ?", 2, "is not UTF-8 text"),
    ("generate --server S --context empty.html --question ?", 2, "empty.html is empty"),
    ("generate --server S --context words.txt --question ? --top-p 2", 2, "'--top-p'"),
    ("generate --server S --context words.txt --question ?", 3, "no Homer service answers at S"),
    ("batch --server S --input lines.jsonl", 2, "Missing option '--output'"),
    ("batch --server S --input nowhere.jsonl --output out.jsonl", 2, "nowhere.jsonl"),
    ("batch --input lines.jsonl --output out.jsonl", 2, "give either --model or --server"),
    ("chat --server S --context -", 2, "give --context FILE"),
    ("chat --server S --context nowhere.txt", 2, "cannot read the document nowhere.txt"),
    ("chat --context words.txt", 2, "give either --model or --server"),
    ("status --server S", 3, "no Homer service answers at S"),
    ("status --interval 0", 2, "'--interval'"),
    ("trace", 2, "Missing argument"),
    ("trace r --server S", 3, "no Homer service answers at S"),
    ("plan", 2, "Missing option '--context-tokens'"),
    ("plan --context-tokens 0", 2, "the context is empty"),
    ("plan --context-tokens 90 --model nowhere", 2, "'nowhere' is no folder"),
    ("plan --context-tokens 90 --model no-config", 2, "has no config.json"),
    ("plan --context-tokens 90 --model broken", 2, "is not valid JSON"),
    ("calibrate --model model", 2, "Missing option '--text'"),
    ("calibrate --model model --text nowhere.txt", 2, "no such file: nowhere.txt"),
    ("calibrate --model nowhere --text words.txt", 2, "'nowhere' is no folder"),
    ("calibrate --model model --text words.txt --out nowhere/b", 2, "no folder nowhere; make it"),
    ("calibrate --model model --text words.txt --plot b.docx", 2, "end its name in one of"),
    ("calibrate --model model --text lines.jsonl", 2, "name the one with the text by --field"),
    ("calibrate --model model --text words.txt", 2, "has no tokenizer"),
    ("doctor --port many", 2, "'--port'"),
    ("bench wire --workers x", 2, "is no list of numbers"),
    ("bench speed --lengths x", 2, "x"),
    ("bench memory --methods slow --lengths 600", 2, "slow"),
    ("bench passkey --methods luck --samples 1", 2, "luck"),
    ("bench passkey --model nowhere", 2, "'nowhere' is no folder"),
    ("bench simulate --failures x", 2, "is no list of numbers"),
    ("bench simulate --costs nowhere.json", 2, "nowhere.json"),
    ("bench simulate --costs costs.json", 2, "costs.json"),
    ("bench nothing", 2, "No such command 'nothing'"),
    ("frobnicate", 2, "No such command 'frobnicate'"),
    ("--config nowhere.toml plan", 2, "cannot read the configuration file nowhere.toml"),
    ("--config noise.txt plan", 2, "cannot read the configuration file noise.txt"),
]


@pytest.mark.parametrize(("line", "code", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line(homer: Homer, line: str, code: int, message: str) -> None:
    done = homer(*line.replace(" S", f" {NOWHERE}").split())
    assert message.replace(" S", f" {NOWHERE}") in done.stderr
    assert done.stderr.startswith("homer: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert (done.code, done.stdout) == (code, "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(homer: Homer, tmp_path: Path) -> None:
    tmp_path.joinpath("fixed").mkdir(mode=0o500)
    done = homer("bench", "costs", "--derive", "--to", "fixed/below/costs.json")
    assert (done.code, done.stderr) == (2, "homer: fixed/below: Permission denied\n")


def test_a_file_in_the_way_is_named(homer: Homer) -> None:
    done = homer("bench", "costs", "--derive", "--to", "words.txt/costs.json")
    assert done.code == 2
    assert done.stderr.startswith("homer: words.txt")
    assert done.stderr.count("\n") == 1
