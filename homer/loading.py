"""Loading a checkpoint in Hugging Face format.

Knows nothing about trees or machines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from homer.errors import ConfigError, ModelError

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
        model: Any = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=dtype, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the model {str(path_or_id)!r}: {error}") from error
    if "device_map" not in kwargs:
        model = model.to(target)
    return model.eval()
