"""Loading a checkpoint in Hugging Face format, and the settings that go with it.

Knows nothing about trees or machines.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from homer.config import HomerConfig
from homer.errors import ConfigError, ModelError

DEFAULTS_FILE = "homer.json"
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def load_model(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    **kwargs: Any,
) -> Any:
    """Load a causal LM for inference.

    Parameters
    ----------
    path_or_id : str or Path
        A folder in Hugging Face format, or a model id.
    device : str
        "auto" is the first GPU where there is one, else the CPU.
    dtype : str or torch.dtype
        "auto" is the checkpoint's own type; or float32, float16, bfloat16.
    **kwargs
        Passed on to `from_pretrained`.

    Raises
    ------
    ModelError
        When the checkpoint cannot be loaded.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; use auto, {', '.join(_DTYPES)}")
        dtype = _DTYPES[dtype]
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=dtype, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load the model {str(path_or_id)!r}: {error}") from error
    if "device_map" not in kwargs:
        model = model.to(target)
    return model.eval()


def homer_defaults(path_or_id: str | Path, **overrides: Any) -> HomerConfig:
    """The settings for a model: `homer.json` beside it, else half of its window and 3/8 of its layers.

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
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(HomerConfig)}
        if unknown := settings.keys() - known:
            raise ConfigError(
                f"{file} has unknown settings {sorted(unknown)}; known are {sorted(known)}"
            )
        return HomerConfig(**{**settings, **given})
    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the config of {str(path_or_id)!r}: {error}") from error
    half = config.max_position_embeddings // 2
    derived = {
        "max_chunk_len": half,
        "target_len": half,
        "warmup_layers": config.num_hidden_layers * 3 // 8,
    }
    return HomerConfig(**{**derived, **given})
