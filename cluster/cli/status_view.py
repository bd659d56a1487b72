"""The status of a service as tables. Knows nothing about where it comes from."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from homer.v1 import long_context_pb2 as pb

_STYLES = {
    pb.WORKER_STATE_IDLE: "green",
    pb.WORKER_STATE_BUSY: "yellow",
    pb.WORKER_STATE_DRAINING: "blue",
    pb.WORKER_STATE_SILENT: "red",
    pb.WORKER_STATE_ABSENT: "red",
}


def status_view(info: pb.GetServerInfoResponse, server: str) -> RenderableType:
    """What a service is and does."""
    head = Text(
        f"{info.model} at {server}, homer {info.homer_version}\n"
        f"{len(info.workers)} worker(s); requests: {info.running_requests} running, "
        f"{info.queued_requests} waiting ({info.queued_tokens:,} tokens)"
    )
    return Group(head, _workers(info), *([_requests(info)] if info.requests else []))


def _workers(info: pb.GetServerInfoResponse) -> Table:
    # Columns that say nothing here are left out: a terminal is narrow.
    budgets = any(worker.memory_budget_bytes for worker in info.workers)
    accelerators = any(worker.accelerator_bytes for worker in info.workers)
    table = _table("Workers")
    table.add_column("worker", no_wrap=True)
    table.add_column("address", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("layers", "requests", "held", *(["budget"] if budgets else []), "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (*(["GPU"] if accelerators else []), "nodes", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in info.workers:
        state = pb.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
        numbers = [
            f"{worker.loaded_layers}/{info.num_layers}" if worker.loaded_layers else "-",
            str(worker.requests),
            _size(worker.state_bytes + worker.kv_shard_bytes),
            *([_size(worker.memory_budget_bytes)] if budgets else []),
            _size(worker.resident_bytes),
            *([_size(worker.accelerator_bytes)] if accelerators else []),
            f"{worker.leaves_done + worker.merges_done:,}",
            f"{worker.generated_tokens:,}",
        ]
        table.add_row(
            worker.name,
            worker.address or Text(worker.problem),
            Text(state, style=_STYLES.get(worker.state, "")),
            *(numbers if worker.ready else ["-"] * len(numbers)),
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False
    )


def _size(count: int) -> str:
    return decimal(count).replace(" bytes", " B")


def _requests(info: pb.GetServerInfoResponse) -> Table:
    table = _table("Requests")
    table.add_column("request", overflow="fold")
    table.add_column("stage")
    for name in ("prompt", "leaves", "merges"):
        table.add_column(name, justify="right")
    for name in ("done", "tokens", "seconds"):
        table.add_column(name, justify="right")
    for one in info.requests:
        table.add_row(
            one.request_id,
            pb.RequestStage.Name(one.stage).removeprefix("REQUEST_STAGE_").lower(),
            f"{one.prompt_tokens:,}",
            f"{one.leaves_done}/{one.leaves_total}",
            f"{one.merges_done}/{one.merges_total}",
            f"{(one.leaves_done + one.merges_done) / (one.leaves_total + one.merges_total):.0%}",
            str(one.generated_tokens),
            f"{one.seconds:.1f}",
        )
    return table
