"""The spans of a subtree that a worker runs: the same tree, with times.

A merge's span holds those of its children, so it opens with the first leaf below it; what the merge
itself took is the span `compute` in it. Knows nothing about how nodes are run.
"""

from __future__ import annotations

from typing import Any

from homer.plan import MergePlan, NodeId, PlanNode
from workers.logs import log_fields
from workers.tracing import Tracing


class SubtreeSpans:
    """Spans of the nodes under `top`, below the span that the running task follows.

    A context manager: what is open when it ends has failed.
    """

    def __init__(self, tracing: Tracing, plan: MergePlan, top: NodeId) -> None:
        self._tracing = tracing
        self._plan = plan
        self._top = top
        self._open: dict[NodeId, Any] = {}

    def __enter__(self) -> SubtreeSpans:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # The highest opened first.
        for span in reversed(self._open.values()):
            self._tracing.end(span, error=str(error) or type(error).__name__)
        self._open.clear()

    def node_done(self, node: PlanNode, started: float, seconds: float) -> None:
        """A node was computed in `seconds` from the unix time `started` on."""
        if not self._tracing.on:
            return
        span = self._span(node, started)
        if not node.is_leaf:
            self._tracing.record("compute", started, seconds, span)
        del self._open[node.id]
        self._tracing.end(span, ended=started + seconds)

    def _span(self, node: PlanNode, started: float) -> Any:
        if node.id not in self._open:
            parent = None
            if node.id != self._top:
                parent = self._span(self._plan.by_id[self._plan.parents[node.id]], started)
            self._open[node.id] = self._tracing.start(
                "leaf" if node.is_leaf else "merge", parent, node_attributes(node), started
            )
        return self._open[node.id]


def node_attributes(node: PlanNode) -> dict[str, Any]:
    """What the span of a node says about it."""
    return {
        "node.height": node.id.height,
        "node.index": node.id.index,
        "tokens.in": node.context_in,
        "tokens.out": node.context_out,
        **log_fields_of_span(),
    }


def log_fields_of_span() -> dict[str, str]:
    """Whose work a span is: what the log lines of the same task say, but for the node."""
    return {name: value for name, value in log_fields().items() if name != "node"}
