"""What of a document survived: at each node of the tree, and in the cache that the answer is from.

Makes `homer.v1.Evidence` and reads it. Knows nothing about how it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cluster.job import Job, JobSummary
from cluster.text import LocatedText
from homer.v1 import long_context_pb2 as pb
from workers.kept_runs import read_runs, write_runs


def evidence_of(job: Job, summary: JobSummary, document: LocatedText | None) -> pb.Evidence:
    """The evidence of a finished job; `document` is its context, where that was given as text."""
    evidence = pb.Evidence(
        levels=[pb.LevelEvidence() for _ in range(job.plan.height + 1)],
        passages=_passages(summary.context_indices),
    )
    for node in job.plan.nodes:
        worker, done = summary.evidence[node.id]
        level = evidence.levels[node.id.height]
        level.nodes += 1
        level.layer_start, level.layer_end = node.layer_start, node.layer_end
        level.context_tokens_in += done.context_in
        level.context_tokens_out += done.context_out
        evidence.nodes.add(
            height=node.id.height,
            index=node.id.index,
            worker=worker,
            seconds=done.seconds,
            context_start=node.context_start,
            context_end=node.context_end,
            context_tokens_in=done.context_in,
            context_tokens_out=done.context_out,
            kept_runs=done.kept_runs,
        )
    if document is not None:
        add_text(evidence, document)
    return evidence


def add_text(evidence: pb.Evidence, document: LocatedText) -> None:
    """Say what the passages are in `document`, whose tokens are those of the evidence."""
    for passage in evidence.passages:
        passage.char_start = document.starts[passage.token_start]
        # Tokens of one character end together.
        passage.char_end = max(document.ends[passage.token_start : passage.token_end])
        passage.text = document.text[passage.char_start : passage.char_end]
    steps = (after - before for before, after in pairwise((0, *document.starts)))
    evidence.token_start_steps[:] = steps


def kept_of(node: pb.NodeEvidence) -> list[range]:
    """The tokens of the document that a node kept, run by run."""
    return read_runs(node.kept_runs, node.context_start)


def _passages(context_indices: Sequence[int]) -> list[pb.Passage]:
    kept = read_runs(write_runs(context_indices, 0), 0)
    return [pb.Passage(token_start=run.start, token_end=run.stop) for run in kept]
