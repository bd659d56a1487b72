"""A tiny random Llama with the demo tokenizer, in a folder, as a user would have a model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from homer.demo.tokenizer import make_tokenizer

WINDOW = 192


def save_demo_llama(folder: Path) -> None:
    """Four layers, a window of 192 tokens: its answers are noise, but always the same."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
