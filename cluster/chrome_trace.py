"""A request's timeline in the JSON trace event format, for https://ui.perfetto.dev and Chrome.

One row per worker and kind of work, one for the request itself; arrows from each node to the merge
that used it. Knows nothing about where a timeline comes from.
"""

from __future__ import annotations

from typing import Any

from homer.v1 import long_context_pb2 as pb

# Rows of a worker: only one thing happens in each at a time.
_COMPUTE, _TRANSFER, _DECODE = (1, "compute"), (2, "transfer"), (3, "decode")
_KINDS = {
    pb.TraceSlice.KIND_LEAF: ("leaf", _COMPUTE),
    pb.TraceSlice.KIND_MERGE: ("merge", _COMPUTE),
    pb.TraceSlice.KIND_REFRESH: ("refresh", _COMPUTE),
    pb.TraceSlice.KIND_TRANSFER: ("transfer", _TRANSFER),
    pb.TraceSlice.KIND_GATHER: ("gather", _TRANSFER),
    pb.TraceSlice.KIND_DECODE: ("decode", _DECODE),
}
_REQUEST_ROW = (1, 1)

Event = dict[str, Any]


def chrome_trace(trace: pb.GetTraceResponse) -> dict[str, Any]:
    """The trace as an object for `json.dump`; times are microseconds since the submission."""
    workers = sorted({one.worker for one in trace.slices}, key=lambda name: (len(name), name))
    process = {name: number for number, name in enumerate(workers, start=2)}
    events: list[Event] = [_named("process_name", 1, 0, "request")]
    events.append(_named("thread_name", *_REQUEST_ROW, "stages"))
    for name, number in process.items():
        events.append(_named("process_name", number, 0, name))
        events += [_named("thread_name", number, *row) for row in (_COMPUTE, _TRANSFER, _DECODE)]
    events += _stages(trace)
    events += [_slice(trace, one, process[one.worker]) for one in trace.slices]
    events += _arrows(trace, process)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"request_id": trace.request_id, "outcome": trace.outcome or "running"},
    }


def _named(kind: str, process: int, row: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": row, "args": {"name": name}}


def _stages(trace: pb.GetTraceResponse) -> list[Event]:
    """The request as a whole, and in it how long it waited, and for its first token."""
    ended = trace.ended_unix_seconds or trace.now_unix_seconds
    whole = {
        "request_id": trace.request_id,
        "outcome": trace.outcome or "running",
        "prompt_tokens": trace.prompt_tokens,
        "generated_tokens": trace.generated_tokens,
        "leaves": trace.leaves,
        "merges": trace.merges,
    }
    marks = [
        ("queue", trace.queued_unix_seconds, trace.started_unix_seconds or ended),
        ("compress", trace.started_unix_seconds, trace.first_token_unix_seconds or ended),
        ("answer", trace.first_token_unix_seconds, ended),
    ]
    events = [_complete(trace, "request", *_REQUEST_ROW, trace.queued_unix_seconds, ended, whole)]
    events += [
        _complete(trace, name, *_REQUEST_ROW, started, stopped, {})
        for name, started, stopped in marks
        if started
    ]
    return events


def _slice(trace: pb.GetTraceResponse, one: pb.TraceSlice, process: int) -> Event:
    kind, (row, _) = _KINDS[one.kind]
    args: dict[str, Any] = {"height": one.node.height, "index": one.node.index}
    for field in ("tokens_in", "tokens_out", "received_bytes"):
        if value := getattr(one, field):
            args[field] = value
    if one.children:
        args["children"] = [[child.height, child.index] for child in one.children]
    if one.lost:
        args["lost"] = True
    name = f"{kind} {one.node.height}/{one.node.index}{' (lost)' if one.lost else ''}"
    stopped = one.started_unix_seconds + one.seconds
    return {
        **_complete(trace, name, process, row, one.started_unix_seconds, stopped, args),
        "cat": kind,
    }


def _arrows(trace: pb.GetTraceResponse, process: dict[str, int]) -> list[Event]:
    """From the end of each node to the beginning of the merge that used it."""
    done = {
        (one.node.height, one.node.index): one
        for one in trace.slices
        if one.kind in (pb.TraceSlice.KIND_LEAF, pb.TraceSlice.KIND_MERGE) and not one.lost
    }
    events: list[Event] = []
    for parent in done.values():
        for child in parent.children:
            source = done.get((child.height, child.index))
            if source is None:
                continue
            common = {"cat": "tree", "name": "child", "id": len(events), "tid": _COMPUTE[0]}
            # An arrow belongs to the slice that its time lies in.
            within = source.started_unix_seconds + source.seconds * 0.999
            events.append(
                {**common, "ph": "s", "pid": process[source.worker], "ts": _time(trace, within)}
            )
            began = _time(trace, parent.started_unix_seconds)
            events.append(
                {**common, "ph": "f", "bp": "e", "pid": process[parent.worker], "ts": began}
            )
    return events


def _complete(
    trace: pb.GetTraceResponse,
    name: str,
    process: int,
    row: int,
    started: float,
    stopped: float,
    args: dict[str, Any],
) -> Event:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": row,
        "ts": _time(trace, started),
        "dur": round(max(stopped - started, 0.0) * 1e6, 3),
        "args": args,
    }


def _time(trace: pb.GetTraceResponse, unix_seconds: float) -> float:
    return round((unix_seconds - trace.queued_unix_seconds) * 1e6, 3)
