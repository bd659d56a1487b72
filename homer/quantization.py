"""Quantized weights: what is quantized while a model is loaded, and which library each way needs.

A checkpoint that is quantized already says so in its config, and transformers does the rest. Knows
nothing about layers.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from homer.errors import ConfigError, ModelError

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "bitsandbytes-8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bitsandbytes-4bit": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
    "fp8": {"quant_method": "fp8"},
    "torchao-int8": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"},
    "torchao-int4": {"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig"},
    "torchao-fp8": {"quant_method": "torchao", "quant_type": "Float8WeightOnlyConfig"},
}
"""Weights of a plain checkpoint, quantized while it is loaded, by name."""

_LIBRARIES = {
    # Of each method: the module that has to be there, and what installs it.
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu-genai"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "torchao": ("torchao", "torchao"),
}


def quantization_for(config: Any, wanted: str | None) -> Any:
    """What `from_pretrained` is to be told: a quantization config, or None to leave it be.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        The checkpoint's.
    wanted : str, optional
        As `LoadOptions.quantization` says.

    Raises
    ------
    ConfigError
        When `wanted` is no name and no JSON that transformers understands, or the checkpoint is
        quantized in another way.
    ModelError
        When a library is missing, with what to install.
    """
    own = own_method(config)
    if wanted is None:
        _need_library(own)
        return None
    settings = _read(wanted)
    method = _method(settings)
    if own is not None and own != method:
        raise ConfigError(
            f"the checkpoint is quantized already ({own}), it cannot be loaded as {method}; leave "
            "quantization out, or take the checkpoint that is not quantized"
        )
    _need_library(method)
    return _build(settings)


def method_of(wanted: str) -> str | None:
    """The method that `LoadOptions.quantization` names.

    Raises
    ------
    ConfigError
        When it is no name and no JSON that transformers understands.
    """
    return _method(_read(wanted))


def own_method(config: Any) -> str | None:
    """The method by which a checkpoint is quantized, by its config; None where it is not."""
    return _method(getattr(config, "quantization_config", None))


def _read(wanted: str) -> dict[str, Any]:
    if wanted in QUANTIZATIONS:
        return QUANTIZATIONS[wanted]
    try:
        settings = json.loads(wanted)
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not _method(settings):
        raise ConfigError(
            f"quantization is {wanted!r}; use one of {', '.join(QUANTIZATIONS)}, or transformers' "
            'quantization config as JSON, like {"quant_method": "bitsandbytes", "load_in_4bit": '
            "true}"
        )
    return settings


def _build(settings: dict[str, Any]) -> Any:
    settings = dict(settings)
    kind = settings.get("quant_type")
    # Here, because this imports every library of the kind that is installed.
    import transformers
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        if settings.get("quant_method") == "torchao" and isinstance(kind, str):
            import torchao.quantization

            # Transformers wants the object; its own JSON form is that of a saved checkpoint.
            arguments = settings.pop("quant_type_kwargs", {})
            settings["quant_type"] = getattr(torchao.quantization, kind)(**arguments)
            del settings["quant_method"]
            return transformers.TorchAoConfig(**settings)
        return AutoQuantizationConfig.from_dict(settings)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"quantization {settings} is not usable: {error}") from error


def _method(settings: Any) -> str | None:
    """The method's name, from a quantization config or what a config file says of one."""
    if settings is None:
        return None
    given = settings if isinstance(settings, dict) else settings.to_dict()
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        return "bitsandbytes"
    return None if method is None else str(getattr(method, "value", method)).lower()


def _need_library(method: str | None) -> None:
    module, package = _LIBRARIES.get(method or "", ("", ""))
    if not module:
        return
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ModelError(
            f"weights quantized by {method} need the package {package}, which is not installed; "
            f"pip install {package}"
        )
