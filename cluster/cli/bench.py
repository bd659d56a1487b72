"""`homer bench`: measures speed, memory, transfer and answers, and says on what.

Tables on stdout, progress on stderr; JSON, plots and single answers in a folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from cluster.cli import bench_cluster, bench_decode, bench_offload, bench_simulate
from cluster.cli.bench_output import OUT, Out, machine_facts, measuring, print_table, save_results
from cluster.cli.settings import AsJson
from homer.config import ScoreKind

if TYPE_CHECKING:
    from homer.bench.methods import Method
    from homer.bench.quality_run import QualityRun

SPEED_LENGTHS = "8192,16384"
MEMORY_LENGTHS = "8192,32768"
QUALITY_LENGTHS = "0.75x,2x,4x,8x,16x,32x,64x"
METHODS = "homer,paper,plain,truncation,yarn"

app = typer.Typer(
    help="Measure speed, memory, transfer, answers and scaling.", no_args_is_help=True
)
app.command()(bench_decode.decode)
app.command()(bench_offload.offload)
app.command()(bench_cluster.scaling)
app.command()(bench_cluster.overhead)
app.command()(bench_cluster.wire)
app.command()(bench_cluster.worker_memory)
app.command()(bench_simulate.costs)
app.command()(bench_simulate.simulate)

Threads = Annotated[int, typer.Option(help="CPU threads of each process.", min=1)]
Runs = Annotated[int, typer.Option(help="Rounds; each runs every method once.", min=1)]
Model = Annotated[
    str | None, typer.Option(help="Model folder with a tokenizer; else the demo model.")
]
Lengths = Annotated[str, typer.Option(help="Prompt lengths: multiples of the window, or tokens.")]
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

    model: str | None = None
    lengths: str = QUALITY_LENGTHS
    samples: int = 100
    methods: str = METHODS
    variants: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    plain_samples: int | None = None
    plain_max_length: str | None = None
    keys: int | None = None
    seed: int = 0
    jobs: int | None = None
    threads: int = 1
    dtype: str = "auto"
    device: str = "auto"
    out: Path = OUT
    fresh: bool = False


_DEFAULT = QualityOptions()


@app.command()
def speed(
    lengths: Lengths = SPEED_LENGTHS,
    runs: Runs = 3,
    threads: Threads = 1,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Time compression beside full attention, on a model of 12 random layers."""
    with measuring(as_json):
        _speed(lengths, runs, threads, out)


@app.command()
def memory(
    lengths: Lengths = MEMORY_LENGTHS,
    methods: Annotated[str, typer.Option(help="Which of: homer, paper, plain.")] = "homer,paper",
    threads: Threads = 1,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Measure peak memory above the loaded model, in a fresh process for each length."""
    with measuring(as_json):
        _memory(lengths, methods, threads, out)


@app.command()
def transport(
    megabytes: Annotated[int, typer.Option(help="MiB per run.", min=16)] = 512,
    runs: Runs = 9,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Time the tensor stream between workers beside a raw TCP socket and a copy in memory."""
    with measuring(as_json):
        _transport(megabytes, runs, out)


@app.command("wire-dtype")
def wire_dtype(
    prompts: Annotated[int, typer.Option(help="Pass-key prompts.", min=1)] = 20,
    out: Out = OUT,
    as_json: AsJson = False,
) -> None:
    """Measure what narrower types between workers cost in accuracy, and the bytes they save."""
    with measuring(as_json):
        _wire_dtype(prompts, out)


@app.command()
def passkey(
    model: Model = _DEFAULT.model,
    lengths: Lengths = _DEFAULT.lengths,
    samples: Samples = _DEFAULT.samples,
    methods: Methods = _DEFAULT.methods,
    variant: Variants = None,
    score: Scores = None,
    plain_samples: PlainSamples = _DEFAULT.plain_samples,
    plain_max_length: PlainMaxLength = _DEFAULT.plain_max_length,
    seed: Seed = _DEFAULT.seed,
    jobs: Jobs = _DEFAULT.jobs,
    threads: Threads = _DEFAULT.threads,
    dtype: Dtype = _DEFAULT.dtype,
    device: Device = _DEFAULT.device,
    out: Out = _DEFAULT.out,
    fresh: Fresh = _DEFAULT.fresh,
    as_json: AsJson = False,
) -> None:
    """Answers about one key hidden in a long text. A run that was stopped goes on."""
    with measuring(as_json):
        _quality("passkey", _options(locals()))


@app.command()
def multikey(
    model: Model = _DEFAULT.model,
    lengths: Lengths = _DEFAULT.lengths,
    samples: Samples = _DEFAULT.samples,
    methods: Methods = _DEFAULT.methods,
    variant: Variants = None,
    score: Scores = None,
    plain_samples: PlainSamples = _DEFAULT.plain_samples,
    plain_max_length: PlainMaxLength = _DEFAULT.plain_max_length,
    keys: Annotated[int | None, typer.Option(help="Keys in the text.", min=1)] = None,
    seed: Seed = _DEFAULT.seed,
    jobs: Jobs = _DEFAULT.jobs,
    threads: Threads = _DEFAULT.threads,
    dtype: Dtype = _DEFAULT.dtype,
    device: Device = _DEFAULT.device,
    out: Out = _DEFAULT.out,
    fresh: Fresh = _DEFAULT.fresh,
    as_json: AsJson = False,
) -> None:
    """Answers about one of several named keys. A run that was stopped goes on."""
    with measuring(as_json):
        _quality("multikey", _options(locals()))


@app.command("all")
def everything(model: Model = None, out: Out = OUT, as_json: AsJson = False) -> None:
    """All of it with few samples, in about 15 minutes on two cores."""
    few = QualityOptions(
        model=model, lengths="0.75x,8x,64x", samples=10, plain_max_length="8x", out=out
    )
    with measuring(as_json):
        _speed(SPEED_LENGTHS, 1, 1, out)
        _memory(MEMORY_LENGTHS, "homer,paper", 1, out)
        bench_cluster.measure_scaling(bench_cluster.SCALING_LENGTHS, "1,2", 1, out)
        bench_cluster.measure_overhead(1024, 32, 12, out)
        bench_cluster.measure_wire(16384, bench_cluster.WIRE_WORKERS, out)
        bench_cluster.measure_worker_memory("16384,65536", 2, out)
        _transport(512, 5, out)
        _wire_dtype(10, out)
        bench_offload.measure_batches(bench_offload.OFFLOAD_TOKENS, [1, 0], 1, out)
        bench_simulate.simulate_few(out)
        _quality("passkey", few)
        _quality("multikey", few)


def _options(given: dict[str, Any]) -> QualityOptions:
    lists = {f"{name}s": tuple(given.pop(name) or ()) for name in ("variant", "score")}
    del given["as_json"]
    return QualityOptions(**{**given, **lists})


def _speed(lengths: str, runs: int, threads: int, out: Path) -> None:
    from homer.bench.bench_model import BenchSize
    from homer.bench.quality_run import parse_lengths
    from homer.bench.show import speed_table
    from homer.bench.speed import measure_speed

    machine = machine_facts()
    results = measure_speed(
        parse_lengths(lengths, BenchSize().window), runs=runs, threads=threads, on_run=_say_run
    )
    print_table(machine, speed_table(results))
    save_results(out / "speed.json", machine, [asdict(result) for result in results])


def _say_run(tokens: int, method: str, seconds: float) -> None:
    print(f"{tokens:,} tokens, {method}: {seconds:.2f} s", file=sys.stderr, flush=True)


def _memory(lengths: str, methods: str, threads: int, out: Path) -> None:
    from homer.bench.bench_model import BenchSize
    from homer.bench.memory import measure_memory
    from homer.bench.quality_run import parse_lengths
    from homer.bench.show import memory_table

    machine = machine_facts()
    results = measure_memory(
        parse_lengths(lengths, BenchSize().window),
        methods.split(","),
        threads=threads,
        on_start=lambda tokens, method: print(
            f"memory of {method} at {tokens:,} tokens", file=sys.stderr, flush=True
        ),
    )
    results.sort(key=lambda result: result.method)
    print_table(machine, memory_table(results))
    values = [{**asdict(r), "above_bytes": r.above_bytes} for r in results]
    save_results(out / "memory.json", machine, values)


def _wire_dtype(prompts: int, out: Path) -> None:
    from rich.table import Table

    from workers.wire_bench import measure

    machine = machine_facts()
    print(f"types on the wire, {prompts} prompts", file=sys.stderr, flush=True)
    costs = measure(prompts=prompts)
    table = Table(
        title="The demo model on two workers, by the type in which floats travel",
        caption=f"{prompts} pass-key prompts; beside float32 as it is",
    )
    for title in ("wire", "bytes", "logits: worst", "mean", "equal tokens", "equal kept tokens"):
        table.add_column(title, justify="left" if title == "wire" else "right")
    for cost in costs:
        table.add_row(
            cost.wire_dtype,
            f"{cost.share_of_bytes:.1%}",
            f"{cost.worst_logit_difference:.4f}",
            f"{cost.mean_logit_difference:.4f}",
            f"{cost.token_agreement:.1%}",
            f"{cost.kept_agreement:.1%}",
        )
    print_table(machine, table)
    save_results(out / "wire-dtype.json", machine, [asdict(cost) for cost in costs])


def _transport(megabytes: int, runs: int, out: Path) -> None:
    from rich.table import Table

    from workers.bench import measure

    machine = machine_facts()
    print(f"transport of {megabytes} MiB, {runs} runs", file=sys.stderr, flush=True)
    result = measure(megabytes, runs)
    table = Table(
        title=f"{result.megabytes} MiB between two processes on loopback",
        caption=f"medians of {result.runs} runs in turn; ratios are those of neighbouring runs",
    )
    for title in ("way", "GB/s", "of raw TCP"):
        table.add_column(title, justify="left" if title == "way" else "right")
    for way, gb_per_second, ratio in result.rows:
        table.add_row(way, f"{gb_per_second:.2f}", f"{ratio:.2f}")
    print_table(machine, table)
    save_results(out / "transport.json", machine, asdict(result))


def _quality(task: Literal["passkey", "multikey"], options: QualityOptions) -> None:
    from homer.bench.methods import choose_methods
    from homer.bench.plot import can_plot, plot_quality
    from homer.bench.quality import as_json, measure_quality
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
            options.variants,
            homer_defaults(model),
            options.scores,
        ),
        samples=options.samples,
        plain_samples=options.plain_samples,
        plain_max_length=None if longest is None else parse_lengths(longest, window)[0],
        **({} if options.keys is None else {"keys": options.keys}),
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
        cells = measure_quality(
            run, results, jobs=options.jobs or len(os.sched_getaffinity(0)), on_record=on_record
        )
    print_table(machine, quality_table(run, cells))
    save_results(options.out / f"{task}.json", machine, as_json(run, cells))
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
