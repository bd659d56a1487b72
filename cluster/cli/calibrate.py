"""`homer calibrate`: measure a model's calibration bias on ordinary text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from homer.errors import PromptError
from homer.shape import BIAS_FILE


def calibrate(
    model: Annotated[str, typer.Option(help="Folder in Hugging Face format, or a model id.")],
    text: Annotated[
        list[Path], typer.Option(help="Text file; give the option again for more files.")
    ],
    out: Annotated[
        Path | None, typer.Option(help=f"File to write; by default {BIAS_FILE} beside the model.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Chunks of text to measure.")] = 100,
    chunk_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a chunk; by default the longest a plan makes."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Measure how the attention of ordinary text depends on distance, layer by layer.

    The result lets Homer keep what the question looks at, not what stands near it. About 100 chunks
    of the kind of text that you have are enough. A file beside the model is found by itself.
    """
    missing = [str(file) for file in text if not file.is_file()]
    if missing:
        raise PromptError(f"no such file: {', '.join(missing)}")
    if out is None and not Path(model).is_dir():
        raise PromptError(f"{model!r} is no folder to write {BIAS_FILE} into; give --out")
    target = out or Path(model) / BIAS_FILE

    import torch

    from cluster.text import PromptTokenizer
    from homer.bias import BiasInfo, save_bias
    from homer.calibration import cut_chunks, measure_bias
    from homer.loading import load_model
    from homer.shape import homer_defaults
    from homer.stack import LayerStack

    config = homer_defaults(model)
    length = chunk_len or max(config.max_chunk_len, config.max_initial_chunk_len or 0)
    tokenizer = PromptTokenizer.load(model)
    if tokenizer is None:
        raise PromptError(f"{model!r} has no tokenizer; calibration needs text as token ids")
    words = "\n".join(file.read_text(encoding="utf-8") for file in text)
    ids = tokenizer.prompt_ids("", words, "")
    chunks = cut_chunks(torch.tensor(ids.context), length, samples)
    stack = LayerStack(load_model(model, device=device, dtype=dtype))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Calibrating", total=len(chunks))
        bias = measure_bias(
            stack,
            chunks,
            torch.tensor(ids.prefix, dtype=torch.int64),
            on_chunk=lambda done, _: progress.update(task, completed=done),
        )
    info = BiasInfo(
        model=Path(model).name,
        num_layers=stack.num_layers,
        hidden_size=stack.hidden_size,
        chunk_len=length,
        samples=len(chunks),
    )
    save_bias(target, bias, info)
    if len(chunks) < samples:
        typer.echo(
            f"homer: the text has room for {len(chunks)} chunks of {length} tokens, not {samples}",
            err=True,
        )
    if as_json:
        typer.echo(json.dumps({"bias": str(target), "shape": list(bias.shape), **vars(info)}))
    else:
        typer.echo(f"{target}: bias of {tuple(bias.shape)} from {len(chunks)} chunks")
