"""What another rank holds follows what rank 0 holds, and goes with it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import distributed

from homer import HomerConfig, MergePlan
from homer.load_options import LoadOptions
from homer.loading import LoadReport
from homer.stack import LayerStack
from homer.state import KVShard
from tests.homer.families.zoo import prompt
from tests.homer.tiny import tiny_llama
from tests.workers.processes import Prompt, eventually
from workers.engine import LoadedModel
from workers.follower import Follower
from workers.options import WorkerOptions
from workers.ranked_model import RankedCache, RankedModel, key_of
from workers.ranks import RankGroup

REPORT = LoadReport(0.0, 0, 0)


class Tellers(RankGroup):
    """A group whose other rank is in this process: it hears everything as it would on its pipe."""

    follower: Follower

    def tell(self, operation: str, **arguments: Any) -> None:
        self.follower.do(operation, **json.loads(json.dumps(arguments)))


@pytest.fixture
def group() -> Iterator[Tellers]:
    made = Tellers(
        WorkerOptions(model="", load=LoadOptions(device="cpu"), engine="deepspeed-zero3")
    )
    yield made
    made.close()
    distributed.destroy_process_group()


def test_a_follower_has_what_rank_0_has_and_nothing_else(group: Tellers) -> None:
    # Both have all heads here, so that what they have is the same.
    here, there = (LoadedModel("", LayerStack(tiny_llama(6)), None, REPORT) for _ in range(2))
    group.follower = Follower(there)
    model = RankedModel("", here.stack, None, REPORT, group)
    config = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)
    parts = [part % 64 for part in prompt(3, 150, 5)]
    plan = MergePlan.build(3, 150, 5, 6, config)
    spec = Prompt.of("one", plan, [part[None] for part in parts]).spec
    encoder = model.encoder(spec, plan, parts[0], parts[2])
    held = group.follower._held

    states = {}
    for node in plan.nodes:
        if node.is_leaf:
            span = parts[1][node.context_start : node.context_end]
            states[node.id] = encoder.run_subtree(node.id, span)
        else:
            children = [states.pop(child) for child in node.children]
            whole = [shard.copy() for child in children for shard in child.shards]
            states[node.id] = encoder.merge(node.id, children)
            # As a worker does with what it kept of the children.
            for shard in whole:
                assert shard.elsewhere is not None
                shard.elsewhere.select(states[node.id].context_indices)
                shard.select_(states[node.id].context_indices)
                _assert_same(shard, held[key_of(shard.elsewhere)])
            del children, whole, shard
    root = states.pop(plan.root.id)
    for shard in root.shards:
        _assert_same(shard, held[key_of(shard.elsewhere)])
    _, rows = model._collect_rows(root.shards, root.context_indices)
    assert rows
    context = encoder.finish(replace(root, shards=root.shards), room_tokens=4)
    cache = model.decode_cache(context, 4)
    assert isinstance(cache, RankedCache)
    logits = model.decode([7], [cache])
    assert logits.shape == (1, 64)
    theirs = held[cache.handle.key]
    assert theirs.length == cache.length == context.cache_len + 1
    for mine, other in zip(cache.buffers, theirs.buffers, strict=True):
        assert torch.equal(mine[0][:, : cache.length], other[0][:, : cache.length])

    del states, root, shard, rows, context, cache, encoder, theirs, mine, other
    # At once, that is, and not when the garbage collector comes by.
    gc.disable()
    try:
        eventually(lambda: not held)
    finally:
        gc.enable()


def _assert_same(here: KVShard, there: KVShard) -> None:
    assert torch.equal(here.context_indices, there.context_indices)
    for mine, theirs in zip(here.keys + here.values, there.keys + there.values, strict=True):
        assert torch.equal(mine, theirs)
