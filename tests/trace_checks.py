"""What holds for every trace of a request that `homer trace` writes."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from homer.plan import MergePlan, NodeId

# Times are rounded to nanoseconds.
SLACK = 0.01


def check_trace(trace: dict[str, Any], plan: MergePlan) -> None:
    """Each node once, nothing at once in a row, children before parents, all within the request."""
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    work = [event for event in slices if "cat" in event]
    (request,) = (event for event in slices if event["name"] == "request")
    began, ended = request["ts"], request["ts"] + request["dur"]
    for event in slices:
        assert began - SLACK <= event["ts"], event
        assert event["ts"] + event["dur"] <= ended + SLACK, event
    nodes = {
        NodeId(event["args"]["height"], event["args"]["index"]): event
        for event in work
        if event["cat"] in ("leaf", "merge") and "lost" not in event["args"]
    }
    done = [event for event in work if event["cat"] in ("leaf", "merge")]
    assert sorted(nodes) == sorted(node.id for node in plan.nodes)
    assert len(done) - sum("lost" in event["args"] for event in done) == len(nodes)
    for node in plan.nodes:
        event = nodes[node.id]
        assert event["cat"] == ("leaf" if node.is_leaf else "merge")
        assert event["args"]["tokens_in"] == node.context_in
        assert event["args"].get("tokens_out", 0) == node.context_out
        for child in node.children:
            before = nodes[child]
            assert before["ts"] + before["dur"] <= event["ts"] + SLACK, (child, node.id)
    rows = defaultdict(list)
    for event in work:
        rows[event["pid"], event["tid"]].append(event)
    for row in rows.values():
        row.sort(key=lambda event: event["ts"])
        for one, after in pairwise(row):
            assert one["ts"] + one["dur"] <= after["ts"] + SLACK, (one, after)
    root = nodes[plan.root.id]
    for event in work:
        if event["cat"] in ("gather", "refresh", "decode"):
            assert event["ts"] >= root["ts"] + root["dur"] - SLACK, event
    starts = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "s"}
    ends = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(plan.nodes) - 1
    named = {event["pid"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert {event["pid"] for event in slices} <= named
