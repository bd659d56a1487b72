"""Configs that need no transformers to be read, which takes seconds to import.

Only where a file says everything that a shape depends on, in families whose configs mean what they
say; all else is left to transformers, which knows what a family's config leaves out.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Besides, by family: what must be there and what it must be; None stands for null.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
}
_HAS_OWN_HEAD_DIM = ("qwen3",)
_MISSING = object()


def plain_config(values: dict[str, Any]) -> SimpleNamespace | None:
    """A config file's `values` as `homer.shape` wants them; None where transformers must read."""
    family = values.get("model_type")
    if family not in _FAMILIES or "auto_map" in values:
        return None
    numbers = [values.get(name) for name in _NEEDED]
    if family in _HAS_OWN_HEAD_DIM:
        numbers.append(values.get("head_dim"))
    if not all(type(number) is int for number in numbers):
        return None
    if any(values.get(k, _MISSING) is not value for k, value in _FAMILIES[family].items()):
        return None
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        return None
    rope = values.get("rope_parameters") or {}
    if values.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        return None
    return SimpleNamespace(
        **{name: values[name] for name in _NEEDED},
        model_type=family,
        head_dim=values.get("head_dim"),
        dtype=values.get("dtype") or values.get("torch_dtype"),
        rope_parameters={"rope_type": "default"},
    )
