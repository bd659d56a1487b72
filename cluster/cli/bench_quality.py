"""`homer bench passkey` and `multikey`: answers about keys that are hidden in long texts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from cluster.cli.bench_output import (
    OUT,
    Lengths,
    Out,
    Threads,
    machine_facts,
    measuring,
    print_table,
    save_results,
)
from cluster.cli.option_group import option_group, options_of
from cluster.cli.settings import AsJson
from homer.config import ScoreKind

if TYPE_CHECKING:
    from homer.bench.methods import Method
    from homer.bench.quality_run import QualityRun

QUALITY_LENGTHS = "0.75x,2x,4x,8x,16x,32x,64x"
METHODS = "homer,paper,plain,truncation,yarn"

Model = Annotated[
    str | None, typer.Option(help="Model folder with a tokenizer; else the demo model.")
]
Samples = Annotated[int, typer.Option(help="Samples per length.", min=1)]
Methods = Annotated[
    str,
    typer.Option(help="Which of: " + METHODS.replace(",", ", ") + "; and uncalibrated, no bias."),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(help="Other settings: name:field=value,field=value. Repeatable."),
]
Scores = Annotated[
    list[str] | None,
    typer.Option(help=f"Others too: {', '.join(get_args(ScoreKind))}. Repeatable."),
]
PlainSamples = Annotated[
    int | None,
    typer.Option(help="Samples per length beyond the window for plain and yarn.", min=1),
]
PlainMaxLength = Annotated[str | None, typer.Option(help="Longest prompt for plain and yarn.")]
Seed = Annotated[int, typer.Option(help="Number of the first sample.", min=0)]
Jobs = Annotated[int | None, typer.Option(help="Processes; else one per core.", min=1)]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's own.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, or auto: the first GPU if there is one.")]
Fresh = Annotated[bool, typer.Option(help="Forget the answers of earlier runs.")]


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """The options of `homer bench passkey` and `multikey`; lengths as they were written."""

    model: Model = None
    lengths: Lengths = QUALITY_LENGTHS
    samples: Samples = 100
    methods: Methods = METHODS
    variant: Variants = None
    score: Scores = None
    plain_samples: PlainSamples = None
    plain_max_length: PlainMaxLength = None
    seed: Seed = 0
    jobs: Jobs = None
    threads: Threads = 1
    dtype: Dtype = "auto"
    device: Device = "auto"
    out: Out = OUT
    fresh: Fresh = False


_measures_quality = option_group("options", options_of(QualityOptions), QualityOptions)


@_measures_quality
def passkey(*, options: QualityOptions, as_json: AsJson = False) -> None:
    """Answers about one key hidden in a long text. A run that was stopped goes on."""
    with measuring(as_json):
        measure_quality("passkey", options)


@_measures_quality
def multikey(
    *,
    options: QualityOptions,
    keys: Annotated[int | None, typer.Option(help="Keys in the text.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Answers about one of several named keys. A run that was stopped goes on."""
    with measuring(as_json):
        measure_quality("multikey", options, keys)


def measure_quality(
    task: Literal["passkey", "multikey"], options: QualityOptions, keys: int | None = None
) -> None:
    from homer.bench import quality
    from homer.bench.methods import choose_methods
    from homer.bench.plot import can_plot, plot_quality
    from homer.bench.quality_run import QualityRun, parse_lengths
    from homer.bench.results import ResultsFile
    from homer.bench.show import quality_table
    from homer.demo import MODEL_DIR
    from homer.shape import ModelShape, homer_defaults

    model = options.model or str(MODEL_DIR)
    window = ModelShape.load(model).window
    longest = options.plain_max_length
    run = QualityRun(
        model=model,
        task=task,
        lengths=parse_lengths(options.lengths, window),
        methods=choose_methods(
            [name for name in options.methods.split(",") if name],
            options.variant or (),
            homer_defaults(model),
            options.score or (),
        ),
        samples=options.samples,
        plain_samples=options.plain_samples,
        plain_max_length=None if longest is None else parse_lengths(longest, window)[0],
        **({} if keys is None else {"keys": keys}),
        first_seed=options.seed,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
    )
    machine = machine_facts()
    file = options.out / f"{task}.jsonl"
    if options.fresh:
        file.unlink(missing_ok=True)
    results = ResultsFile(file)
    with _progress(run, results) as on_record:
        cells = quality.measure_quality(
            run, results, jobs=options.jobs or len(os.sched_getaffinity(0)), on_record=on_record
        )
    print_table(machine, quality_table(run, cells))
    save_results(options.out / f"{task}.json", machine, quality.as_json(run, cells))
    if can_plot():
        plot_quality(run, cells, options.out / f"{task}.png")
        print(f"plot: {options.out / f'{task}.png'}", file=sys.stderr)
    else:
        print("no plot: install matplotlib for one", file=sys.stderr)


@contextmanager
def _progress(run: QualityRun, results: Any) -> Iterator[Any]:
    """A bar with the time left, or a line now and then where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from homer.bench.quality import open_trials

    methods = {method.name: method for method in run.methods}
    trials = open_trials(run, results.records)
    total = sum(_work(method, trial.length) for trial in trials for method in trial.methods)
    answers = sum(len(trial.methods) for trial in trials)
    console = Console(stderr=True)
    if results.records:
        console.print(f"{results.path}: going on, {answers} answers left", highlight=False)
    bar = Progress(
        TextColumn(f"{run.task} {{task.fields[answers]}}/{answers}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total, answers=0, at="")
    done = 0

    def on_record(record: Any) -> None:
        nonlocal done
        done += 1
        at = f"{record.length:,} tokens, {record.method}"
        work = _work(methods[record.method], record.length)
        bar.update(task, advance=work, answers=done, at=at)
        if not console.is_terminal and (done % 100 == 0 or done == answers):
            console.print(f"{run.task}: {done}/{answers} answers ({at})", highlight=False)

    with bar:
        yield on_record


def _work(method: Method, length: int) -> float:
    """Expected time in arbitrary units: linear, but for full attention."""
    if method.kind == "truncation":
        return 200.0
    return length * (1 + length / 4096) if method.is_full_attention else length
