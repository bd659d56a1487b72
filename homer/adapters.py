"""PEFT adapters (LoRA) of a model: beside its weights, or added to them.

Weights may be in parts on several ranks. Knows nothing about how a model is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

from homer.errors import CheckpointError, ModelError
from homer.load_options import LoadOptions


def add_adapter(model: Any, options: LoadOptions) -> None:
    """Put the adapter that `options` name into `model`, a causal LM or its decoder.

    Raises
    ------
    ModelError
        When peft is missing, or the adapter cannot be fetched.
    CheckpointError
        When the adapter cannot be read, or is another model's.
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
    folder = _fetch(name, options)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        # The kind of task only adds what PEFT's own generation needs.
        config.task_type = None
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            if not options.merge_adapter:
                # It would go on with layers that are split, and an adapter of them that is not.
                warnings.filterwarnings("error", "TP plan")
            adapted = peft.PeftModel.from_pretrained(holder, folder, config=config)
        if options.merge_adapter:
            if any(map(_is_part, model.parameters())):
                _merge_into_parts(adapted)
            adapted.merge_and_unload()
    except (
        OSError, ValueError, RuntimeError, TypeError, KeyError, UserWarning, SafetensorError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"the adapter {name!r} cannot be used with {type(model).__name__}: {error}; give a "
            "PEFT adapter that was made for this model"
        ) from error


def _fetch(name: str, options: LoadOptions) -> str:
    """The folder of an adapter, its own or that of the hub's cache.

    Not by PEFT, which asks the hub for weights even where only local files are to be used.
    """
    if Path(name).is_dir():
        return name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    # The revision of the options is the model's.
    hub = {place: value for place, value in options.hub.items() if place != "revision"}
    try:
        config = hf_hub_download(name, "adapter_config.json", **hub)
        try:
            hf_hub_download(name, "adapter_model.safetensors", **hub)
        except EntryNotFoundError:
            hf_hub_download(name, "adapter_model.bin", **hub)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the adapter {name!r} is no folder, and cannot be fetched: {error}"
        ) from error
    return str(Path(config).parent)


def _is_part(weight: torch.Tensor) -> bool:
    """Whether a weight is a part of one, by transformers' tensor parallelism or ZeRO-3."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


def _merge_into_parts(adapted: Any) -> None:
    """Merge layer by layer, each put together for that; PEFT itself adds to whole weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            with _put_together(layer):
                layer.merge()


@contextmanager
def _put_together(layer: Any) -> Iterator[None]:
    """Inside, the weights of an adapted layer are whole; the base's is in parts again behind."""
    base = layer.get_base_layer()
    part = base.weight
    if hasattr(part, "ds_id"):
        import deepspeed

        # Rank 0's is what all get; they have done the same.
        with deepspeed.zero.GatheredParameters([part], modifier_rank=0):
            yield
        return
    for module in layer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                setattr(module, name, _frozen(weight.full_tensor()))
    yield
    if isinstance(part, DTensor):
        whole = base.weight.data
        base.weight = _frozen(distribute_tensor(whole, part.device_mesh, part.placements))


def _frozen(weight: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.detach(), requires_grad=False)
