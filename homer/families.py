"""What differs between model families, all in one place.

Homer runs transformers' own layers, so what happens inside a layer (norms, biases, query and key
norms, partial rotation, layers without rotation, routing, parallel residuals, residual multipliers)
needs no word here. Here stands what a family's own code does *around* its layers, what its cache
holds, and which layers see only part of what is before them. Reads configs alone: imports neither
torch nor transformers.

Adding a family: docs/families.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from homer.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's code around its layers differs from Llama's.

    Parameters
    ----------
    norm : str
        Name of the decoder's last norm.
    cache_argument : str
        Name under which a layer takes the cache.
    per_token_modules : tuple of str
        Modules of a layer that work on each token alone and come after its attention; tokens that
        do not survive are left out there. One that is missing costs time and changes nothing.
    embedding_multiplier : str, optional
        Field of the config by which the decoder multiplies its embeddings.
    logits_multiplier, logits_divisor : str, optional
        Fields of the config by which logits are multiplied or divided.
    logits_softcap : str, optional
        Field of the config that bounds the logits, softly; it may be None.
    latent_cache : bool
        The cache holds a latent row and a rotated key per token, shared by all heads, which the
        layer expands to keys and values (multi-head latent attention).
    tested : bool
        In the test matrix. Others are held against their own forward pass when they are loaded.
    """

    norm: str = "norm"
    cache_argument: str = "past_key_values"
    per_token_modules: tuple[str, ...] = ("mlp",)
    embedding_multiplier: str | None = None
    logits_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    latent_cache: bool = False
    tested: bool = True


_LLAMA = Family()
_GRANITE = Family(embedding_multiplier="embedding_multiplier", logits_divisor="logits_scaling")
_LATENT = Family(latent_cache=True)

FAMILIES: dict[str, Family] = {
    "cohere": Family(logits_multiplier="logit_scale"),
    "cohere2": Family(logits_multiplier="logit_scale"),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gemma": _LLAMA,
    "gemma2": Family(logits_softcap="final_logit_softcapping"),
    "gemma3_text": Family(logits_softcap="final_logit_softcapping"),
    "gpt_neox": Family(norm="final_layer_norm", cache_argument="layer_past"),
    "gpt_oss": _LLAMA,
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, per_token_modules=("block_sparse_moe",)),
    "llama": _LLAMA,
    "llama4_text": Family(per_token_modules=("feed_forward",)),
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "phi": Family(norm="final_layernorm"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
}
"""The families of the test matrix, by `model_type`."""

_UNTESTED = Family(per_token_modules=(), tested=False)
_LOCAL_KINDS: dict[str, tuple[Literal["sliding", "chunked"], str]] = {
    "sliding_attention": ("sliding", "sliding_window"),
    "chunked_attention": ("chunked", "attention_chunk_size"),
}


def family_of(config: Any) -> Family:
    """The family of a decoder's (text) config; one that is not in the table is untested.

    Raises
    ------
    ModelError
        When the config says that Homer cannot be right, with the reason.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; Homer needs a decoder-only model")
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            f"{name} is set to attend in both directions (use_bidirectional_attention); Homer "
            f"needs causal attention"
        )
    if getattr(config, "rope_parameters", None) is None:
        raise ModelError(
            f"{name} has no rotary position embeddings; Homer needs them: positions start again in "
            f"every chunk"
        )
    for field in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        if _differs_by_layer(config, field):
            raise ModelError(f"{name} has layers that differ in {field}; Homer needs them alike")
    if kinds := sorted(set(_layer_types(config)) - {"full_attention", *_LOCAL_KINDS}):
        raise ModelError(
            f"{name} has layers of type {', '.join(kinds)}, whose state is no row per token; Homer "
            f"needs attention over keys and values in every layer"
        )
    return FAMILIES.get(name, _UNTESTED)


def _differs_by_layer(config: Any, field: str) -> bool:
    try:
        return isinstance(getattr(config, field, None), list | tuple)
    except Exception:  # transformers' own, which moves: the field is there, layer by layer
        return True


def _layer_types(config: Any) -> list[str]:
    """The kind of attention of each layer, where the config tells them apart."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"] * config.num_hidden_layers
    return ["full_attention"] * config.num_hidden_layers


def rotary_kinds(config: Any) -> list[str | None]:
    """For each layer, under which name its rotations are asked for; None where all are the same."""
    types = _layer_types(config)
    by_type = all(isinstance(config.rope_parameters.get(kind), dict) for kind in types)
    return [kind if by_type else None for kind in types]


def length_dependent(config: Any) -> bool:
    """Whether rotations depend on the prompt's length (dynamic NTK, LongRoPE)."""
    rope = config.rope_parameters
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


@dataclass(frozen=True)
class Window:
    """What a local layer sees: the last `size` positions, or those of the same block of `size`.

    Windows are counted in positions, not in slots of the cache. Positions start again in every
    chunk, so at a merge each token sees of every child what it would see of its own chunk, and the
    last child has no advantage; and no layer meets a rotation longer than those that it was trained
    on. Where nothing was merged, positions are slots, and this is the model's own window.
    """

    kind: Literal["sliding", "chunked"]
    size: int

    def sees(self, query: Any, key: Any) -> Any:
        """Whether queries at these positions see keys at those; tensors broadcast, ints too."""
        if self.kind == "sliding":
            return abs(query - key) < self.size
        return query // self.size == key // self.size

    def sees_all(self, end: int) -> bool:
        """Whether no position before `end` is hidden from another."""
        return end <= self.size


def layer_windows(config: Any) -> list[Window | None]:
    """The window of each layer; None for layers that see everything before them."""
    windows: list[Window | None] = []
    for layer_type in _layer_types(config):
        kind, field = _LOCAL_KINDS.get(layer_type, (None, ""))
        size = getattr(config, field, None) if kind else None
        windows.append(Window(kind, size) if kind and size else None)
    return windows


@dataclass(frozen=True)
class CacheRow:
    """What the cache holds for one token in one layer: a key and a value, as (heads, numbers)."""

    key: tuple[int, int]
    value: tuple[int, int]

    @property
    def numbers(self) -> int:
        """How many numbers that is."""
        return self.key[0] * self.key[1] + self.value[0] * self.value[1]

    def shapes(self, rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of the keys and the values of so many rows, as (heads, rows, numbers)."""
        return (self.key[0], rows, self.key[1]), (self.value[0], rows, self.value[1])


def cache_row(config: Any, family: Family) -> CacheRow:
    """The rows of a model's cache, the same in every layer."""
    if family.latent_cache:
        return CacheRow((1, config.kv_lora_rank), (1, config.qk_rope_head_dim))
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CacheRow((kv_heads, head_dim), (kv_heads, head_dim))


def active_mlp_width(config: Any) -> int:
    """Width of the MLP that one token goes through, experts summed; an estimate, for costs."""
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if not any(getattr(config, name, None) for name in experts):
        return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = width * (getattr(config, "n_shared_experts", None) or 0)
    shared += getattr(config, "shared_expert_intermediate_size", None) or 0
    return int(width * (config.num_experts_per_tok or 1) + shared)


def _main_rope(config: Any) -> dict[str, Any]:
    rope: dict[str, Any] = config.rope_parameters
    return rope if "rope_type" in rope else rope.get("full_attention") or next(iter(rope.values()))


def usable_window(config: Any) -> int:
    """How many positions the model tells apart, scaling included.

    `max_position_embeddings` is what a model was trained on, scaling included, but for dynamic NTK,
    where transformers scales beyond it. Where the length before scaling is given as well, the
    window reaches at least that many times the factor. A model whose layers are all local sees no
    farther than they do.
    """
    window: int = config.max_position_embeddings
    rope = _main_rope(config)
    factor = rope.get("factor") or 1
    if rope["rope_type"] == "dynamic":
        window = int(window * factor)
    elif rope["rope_type"] != "longrope":
        window = max(window, int((rope.get("original_max_position_embeddings") or 0) * factor))
    local = [layer.size for layer in layer_windows(config) if layer is not None]
    return min(window, max(local)) if len(local) == config.num_hidden_layers else window


def describe_window(config: Any) -> str:
    """Where the usable window comes from."""
    window, stated = usable_window(config), config.max_position_embeddings
    rope = _main_rope(config)
    scaling = rope["rope_type"]
    if window < stated:
        return f"all layers are local; max_position_embeddings is {stated:,}"
    if window > stated:
        before = stated
        if scaling != "dynamic":
            before = rope["original_max_position_embeddings"]
        return f"{before:,} scaled by {rope['factor']:g} ({scaling})"
    included = "" if scaling == "default" else f", {scaling} scaling included"
    return f"max_position_embeddings{included}"
