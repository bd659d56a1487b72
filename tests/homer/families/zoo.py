"""A tiny random model of each family, from its own config, saved and loaded as a user's would."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
LAYERS = 8
WINDOW = 24
_LOCAL, _WHOLE = "sliding_attention", "full_attention"
MIXED = [_LOCAL, _LOCAL, _WHOLE, _LOCAL, _WHOLE, _LOCAL, _LOCAL, _LOCAL]
"""Leaves and merges end in a local layer above one that sees everything; the root is all local."""

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "n_group": 2,
    "topk_group": 1,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 2,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_LONG = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.5]}
_LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 128}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "llama",
        {"rope_parameters": _rope("llama3", **_LLAMA3), "tie_word_embeddings": True},
    ),
    "llama-yarn": ("llama", {"rope_parameters": _rope("yarn", **_YARN)}),
    "llama-linear": ("llama", {"rope_parameters": _rope("linear", factor=4.0)}),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": _rope("dynamic", factor=4.0), "max_position_embeddings": 32},
    ),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "attention_chunk_size": 32,
            "floor_scale": 16,
            "attn_scale": 0.5,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 12}),
    "mixtral": ("mixtral", {"sliding_window": None, "output_router_logits": True, **_EXPERTS}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 4},
    ),
    "qwen2-moe": ("qwen2_moe", {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3-moe": (
        "qwen3_moe",
        {**_QWEN_EXPERTS, "head_dim": 12, "output_router_logits": True},
    ),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 12,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 12,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "query_pre_attn_scalar": 10,
            "rope_parameters": {
                "full_attention": _rope("linear", factor=8.0) | {"rope_theta": 1e6},
                "sliding_attention": _rope(),
            },
        },
    ),
    "phi": ("phi", {"rope_parameters": _rope(partial_rotary_factor=0.5), "qk_layernorm": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi4": (
        "phi3",
        {
            "rope_parameters": _rope("longrope", partial_rotary_factor=0.5, **_LONG),
            # Prompts of one length rotate by the short factors, others by the long ones.
            "original_max_position_embeddings": 50,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "gpt-neox": (
        "gpt_neox",
        {"rope_parameters": _rope(partial_rotary_factor=0.5), "num_key_value_heads": 4},
    ),
    "gpt-neox-serial": (
        "gpt_neox",
        {
            "rope_parameters": _rope(partial_rotary_factor=0.5),
            "num_key_value_heads": 4,
            "use_parallel_residual": False,
        },
    ),
    "stablelm": (
        "stablelm",
        {
            "rope_parameters": _rope(partial_rotary_factor=0.5),
            "qk_layernorm": True,
            "use_qkv_bias": True,
        },
    ),
    "stablelm-parallel": (
        "stablelm",
        {"rope_parameters": _rope(partial_rotary_factor=0.5), "use_parallel_residual": True},
    ),
    "granite": ("granite", _GRANITE),
    "granite-moe": ("granitemoe", {**_GRANITE, **_EXPERTS}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "cohere": ("cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        {"logit_scale": 0.5, "sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 8},
    ),
    "deepseek-v2": ("deepseek_v2", {**_LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek-v3": ("deepseek_v3", {**_LATENT, "norm_topk_prob": True}),
    "gpt-oss": (
        "gpt_oss",
        {
            **_EXPERTS,
            "head_dim": 12,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "rope_parameters": _rope("yarn", **_YARN, truncate=False),
        },
    ),
}


def save_adapter(name: str, folder: Path) -> Path:
    """A random LoRA adapter of a model, large enough to change its answers."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj", "o_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir(name))
    peft.get_peft_model(model, settings).save_pretrained(folder)
    return folder


@cache
def model_dir(name: str) -> Path:
    """A folder with the model's checkpoint."""
    model_type, settings = MODELS[name]
    return save_tiny(model_type, seed=list(MODELS).index(name), **settings)


def save_tiny(model_type: str, seed: int = 0, **settings: Any) -> Path:
    """A folder with a random model; the same arguments give the same weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, biases and sinks would be ones and zeros, which hide what is done with them.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = Path(tempfile.mkdtemp(prefix=f"homer-{model_type}-"))
    model.save_pretrained(folder)
    return folder


def load_plain(name: str, **options: Any) -> Any:
    """The model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(model_dir(name), **options).eval()


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prompt(prefix_len: int, context_len: int, suffix_len: int) -> Parts:
    """Random ids of a prefix, a context and a suffix; the same lengths give the same ids."""
    generator = torch.Generator().manual_seed(prefix_len + context_len)
    prefix, context, suffix = (
        torch.randint(0, VOCAB, (n,), generator=generator)
        for n in (prefix_len, context_len, suffix_len)
    )
    return prefix, context, suffix
