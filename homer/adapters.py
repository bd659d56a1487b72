"""PEFT adapters (LoRA) of a model: beside its weights, or added to them.

Knows nothing about how a model is run.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError

from homer.errors import CheckpointError, ModelError
from homer.load_options import LoadOptions


def add_adapter(model: Any, options: LoadOptions) -> None:
    """Put the adapter that `options` name into `model`, a causal LM or its decoder.

    Raises
    ------
    ModelError
        When peft is missing, or the adapter cannot be read or is another model's.
    """
    name = str(options.adapter)
    if find_spec("peft") is None:
        raise ModelError(f"the adapter {name!r} needs the package peft; pip install peft")
    import peft

    holder = torch.nn.Module()
    if model.base_model is model:
        # A decoder alone: adapters name their weights from the causal LM on.
        setattr(holder, model.base_model_prefix, model)
    else:
        holder = model
    try:
        config = peft.PeftConfig.from_pretrained(name, **options.hub)
        # The kind of task only adds what PEFT's own generation needs.
        config.task_type = None
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(holder, name, config=config, **options.hub)
        if options.merge_adapter:
            adapted.merge_and_unload()
    except (
        OSError, ValueError, RuntimeError, TypeError, KeyError, UserWarning, SafetensorError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"the adapter {name!r} cannot be used with {type(model).__name__}: {error}; give a "
            "PEFT adapter that was made for this model"
        ) from error
