"""A model's dimensions and recommended settings, from the files beside its weights.

Reads JSON alone: imports neither torch nor transformers. Knows nothing about trees or machines.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homer.config import HomerConfig
from homer.errors import ConfigError, ModelError

DEFAULTS_FILE = "homer.json"
BIAS_FILE = "bias.safetensors"
_VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What costs depend on. The defaults are those of Llama-2-7B in half precision.

    `value_bytes` is the size of one number of the KV cache.
    """

    num_layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 32000
    window: int = 4096
    value_bytes: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(
                    f"{field.name} is {getattr(self, field.name)}; set it to 1 or more"
                )

    @classmethod
    def load(cls, path_or_id: str | Path) -> ModelShape:
        """Read the dimensions of a checkpoint in Hugging Face format; its weights are not touched.

        Raises
        ------
        ModelError
            When there is no config, or it lacks a dimension.
        """
        config = _read_config(path_or_id)
        try:
            heads = config["num_attention_heads"]
            dtype = config.get("dtype") or config.get("torch_dtype")
            return cls(
                num_layers=config["num_hidden_layers"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocab_size=config["vocab_size"],
                window=config["max_position_embeddings"],
                value_bytes=_VALUE_BYTES.get(str(dtype), 4),
            )
        except KeyError as error:
            raise ModelError(
                f"the config of {str(path_or_id)!r} has no {error}; give the dimensions instead"
            ) from error

    def recommended_config(self, **given: Any) -> HomerConfig:
        """Half of the window and 3/8 of the layers, but for what is `given`."""
        half = self.window // 2
        derived = {
            "max_chunk_len": half,
            "target_len": half,
            "warmup_layers": self.num_layers * 3 // 8,
        }
        return HomerConfig(**{**derived, **given})

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.value_bytes


def homer_defaults(path_or_id: str | Path, **overrides: Any) -> HomerConfig:
    """The settings for a model: `homer.json` beside it, else derived from its dimensions.

    `overrides` that are None are left out.

    Raises
    ------
    ModelError
        When the model's config cannot be read.
    ConfigError
        When `homer.json` has unknown or wrong settings.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    file = Path(path_or_id) / DEFAULTS_FILE
    if not file.is_file():
        return ModelShape.load(path_or_id).recommended_config(**given)
    settings = _read_json(file)
    known = {field.name for field in dataclasses.fields(HomerConfig)}
    if unknown := settings.keys() - known:
        raise ConfigError(
            f"{file} has unknown settings {sorted(unknown)}; known are {sorted(known)}"
        )
    return HomerConfig(**{**settings, **given})


def _read_config(path_or_id: str | Path) -> dict[str, Any]:
    file = Path(path_or_id) / "config.json"
    if file.is_file():
        return _read_json(file)
    if Path(path_or_id).is_dir():
        raise ModelError(
            f"{str(path_or_id)!r} has no config.json; give a Hugging Face model folder"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return _read_json(Path(hf_hub_download(str(path_or_id), "config.json")))
    except (OSError, HFValidationError) as error:
        raise ModelError(
            f"{str(path_or_id)!r} is no folder, and its config cannot be fetched: {error}"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds {type(value).__name__}, not an object of settings")
    return value
