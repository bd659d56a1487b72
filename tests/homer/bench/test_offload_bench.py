"""What is measured of weights on disk is what the plan says has to be brought in."""

from __future__ import annotations

from homer import MergePlan
from homer.bench.bench_model import PREFIX_TOKENS, SUFFIX_TOKENS, BenchSize
from homer.bench.offload import measure_offload

SIZE = BenchSize(
    layers=8, hidden=64, intermediate=128, heads=2, vocab=64, chunk=256, warmup_layers=2
)
TOKENS = 1500


def test_each_layer_is_brought_in_once_for_each_batch() -> None:
    alone, pairs, together = measure_offload(TOKENS, [1, 2, 0], rounds=1, size=SIZE)
    context = TOKENS - PREFIX_TOKENS - SUFFIX_TOKENS
    plan = MergePlan.build(PREFIX_TOKENS, context, SUFFIX_TOKENS, SIZE.layers, SIZE.config)
    assert alone.leaves == pairs.leaves == together.leaves == len(plan.leaves) > 4
    hidden = SIZE.hidden
    layer_bytes = 4 * (4 * hidden**2 + 3 * hidden * SIZE.intermediate + 2 * hidden)
    layers_run = sum(node.layer_end - node.layer_start for node in plan.nodes)
    # Prefix and question run all layers once more.
    assert alone.moved_bytes == (layers_run + 2 * SIZE.layers) * layer_bytes
    assert together.moved_bytes == 3 * SIZE.layers * layer_bytes
    assert together.moved_bytes < pairs.moved_bytes < alone.moved_bytes
    assert alone.same
    assert pairs.same
    assert together.same
    assert min(alone.seconds, alone.seconds_in_memory) > 0
