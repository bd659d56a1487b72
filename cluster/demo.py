"""`make demo`: a document sixty times longer than the model's window, on a local cluster.

Starts Ray with two CPU workers, asks the shipped demo model for a key hidden in the document over
gRPC, and shows what survived the merging. Everything that it starts ends with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cluster.cli.progress import describe_summary, progress_view
from cluster.client import HomerClient
from cluster.errors import ServiceError
from cluster.launch import ray_cluster, running_service
from cluster.options import ServeOptions
from cluster.text import PromptTokenizer, leave_out_torch
from homer.demo import MODEL_DIR
from homer.demo.tasks import Sample, Task, make_sample
from homer.errors import ModelError
from homer.v1 import long_context_pb2 as pb

MAX_ANSWER_TOKENS = 16


def demo(
    context_tokens: Annotated[int, typer.Option(help="Length of the document.")] = 33_000,
    task: Annotated[Task, typer.Option(help="What is hidden in it.")] = "passkey",
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    seed: Annotated[int, typer.Option(help="Another seed, another document.")] = 0,
) -> None:
    """Ask a question about a long document that hides the answer."""
    started = time.perf_counter()
    leave_out_torch()
    tokenizer = PromptTokenizer.load(str(MODEL_DIR))
    if tokenizer is None:
        raise ModelError(f"the demo model is not in {MODEL_DIR}; run `make train-demo`")
    sample = make_sample(task, context_tokens, tokenizer.count_tokens, seed, split="demo")
    spans = tokenizer.context_spans(sample.context)
    console = Console()
    console.print(
        f"A document of [bold]{len(spans):,}[/bold] tokens; somewhere in it: "
        f"[bold green]{sample.needle_text}[/bold green]"
    )
    options = ServeOptions(model=str(MODEL_DIR), workers=workers, cpu=True, threads=1, port=0)
    console.print(f"Starting Ray and {workers} workers …")
    with ray_cluster(None, options) as placed, running_service(placed) as address:
        ready = time.perf_counter()
        with HomerClient(address) as client:
            info = client.server_info()
            console.print(
                f"Service at {address}: {info.num_layers} layers, window of "
                f"{info.model_window} tokens, final cache of at most {info.target_len}",
                highlight=False,
                soft_wrap=True,
            )
            summary = _ask(client, sample)
        ended = time.perf_counter()
    _show_survivors(console, sample, spans, summary.kept_context_indices)
    right = sample.is_right(summary.text)
    console.print(f"\nQuestion: {sample.suffix.strip()} …")
    console.print(f"Answer:   [bold]{summary.text.strip()}[/bold]")
    console.print(
        "[bold green]Right.[/bold green]"
        if right
        else f"[bold red]Wrong: {sample.answer}[/bold red]"
    )
    console.print(describe_summary(summary), highlight=False, soft_wrap=True)
    for worker, nodes in sorted(summary.nodes_by_worker.items()):
        console.print(f"{worker} ran {nodes} nodes of the tree", highlight=False)
    console.print(
        f"start {ready - started:.1f} s, answer {ended - ready:.1f} s, "
        f"stop {time.perf_counter() - ended:.1f} s",
        highlight=False,
    )
    raise typer.Exit(0 if right else 1)


def _ask(client: HomerClient, sample: Sample) -> pb.Summary:
    with progress_view() as view:
        for event in client.generate(
            prefix=sample.prefix,
            context=sample.context,
            question=sample.suffix,
            sampling={"max_tokens": MAX_ANSWER_TOKENS},
            return_kept_indices=True,
        ):
            match event:
                case pb.Accepted():
                    view.accepted(event)
                case pb.Progress():
                    view.progress(event)
                case pb.Summary():
                    return event
    raise ServiceError("DATA_LOSS", "the service ended the answer before its summary")


def _show_survivors(
    console: Console, sample: Sample, spans: Sequence[tuple[int, int]], kept: Sequence[int]
) -> None:
    """Print the passages that are left in the cache, in order; the needle in green."""
    passages = list(runs(kept))
    console.print(
        f"\n{len(kept)} context tokens survived, in {len(passages)} passages (… is what is gone):"
    )
    text = Text()
    for run in passages:
        start, end = spans[run[0]][0], spans[run[-1]][1]
        needle_start = min(max(sample.needle[0], start), end)
        needle_end = min(max(sample.needle[1], needle_start), end)
        text.append(sample.context[start:needle_start])
        text.append(sample.context[needle_start:needle_end], style="bold green")
        text.append(sample.context[needle_end:end])
        text.append(" …", style="dim")
    console.print(text, highlight=False)
    needle = [i for i, (start, _) in enumerate(spans) if _within(start, sample.needle)]
    console.print(
        f"Of the {len(needle)} tokens that state the key, {len(set(needle) & set(kept))} survived.",
        highlight=False,
    )


def _within(position: int, span: tuple[int, int]) -> bool:
    return span[0] <= position < span[1]


def runs(indices: Sequence[int]) -> Iterator[list[int]]:
    """Ascending indices, grouped where they follow each other."""
    run: list[int] = []
    for index in indices:
        if run and index != run[-1] + 1:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


if __name__ == "__main__":
    typer.run(demo)
