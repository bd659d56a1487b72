"""Right answers on the demo tasks, method beside method, length by length.

Every result is a line of a file as soon as it is there; a run that was stopped goes on from it.
Knows nothing about how results are shown.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

import torch

from homer.bench.examiner import Examiner, Trial, examine, start_process
from homer.bench.quality_run import QualityRun
from homer.bench.results import Cell, Record, ResultsFile


def open_trials(run: QualityRun, done: Sequence[Record]) -> list[Trial]:
    """What is left to do, shortest prompts first."""
    answered = {(record.identity, record.length, record.seed) for record in done}
    identities = {method: run.identity(method) for method in run.methods}
    trials = []
    for length in sorted(set(run.lengths)):
        for number in range(run.samples):
            seed = run.first_seed + number
            methods = tuple(
                method
                for method in run.methods
                if number < run.wanted_samples(method, length)
                and (identities[method], length, seed) not in answered
            )
            if methods:
                trials.append(Trial(length, seed, methods))
    return trials


def measure_quality(
    run: QualityRun,
    results: ResultsFile,
    *,
    jobs: int = 1,
    on_record: Callable[[Record], None] | None = None,
) -> list[Cell]:
    """Do what is left of `run`, in `jobs` processes, and sum up all of it."""
    for records in _run_trials(run, open_trials(run, results.records), jobs):
        for record in records:
            results.append(record)
            if on_record is not None:
                on_record(record)
    return summarize(run, results.records)


def summarize(run: QualityRun, records: Sequence[Record]) -> list[Cell]:
    """The run's cells, by length and method; those without an answer are left out."""
    cells = []
    for length in sorted(set(run.lengths)):
        for method in run.methods:
            identity = run.identity(method)
            seeds = range(run.first_seed, run.first_seed + run.wanted_samples(method, length))
            hits = [
                record
                for record in records
                if (record.identity, record.length) == (identity, length) and record.seed in seeds
            ]
            if hits:
                right = sum(record.right for record in hits)
                kept = sum(record.key_kept for record in hits)
                seconds = sum(record.seconds for record in hits) / len(hits)
                cells.append(Cell(method.name, length, len(hits), right, kept, seconds))
    return cells


def _run_trials(run: QualityRun, trials: list[Trial], jobs: int) -> Iterator[list[Record]]:
    if jobs == 1:
        if trials:
            torch.set_num_threads(run.threads)
            examiner = Examiner(run)
            yield from map(examiner.examine, trials)
        return
    # Spawned, not forked: threads of torch do not survive a fork.
    pool = ProcessPoolExecutor(
        max_workers=jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_process,
        initargs=(run,),
    )
    try:
        for future in as_completed([pool.submit(examine, trial) for trial in trials]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def as_json(run: QualityRun, cells: Sequence[Cell]) -> dict[str, Any]:
    """The run and its cells as plain values."""
    settings = {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(run)
        if field.name != "methods"
    }
    methods = {method.name: method.settings for method in run.methods}
    return {
        "run": {**settings, "window": run.window, "methods": methods},
        "cells": [{**asdict(c), "share": c.share, "interval": c.interval} for c in cells],
    }
