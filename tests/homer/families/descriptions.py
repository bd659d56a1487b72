"""What lies between the per-token modules of each family: for `reference`, by `model_type`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor], Tensor]


@dataclass
class Description:
    """What lies between the per-token modules of a family."""

    projections: Callable[[Any, Tensor, Any], tuple[Tensor, Tensor, Tensor]]
    layer: Callable[[Any, Tensor, Attend, Any], Tensor]
    scale: Callable[[Any, int], float] = lambda config, head_dim: head_dim**-0.5
    pairs: str = "halves"
    attention: str = "self_attn"
    output: str = "o_proj"
    norm: str = "norm"
    softcap: str | None = None
    rotates: Callable[[Any, int], bool] = lambda config, layer: True
    after_rotation: Callable[[Any, Tensor, Any, int], Tensor] = lambda a, x, config, layer: x
    query_scale: Callable[[Any, int, int], float] = lambda config, layer, slot: 1.0
    latent: bool = False
    embed: Callable[[Any, Tensor], Tensor] = lambda config, x: x
    logits: Callable[[Any, Tensor], Tensor] = lambda config, x: x


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(len(x), count, -1).transpose(0, 1)


def split_projections(attention: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = config.num_key_value_heads
    return (
        heads(attention.q_proj(x), config.num_attention_heads),
        heads(attention.k_proj(x), kv_heads),
        heads(attention.v_proj(x), kv_heads),
    )


def normed_heads(q_norm: str, k_norm: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Queries and keys normalized head by head."""

    def project(attention: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = split_projections(attention, x, config)
        # Norms of each head's own weights want (tokens, heads, numbers); others do not mind.
        query = getattr(attention, q_norm)(query.transpose(0, 1)[None])[0].transpose(0, 1)
        key = getattr(attention, k_norm)(key.transpose(0, 1)[None])[0].transpose(0, 1)
        return query, key, value

    return project


def stablelm_projections(attention: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = split_projections(attention, x, config)
    if config.qk_layernorm:
        norms = (attention.q_layernorm.norms, attention.k_layernorm.norms)
        query = torch.stack([norm(head) for norm, head in zip(norms[0], query, strict=True)])
        key = torch.stack([norm(head) for norm, head in zip(norms[1], key, strict=True)])
    return query, key, value


def normed_projections(attention: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalized before they are cut into heads."""
    kv_heads = config.num_key_value_heads
    return (
        heads(attention.q_norm(attention.q_proj(x)), config.num_attention_heads),
        heads(attention.k_norm(attention.k_proj(x)), kv_heads),
        heads(attention.v_proj(x), kv_heads),
    )


def phi3_projections(attention: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = config.hidden_size // config.num_attention_heads
    counts = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    parts = attention.qkv_proj(x).split([count * head_dim for count in counts], dim=-1)
    query, key, value = (heads(part, count) for part, count in zip(parts, counts, strict=True))
    return query, key, value


def neox_projections(attention: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = heads(attention.query_key_value(x), config.num_attention_heads).chunk(
        3, dim=-1
    )
    return query, key, value


def latent_projections(attention: Any, x: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
    latent, turned = attention.kv_a_proj_with_mqa(x).split(
        [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
    )
    latent = attention.kv_a_layernorm(latent)
    return heads(query, config.num_attention_heads), latent[None], turned[None]


def mlp_of(layer: Any, x: Tensor) -> Tensor:
    names = ("mlp", "feed_forward", "block_sparse_moe")
    module = next(getattr(layer, name) for name in names if hasattr(layer, name))
    out = module(x[None])
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(x.shape)


def norm_first(layer: Any, x: Tensor, attend: Attend, config: Any) -> Tensor:
    share = getattr(config, "residual_multiplier", 1.0)
    x = x + attend(layer.input_layernorm(x)) * share
    return x + mlp_of(layer, layer.post_attention_layernorm(x)) * share


def norm_last(layer: Any, x: Tensor, attend: Attend, config: Any) -> Tensor:
    x = x + layer.post_attention_layernorm(attend(x))
    return x + layer.post_feedforward_layernorm(mlp_of(layer, x))


def norm_around(layer: Any, x: Tensor, attend: Attend, config: Any) -> Tensor:
    x = x + layer.post_attention_layernorm(attend(layer.input_layernorm(x)))
    return x + layer.post_feedforward_layernorm(mlp_of(layer, layer.pre_feedforward_layernorm(x)))


def one_norm_parallel(layer: Any, x: Tensor, attend: Attend, config: Any) -> Tensor:
    normed = layer.input_layernorm(x)
    return x + attend(normed) + mlp_of(layer, normed)


def neox_layer(layer: Any, x: Tensor, attend: Attend, config: Any) -> Tensor:
    if not config.use_parallel_residual:
        return norm_first(layer, x, attend, config)
    mlp = mlp_of(layer, layer.post_attention_layernorm(x))
    return x + attend(layer.input_layernorm(x)) + mlp


def stablelm_layer(layer: Any, x: Tensor, attend: Attend, config: Any) -> Tensor:
    kind = one_norm_parallel if config.use_parallel_residual else norm_first
    return kind(layer, x, attend, config)


def llama4_norm(attention: Any, x: Tensor, config: Any, layer: int) -> Tensor:
    if not config.no_rope_layers[layer]:
        return x
    return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def llama4_temperature(config: Any, layer: int, slot: int) -> float:
    if config.no_rope_layers[layer]:
        return 1.0
    return math.log1p((slot + 1) // config.floor_scale) * config.attn_scale + 1


def softcapped(config: Any, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def unrotated_layers(config: Any, layer: int) -> bool:
    return bool(config.no_rope_layers[layer])


LLAMA = Description(split_projections, norm_first)
COHERE: dict[str, Any] = {
    "layer": one_norm_parallel,
    "pairs": "neighbours",
    "logits": lambda config, x: x * config.logit_scale,
}
GEMMA: dict[str, Any] = {
    "layer": norm_around,
    "scale": lambda config, _: config.query_pre_attn_scalar**-0.5,
    "logits": softcapped,
}
GRANITE = Description(
    split_projections,
    norm_first,
    scale=lambda config, _: config.attention_multiplier,
    embed=lambda config, x: x * config.embedding_multiplier,
    logits=lambda config, x: x / config.logits_scaling,
)
NORMED_HEADS = normed_heads("q_norm", "k_norm")

DESCRIPTIONS: dict[str, Description] = {
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gpt_oss"], LLAMA
    ),
    **dict.fromkeys(["qwen3", "qwen3_moe"], Description(NORMED_HEADS, norm_first)),
    **dict.fromkeys(["olmo2", "olmo3"], Description(normed_projections, norm_last)),
    "cohere": Description(NORMED_HEADS, **COHERE),
    "cohere2": Description(
        split_projections,
        rotates=lambda config, layer: config.layer_types[layer] == "sliding_attention",
        **COHERE,
    ),
    "deepseek_v2": Description(latent_projections, norm_first, pairs="neighbours", latent=True),
    "deepseek_v3": Description(latent_projections, norm_first, pairs="split", latent=True),
    "gemma2": Description(split_projections, softcap="attn_logit_softcapping", **GEMMA),
    "gemma3_text": Description(NORMED_HEADS, **GEMMA),
    "gpt_neox": Description(
        neox_projections,
        neox_layer,
        attention="attention",
        output="dense",
        norm="final_layer_norm",
    ),
    **dict.fromkeys(["granite", "granitemoe"], GRANITE),
    "llama4_text": Description(
        split_projections,
        norm_first,
        pairs="neighbours",
        rotates=unrotated_layers,
        after_rotation=llama4_norm,
        query_scale=llama4_temperature,
    ),
    "phi": Description(
        normed_heads("q_layernorm", "k_layernorm"),
        one_norm_parallel,
        output="dense",
        norm="final_layernorm",
    ),
    "phi3": Description(phi3_projections, norm_first),
    "smollm3": Description(split_projections, norm_first, rotates=unrotated_layers),
    "stablelm": Description(stablelm_projections, stablelm_layer),
}
