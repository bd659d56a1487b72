"""Several answers decoded together are those decoded alone."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from homer import HomerConfig, HomerModel
from homer.bench.bench_model import BenchSize
from homer.bench.decoding import measure_decode
from homer.context import CompressedContext
from homer.decode import DecodeCache, decode_step


def tiny_model() -> HomerModel:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    settings = HomerConfig(max_chunk_len=64, target_len=64, warmup_layers=2)
    return HomerModel(LlamaForCausalLM(config).eval(), settings)


def compress(homer: HomerModel, length: int) -> CompressedContext:
    prefix, context, suffix = (torch.randint(0, 120, (n,)) for n in (2, length, 5))
    return homer.compress(prefix, context, suffix)


def test_answers_that_join_and_leave_a_batch_are_those_decoded_alone() -> None:
    homer = tiny_model()
    contexts = [compress(homer, length) for length in (30, 200, 500, 900)]
    alone = [homer.generate(c, max_new_tokens=12, ignore_eos=True).tolist() for c in contexts]
    answers: list[list[int]] = [[int(context.logits.argmax())] for context in contexts]
    caches = [DecodeCache.copy_of(context, 12) for context in contexts]
    # Answer i joins at step 2i and leaves when it has 12 tokens.
    for step in range(30):
        active = [i for i in range(4) if step >= 2 * i and len(answers[i]) < 12]
        if not active:
            break
        logits = decode_step(
            homer.stack, [answers[i][-1] for i in active], [caches[i] for i in active]
        )
        for i, token in zip(active, logits.argmax(-1).tolist(), strict=True):
            answers[i].append(token)
    assert answers == alone
    assert [cache.length for cache in caches] == [c.cache_len + 11 for c in contexts]


def test_decoding_is_the_plain_model_over_the_same_cache() -> None:
    """The reference is transformers' own forward pass over the context as a cache."""
    homer = tiny_model()
    context = compress(homer, 400)
    tokens = homer.generate(context, max_new_tokens=10, ignore_eos=True).tolist()
    cache, by_hand = context.past_key_values, [int(context.logits.argmax())]
    with torch.no_grad():
        for position in range(context.next_position, context.next_position + 9):
            out = homer.model(
                input_ids=torch.tensor([[by_hand[-1]]]),
                position_ids=torch.tensor([[position]]),
                attention_mask=torch.ones(1, cache.get_seq_length() + 1, dtype=torch.int64),
                past_key_values=cache,
            )
            by_hand.append(int(out.logits[0, -1].argmax()))
    assert tokens == by_hand


def test_several_answers_cost_little_more_than_one() -> None:
    """The aim, three times the tokens per second, is measured on a quiet machine by `homer bench
    decode`; here, whatever else runs, they must not be decoded one after the other.
    """
    result = measure_decode(answers=8, tokens=12, runs=3, size=BenchSize(layers=6, warmup_layers=2))
    assert result.same_tokens
    assert len(set(result.cache_tokens)) > 1
    assert max(result.ratios) > 1.5
