"""Measuring answers: every sample once, resumed runs, sums with their intervals."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console

from homer.bench.examiner import Examiner
from homer.bench.methods import choose_methods
from homer.bench.plot import plot_quality
from homer.bench.quality import as_json, measure_quality, open_trials, summarize
from homer.bench.quality_run import QualityRun, parse_lengths
from homer.bench.results import Cell, Record, ResultsFile
from homer.bench.show import quality_table
from homer.config import HomerConfig
from homer.demo import tasks
from homer.errors import ConfigError
from tests.homer.bench.demo_llama import WINDOW

LENGTHS = (144, 400)
BASE = HomerConfig(max_chunk_len=96, target_len=96, warmup_layers=1)


@pytest.fixture
def run(model_dir: Path) -> QualityRun:
    return QualityRun(
        model=str(model_dir),
        task="passkey",
        lengths=LENGTHS,
        methods=choose_methods(["homer", "plain", "truncation"], [], BASE),
        samples=3,
        plain_samples=1,
        device="cpu",
    )


def places(records: list[Record]) -> Counter[tuple[str, int, int]]:
    return Counter((record.method, record.length, record.seed) for record in records)


def all_places(run: QualityRun) -> Counter[tuple[str, int, int]]:
    wanted = {("plain", 400): 1}
    return Counter(
        (method.name, length, seed)
        for method in run.methods
        for length in LENGTHS
        for seed in range(wanted.get((method.name, length), 3))
    )


def without_seconds(records: list[Record]) -> set[Record]:
    return {dataclasses.replace(record, seconds=0.0) for record in records}


def test_every_sample_is_answered_once_by_each_method(run: QualityRun, tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "passkey.jsonl")
    cells = measure_quality(run, results)
    assert places(results.records) == all_places(run)
    assert {(cell.method, cell.length): cell.samples for cell in cells} == {
        (method, length): 1 if (method, length) == ("plain", 400) else 3
        for method in ("homer", "plain", "truncation")
        for length in LENGTHS
    }
    for record in results.records:
        assert record.length - 30 < record.prompt_tokens <= record.length
        assert record.key_kept or record.method != "plain"
        assert record.right == (record.generated.strip().removesuffix(".") == record.answer)


def test_a_stopped_run_goes_on_and_neither_repeats_nor_loses(
    run: QualityRun, tmp_path: Path
) -> None:
    whole = ResultsFile(tmp_path / "whole.jsonl")
    measure_quality(run, whole)

    class StoppedError(Exception):
        pass

    file = tmp_path / "stopped.jsonl"
    before = ResultsFile(file)

    def stop_at_seventh(record: Record) -> None:
        if len(before.records) == 7:
            raise StoppedError

    with pytest.raises(StoppedError):
        measure_quality(run, before, on_record=stop_at_seventh)
    with file.open("a") as torn:
        torn.write(json.dumps({"method": "homer"})[:-3])
    resumed = ResultsFile(file)
    assert len(resumed.records) == 7
    cells = measure_quality(run, resumed)
    again = ResultsFile(file).records
    assert places(again) == all_places(run)
    assert without_seconds(again) == without_seconds(whole.records)
    assert [(c.method, c.length, c.right) for c in cells] == [
        (c.method, c.length, c.right) for c in summarize(run, whole.records)
    ]
    assert open_trials(run, again) == []


def test_more_samples_only_add(run: QualityRun, tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "passkey.jsonl")
    measure_quality(run, results)
    more = dataclasses.replace(run, samples=4)
    assert {trial.seed for trial in open_trials(more, results.records)} == {3}


def test_answers_of_other_settings_do_not_count(run: QualityRun, tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "passkey.jsonl")
    measure_quality(run, results)
    other = dataclasses.replace(run, methods=choose_methods(["homer"], [], BASE.replace(fan_in=4)))
    assert len(open_trials(other, results.records)) == 3 * len(LENGTHS)
    assert summarize(other, results.records) == []


def test_two_processes_give_the_same_answers_as_one(run: QualityRun, tmp_path: Path) -> None:
    one, two = ResultsFile(tmp_path / "one.jsonl"), ResultsFile(tmp_path / "two.jsonl")
    measure_quality(run, one)
    measure_quality(run, two, jobs=2)
    assert without_seconds(two.records) == without_seconds(one.records)


def test_plain_can_be_limited_in_length(run: QualityRun) -> None:
    limited = dataclasses.replace(run, plain_max_length=200)
    names = {
        trial.length: [method.name for method in trial.methods]
        for trial in open_trials(limited, [])
    }
    assert names == {144: ["homer", "plain", "truncation"], 400: ["homer", "truncation"]}


def test_key_kept_tells_whether_the_key_was_in_the_cache(run: QualityRun) -> None:
    examiner = Examiner(run)
    sample = tasks.make_sample("passkey", 400, examiner.count_tokens, 0)
    ids = examiner._ids(sample.context)
    key = examiner._key_tokens(sample).tolist()
    assert examiner.tokenizer.decode([ids[i] for i in key]) == sample.answer
    kept = ids[: key[0]].copy()
    assert sample.answer not in examiner.tokenizer.decode(kept)


def test_multikey_asks_for_one_of_the_keys(run: QualityRun, tmp_path: Path) -> None:
    multi = dataclasses.replace(run, task="multikey", keys=2, lengths=(144,), samples=2)
    results = ResultsFile(tmp_path / "multikey.jsonl")
    measure_quality(multi, results)
    assert {record.task for record in results.records} == {"multikey"}
    three = dataclasses.replace(multi, keys=3)
    assert len(open_trials(three, results.records)) == 2


def test_lengths_are_windows_or_tokens() -> None:
    assert parse_lengths("0.75x,2x,4096,2x", 512) == (384, 1024, 4096)
    for text in ("", "x", "2y", "0", "-1x"):
        with pytest.raises(ConfigError, match="multiples of the window or tokens"):
            parse_lengths(text, 512)


def test_a_length_without_room_is_refused(run: QualityRun, tmp_path: Path) -> None:
    short = dataclasses.replace(run, lengths=(8,))
    with pytest.raises(ConfigError, match="ask for longer ones"):
        measure_quality(short, ResultsFile(tmp_path / "passkey.jsonl"))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "passkey.jsonl"
    file.write_text('{"hello": 1}\n')
    with pytest.raises(ConfigError, match="name another file"):
        ResultsFile(file)


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    # Wilson (1927), as tables give it.
    [
        (98, 100, 0.9300, 0.9945),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_intervals(right: int, samples: int, low: float, high: float) -> None:
    cell = Cell("homer", 8, samples, right, right, 0.0)
    assert cell.interval == pytest.approx((low, high), abs=1e-4)


def test_results_are_shown_with_their_number_of_samples(run: QualityRun, tmp_path: Path) -> None:
    cells = [
        Cell("homer", 144, 3, 3, 3, 0.1),
        Cell("plain", 144, 3, 0, 3, 0.1),
        Cell("homer", 400, 3, 2, 3, 0.1),
        Cell("truncation", 400, 2, 0, 1, 0.1),
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(quality_table(run, cells))
    text = console.export_text()
    for part in ("100%", "67%", "n 3", "n 2", "not run", "key kept 50%", f"{400 / WINDOW:.4g}x"):
        assert part in text
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_quality(run, cells, tmp_path / "plot.svg")
    plot = (tmp_path / "plot.svg").read_text()
    for part in ("homer (n 3)", "plain (n 3)", "truncation (n 2)"):
        assert part in plot
    values = as_json(run, cells)
    assert json.loads(json.dumps(values))["cells"][0]["share"] == 1.0
    assert values["run"]["methods"]["homer"]["config"]["max_chunk_len"] == 96
