"""`homer calibrate`: measure a model's calibration bias on ordinary text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.load_settings import loads_a_model
from cluster.cli.settings import AsJson
from homer.checkpoint import check_can_write, model_folder
from homer.errors import ConfigError, PromptError
from homer.load_options import LoadOptions
from homer.shape import BIAS_FILE


@loads_a_model(device=True)
def calibrate(
    *,
    model: Annotated[str, typer.Option(help="Folder in Hugging Face format, or a model id.")],
    text: Annotated[
        list[Path],
        typer.Option(
            help="File with text: .jsonl is JSON lines, .html and .pdf are what they say, all else "
            "is plain text. Give the option again for more files."
        ),
    ],
    field: Annotated[str, typer.Option(help="Field of JSON lines that holds the text.")] = "text",
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"File to write; by default {BIAS_FILE} beside the model's files, those of a "
            "model id in the hub's cache of this machine."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the bias, by distance and layer: a .png or .svg.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Chunks of text to measure.")] = 100,
    chunk_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a chunk; by default the longest a plan makes."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Processes of this machine, each with a model; GPUs are shared out."
        ),
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each.")] = 1,
    fresh: Annotated[bool, typer.Option(help="Forget what a stopped run has done.")] = False,
    as_json: AsJson = False,
    load: LoadOptions,
) -> None:
    """Measure how the attention of ordinary text depends on distance, layer by layer.

    The result lets Homer keep what the question looks at, not what stands near it. About 100 chunks
    of the kind of text that you have are enough. A file beside the model is found by itself. A run
    that was stopped goes on when it is started again.
    """
    missing = [str(file) for file in text if not file.is_file()]
    if missing:
        raise PromptError(f"no such file: {', '.join(missing)}")

    from homer.bias import BiasInfo, save_bias
    from homer.bias_plot import check_can_plot, plot_bias
    from homer.calibration_run import CalibrationRun
    from homer.shape import ModelShape

    if plot is not None:
        check_can_plot(plot)
    shape = ModelShape.load(model, **load.hub)
    target = out or _beside(model, load)
    check_can_write(target)
    chunks, prefix_ids = _chunks(model, load, text, field, chunk_len, samples)
    if len(chunks) < samples:
        _say(
            f"the text has room for {len(chunks)} chunks of {len(chunks[0])} tokens, not {samples}"
        )
    state_file = target.with_name(target.name + ".part")
    if fresh:
        state_file.unlink(missing_ok=True)
    run = CalibrationRun(
        model=model,
        chunks=chunks,
        prefix_ids=prefix_ids,
        state_file=state_file,
        workers=min(workers, len(chunks)),
        threads=threads,
        load=load,
    )
    bias = _measure(run)
    info = BiasInfo(
        model=Path(model).name,
        num_layers=len(bias),
        hidden_size=shape.hidden_size,
        chunk_len=bias.shape[1],
        samples=len(chunks),
    )
    save_bias(target, bias, info)
    state_file.unlink()
    if plot is not None:
        plot_bias(plot, bias, f"Calibration bias of {info.model}, {info.samples} chunks")
    if as_json:
        typer.echo(json.dumps({"bias": str(target), "shape": list(bias.shape), **vars(info)}))
    else:
        typer.echo(f"{target}: bias of {tuple(bias.shape)} from {len(chunks)} chunks")


def _beside(model: str, load: LoadOptions) -> Path:
    """Where a bias is found by itself: with the model's files, also those of a model id."""
    folder = model_folder(model, load.revision)
    if folder is None:
        raise ConfigError(f"{model!r} has no files in the hub's cache to put a bias to; give --out")
    return folder / BIAS_FILE


def _chunks(
    model: str, load: LoadOptions, text: list[Path], field: str, chunk_len: int | None, samples: int
) -> tuple[list[list[int]], list[int]]:
    """Chunks of the text, and the token ids that come before each."""
    import torch

    from cluster.text import PromptTokenizer
    from homer.calibration import cut_chunks
    from homer.documents import read_documents
    from homer.shape import homer_defaults

    words = read_documents(text, field)
    config = homer_defaults(model, hub=load.hub)
    length = chunk_len or max(config.max_chunk_len, config.max_initial_chunk_len or 0)
    tokenizer = PromptTokenizer.load(model, **load.hub)
    if tokenizer is None:
        raise PromptError(f"{model!r} has no tokenizer; calibration needs text as token ids")
    ids = tokenizer.prompt_ids("", words, "")
    chunks = cut_chunks(torch.tensor(ids.context), length, samples)
    return [chunk.tolist() for chunk in chunks], ids.prefix


def _measure(run: Any) -> Any:
    """The bias, with a bar; where there is no terminal, a line now and then."""
    from rich.console import Console
    from rich.progress import Progress

    from homer.calibration_run import run_calibration

    console = Console(stderr=True)
    begun: int | None = None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Calibrating", total=len(run.chunks))

        def on_chunk(done: int) -> None:
            nonlocal begun
            progress.update(task, completed=done)
            if begun is None and done:
                _say(f"{run.state_file}: going on after {done} of {len(run.chunks)} chunks")
            elif not console.is_terminal and done and done % 100 == 0:
                _say(f"{done} of {len(run.chunks)} chunks")
            begun = done

        return run_calibration(run, on_chunk)


def _say(text: str) -> None:
    typer.echo(f"homer: {text}", err=True)
