"""Small random Llamas, made in memory."""

from __future__ import annotations

from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 64


@cache
def tiny_llama(num_layers: int, kv_heads: int = 2, hidden_size: int = 32) -> LlamaForCausalLM:
    """A random Llama of four heads; the same numbers give the same model."""
    torch.manual_seed(num_layers * 10 + kv_heads)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def random_ids(length: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Token ids of shape (length,)."""
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed))
