"""What holds for every prompt: random lengths, affixes, chunk sizes, layer counts and cuts."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from homer import HomerConfig, HomerModel, MergePlan
from homer.config import ScoreKind
from homer.encode import TreeEncoder
from homer.errors import PlanError, StateError
from homer.stack import LayerStack
from tests.apart import assert_same_context, run_apart
from tests.homer.tiny import random_ids, tiny_llama


@dataclass(frozen=True)
class Prompt:
    """A model by its layers and KV heads, a prompt by its lengths, and the settings."""

    num_layers: int
    kv_heads: int
    lengths: tuple[int, int, int]
    config: HomerConfig

    @property
    def model(self) -> HomerModel:
        return HomerModel(tiny_llama(self.num_layers, self.kv_heads), self.config)

    @property
    def plan(self) -> MergePlan:
        return MergePlan.build(*self.lengths, self.num_layers, self.config)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        prefix, context, suffix = (random_ids(n, seed=i) for i, n in enumerate(self.lengths))
        return prefix, context, suffix


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    prefix_len, suffix_len = draw(st.integers(0, 9)), draw(st.integers(1, 9))
    affix_len = prefix_len + suffix_len
    num_layers = draw(st.integers(1, 8))
    config = HomerConfig(
        max_chunk_len=affix_len + draw(st.integers(2, 40)),
        target_len=affix_len + draw(st.integers(0, 60)),
        warmup_layers=draw(st.integers(0, num_layers - 1)),
        max_initial_chunk_len=draw(st.none() | st.integers(1, 40).map(lambda n: n + affix_len)),
        fan_in=draw(st.sampled_from([None, None, None, 2, 3, 4])),
        plan=draw(st.sampled_from(["balanced", "paper"])),
        refresh_suffix=draw(st.booleans()),
        score=draw(st.sampled_from(get_args(ScoreKind))),
    )
    context_len = draw(st.integers(1, 300))
    prompt = Prompt(
        num_layers, draw(st.sampled_from([1, 2, 4])), (prefix_len, context_len, suffix_len), config
    )
    try:
        assert prompt.plan
    except PlanError:
        assume(False)
    return prompt


@settings(max_examples=60)
@given(prompts())
def test_every_compressed_context_keeps_its_promises(prompt: Prompt) -> None:
    prefix_len, context_len, suffix_len = prompt.lengths
    plan, hm = prompt.plan, prompt.model
    context = hm.compress(*prompt.parts)

    kept = context.context_indices.tolist()
    assert kept == sorted(set(kept))
    assert all(0 <= index < context_len for index in kept)
    assert len(kept) == plan.root.context_out
    assert context.cache_len == prefix_len + len(kept) + suffix_len
    assert context.cache_len <= min(prompt.config.target_len, sum(prompt.lengths))

    positions = context.position_ids.tolist()
    assert positions[:prefix_len] == list(range(prefix_len))
    assert positions[-suffix_len:] == list(
        range(context.next_position - suffix_len, context.next_position)
    )
    spans = [range(leaf.context_start, leaf.context_end) for leaf in plan.leaves]
    for index, position in zip(kept, positions[prefix_len:], strict=False):
        (leaf,) = (span for span in spans if index in span)
        assert position == prefix_len + index - leaf.start
        assert prefix_len <= position < context.next_position - suffix_len

    assert len(context.layers) == prompt.num_layers
    for rows in (tensor for layer in context.layers for tensor in layer):
        assert rows.shape == (prompt.kv_heads, context.cache_len, 8)
        assert torch.isfinite(rows).all()
    assert torch.isfinite(context.logits).all()

    # The prefix sees only itself, so its rows are those that the plain model gives it alone.
    if prefix_len:
        with torch.inference_mode():
            alone = hm.model(prompt.parts[0][None], use_cache=True).past_key_values
        for (keys, values), layer in zip(context.layers, alone.layers, strict=True):
            torch.testing.assert_close(keys[:, :prefix_len], layer.keys[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(values[:, :prefix_len], layer.values[0], rtol=0, atol=1e-4)

    first = hm.generate(context, max_new_tokens=3)
    assert torch.equal(first, hm.generate(context, max_new_tokens=3))
    assert torch.equal(context.logits, hm.compress(*prompt.parts).logits)


@settings(max_examples=40)
@given(prompts(), st.randoms(use_true_random=False), st.integers(1, 4))
def test_any_cut_of_the_tree_over_any_workers_gives_the_same(
    prompt: Prompt, random: Random, workers: int
) -> None:
    """Subtrees run apart, children's KV stays where it was made, the root gathers the rest."""
    plan = prompt.plan
    whole = prompt.model.compress(*prompt.parts)
    homes = {node.id: random.randrange(workers) for node in plan.nodes}
    stacks = [LayerStack(tiny_llama(prompt.num_layers, prompt.kv_heads))] * workers
    cut = run_apart(stacks, plan, prompt.parts, homes)
    assert_same_context(cut, whole)


def test_rows_that_are_missing_or_there_twice_are_an_error() -> None:
    config = HomerConfig(max_chunk_len=32, target_len=32, warmup_layers=0)
    prompt = Prompt(4, 2, (2, 100, 3), config)
    for spoil, message in ((0, "hold 0|no KV rows"), (2, "do not match")):
        encoder = TreeEncoder(
            LayerStack(tiny_llama(4)), prompt.plan, prompt.parts[0], prompt.parts[2]
        )
        root = encoder.run_subtree(prompt.plan.root.id, prompt.parts[1])
        root.shards = root.shards * spoil
        with pytest.raises(StateError, match=message):
            encoder.finish(root)
