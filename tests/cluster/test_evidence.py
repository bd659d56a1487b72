"""Evidence says, node by node, what one process keeps; its passages are the document's own text."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from typing import Any

import pytest
import torch

from cluster.client import HomerClient
from cluster.evidence import kept_of
from cluster.text import PromptIds, PromptTokenizer
from homer import HomerConfig, HomerModel
from homer.encode import TreeEncoder
from homer.plan import NodeId
from homer.state import NodeState
from homer.v1 import long_context_pb2 as pb
from tests.golden_cases import GoldenCase

# Some of its characters are several tokens, and one is several of UTF-16.
DOCUMENT = "Über die Brücke — 走 🦊 jumps; the quick brown fox and the lazy dog. " * 9
ASK: dict[str, Any] = {"prefix": "Read: ", "context": DOCUMENT, "question": " What jumps?"}


@pytest.fixture(scope="module")
def tokenizer(text_model: Any) -> PromptTokenizer:
    loaded = PromptTokenizer.load(str(text_model))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def in_one_process(text_model: Any, tokenizer: PromptTokenizer) -> dict[NodeId, list[int]]:
    """What each node keeps."""
    config = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=3)
    bias = GoldenCase.load("b_5c").bias
    model = HomerModel.from_pretrained(text_model, config=config, bias=bias)
    prefix, context, suffix = (torch.tensor(ids) for ids in tokenizer.prompt_ids(*ASK.values()))
    plan = model.plan(len(prefix), len(context), len(suffix))
    encoder = TreeEncoder(model.stack, plan, prefix, suffix, model.bias)
    done: dict[NodeId, NodeState] = {}
    kept: dict[NodeId, list[int]] = {}
    for node in plan.nodes:
        if node.is_leaf:
            ids = context[node.context_start : node.context_end]
            done[node.id] = encoder.run_subtree(node.id, ids)
        else:
            done[node.id] = encoder.merge(node.id, [done.pop(child) for child in node.children])
        kept[node.id] = done[node.id].context_indices.tolist()
    assert kept[plan.root.id] == model.compress(prefix, context, suffix).context_indices.tolist()
    return kept


def ask(service: HomerClient, **given: Any) -> pb.Summary:
    *_, summary = service.generate(sampling={"max_tokens": 2}, return_kept_indices=True, **given)
    assert isinstance(summary, pb.Summary)
    return summary


def kept_by_node(evidence: pb.Evidence) -> dict[NodeId, list[int]]:
    return {NodeId(node.height, node.index): [*chain(*kept_of(node))] for node in evidence.nodes}


def test_every_node_kept_what_it_keeps_in_one_process(
    service: HomerClient, in_one_process: dict[NodeId, list[int]]
) -> None:
    summary = ask(service, **ASK, return_evidence=True)
    evidence = summary.evidence
    assert kept_by_node(evidence) == in_one_process
    assert {node.worker for node in evidence.nodes} == set(summary.nodes_by_worker)
    by_height = Counter(node.height for node in in_one_process)
    assert dict(enumerate(level.nodes for level in evidence.levels)) == by_height
    assert evidence.levels[0].context_tokens_in == len(evidence.token_start_steps)
    assert evidence.levels[-1].context_tokens_out == len(summary.kept_context_indices)
    assert [level.layer_start for level in evidence.levels[1:]] == [
        level.layer_end for level in evidence.levels[:-1]
    ]


def test_passages_are_the_documents_text_where_their_tokens_are(
    service: HomerClient, tokenizer: PromptTokenizer
) -> None:
    summary = ask(service, **ASK, return_evidence=True)
    evidence = summary.evidence
    passages = [range(one.token_start, one.token_end) for one in evidence.passages]
    assert [*chain(*passages)] == list(summary.kept_context_indices)
    assert all(a.stop < b.start for a, b in pairwise(passages))
    ids = tokenizer.prompt_ids(*ASK.values()).context
    for passage in evidence.passages:
        assert passage.text == DOCUMENT[passage.char_start : passage.char_end]
        # Where a passage begins or ends within a character it has more than its tokens.
        own = tokenizer.decode(ids[passage.token_start : passage.token_end])
        assert own.strip("\N{REPLACEMENT CHARACTER}") in passage.text
    spans = tokenizer.context_spans(DOCUMENT)
    starts = [sum(evidence.token_start_steps[: n + 1]) for n in range(len(spans))]
    assert starts == [start for start, _ in spans]


def test_token_ids_have_indices_and_no_text(
    service: HomerClient, tokenizer: PromptTokenizer, in_one_process: dict[NodeId, list[int]]
) -> None:
    prompt: PromptIds = tokenizer.prompt_ids(*ASK.values())
    given = {"prefix": prompt.prefix, "context": prompt.context, "question": prompt.suffix}
    evidence = ask(service, **given, return_evidence=True).evidence
    assert kept_by_node(evidence) == in_one_process
    assert evidence.passages
    assert not any(passage.text or passage.char_end for passage in evidence.passages)
    assert not evidence.token_start_steps


def test_who_does_not_ask_gets_none(service: HomerClient) -> None:
    assert not ask(service, **ASK).HasField("evidence")
