"""The model that speed and memory are measured on: 12 layers of random weights, from a seed.

Its answers mean nothing; its work is that of a real model of its size. Knows nothing about what is
measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from homer.config import HomerConfig, PlanKind

PREFIX_TOKENS = 16
SUFFIX_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class BenchSize:
    """Dimensions of the bench model, and the settings that it is measured with."""

    layers: int = 12
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    vocab: int = 4096
    chunk: int = 512
    warmup_layers: int = 4
    plan: PlanKind = "balanced"

    @property
    def window(self) -> int:
        """Twice the chunk, as is usual."""
        return 2 * self.chunk

    @property
    def config(self) -> HomerConfig:
        """The default method, on this plan."""
        return HomerConfig(
            max_chunk_len=self.chunk,
            target_len=self.chunk,
            warmup_layers=self.warmup_layers,
            plan=self.plan,
        )

    @property
    def paper_config(self) -> HomerConfig:
        """The authors' method."""
        return HomerConfig.paper(
            max_chunk_len=self.chunk, target_len=self.chunk, warmup_layers=self.warmup_layers
        )


def save_bench_model(folder: Path, size: BenchSize, seed: int = 0) -> None:
    """Write the model in Hugging Face format, so that measurements load it as users load theirs."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.window,
    )
    model = LlamaForCausalLM(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)
    # The model's own `save_pretrained` imports DeepSpeed where that is installed, and prints a bar.
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def random_prompt(
    tokens: int, vocab: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefix, context and suffix ids, `tokens` in all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (tokens,), generator=generator)
    return ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS:-SUFFIX_TOKENS], ids[-SUFFIX_TOKENS:]
