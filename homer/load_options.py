"""How a model is loaded: what goes to transformers' `from_pretrained`, in one place.

Workers carry it, command lines take their options from it. Knows nothing about torch, so that
a command line need not wait for it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from homer.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")
FLASH_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
"""What each kind of flash attention needs installed, by transformers' names."""
ATTENTIONS = ("auto", "sdpa", "eager", *FLASH_PACKAGES)
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TOKEN_VARIABLE = "HF_TOKEN"
TOKEN_FILE_HELP = f"file with the hub's access token; by default {TOKEN_VARIABLE} says it"
LOAD_HELP = {
    "device": "where it computes: auto, cpu or cuda:N",
    "dtype": f"type of the weights: {', '.join(DTYPES)}; auto: the checkpoint's own",
    "revision": "branch, tag or commit of a model id",
    "local_files_only": "ask no hub: all files must be on this machine",
    "attention": f"attention implementation: {', '.join(ATTENTIONS)}; auto: torch's own, sdpa",
    "quantization": "quantize while loading: a name like torchao-int8, or a config as JSON",
    "adapter": "PEFT adapter (LoRA) for the model: folder or id",
    "merge_adapter": "add the adapter to the weights; else it stays beside them",
    "device_map": f"spread layers over devices: {', '.join(DEVICE_MAPS)}, or a map as JSON",
    "max_memory": 'what a device map may take, as JSON: {"0": "20GiB", "cpu": "60GiB"}',
    "offload_folder": "folder for weights that fit nowhere else, on a fast disk",
}
"""What command lines say of the fields that users set."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    Parameters
    ----------
    device : str
        "auto" is the first GPU where there is one, else the CPU.
    dtype : str
        "auto" is the checkpoint's own type; or float32, float16, bfloat16.
    revision : str, optional
        Branch, tag or commit of a model id.
    token : str, optional
        Access token of the Hugging Face hub; by default the one of HF_TOKEN, or the one that the
        hub's own login left. It is in no repr.
    local_files_only : bool
        Ask no hub: what is not on this machine is an error.
    attention : str
        "auto" and "sdpa" are torch's own attention, with its flash kernels on a GPU;
        "flash_attention_2", "_3" and "_4" are the packages of that name, on a GPU in half
        precision; "eager" is the family's plain one, which only matters where the model runs
        outside of Homer.
    quantization : str, optional
        Quantize while loading: a name of `homer.quantization.QUANTIZATIONS`, or transformers'
        quantization config as JSON. A checkpoint that is quantized says so itself.
    adapter : str, optional
        A PEFT adapter (LoRA) for the model: a folder or an id.
    merge_adapter : bool
        Add the adapter to the weights, which costs nothing later; else it stays beside them.
    device_map : str, optional
        Where layers are, as accelerate has it: "auto" (or another of `DEVICE_MAPS`) fills the GPUs
        that there are, then main memory, then the disk; or a map of modules to devices as JSON.
        Weights that lie outside of a GPU are brought in when their layer runs.
    max_memory : str, optional
        What weights may take of each device, by its number or "cpu", as JSON.
    offload_folder : str, optional
        Where weights go that "disk" is the place for.
    lower_layers : int, optional
        Load the embeddings and so many of the lowest layers, and nothing above: enough to run
        leaves.
    """

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    local_files_only: bool = False
    attention: str = "auto"
    quantization: str | None = None
    adapter: str | None = None
    merge_adapter: bool = False
    device_map: str | None = None
    max_memory: str | None = None
    offload_folder: str | None = None
    lower_layers: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("attention", ATTENTIONS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; use {', '.join(known)}")
        if self.merge_adapter and self.adapter is None:
            raise ConfigError("merge_adapter is set, but there is no adapter; name one")
        if self.lower_layers is not None and self.lower_layers < 1:
            raise ConfigError(f"lower_layers is {self.lower_layers}; use 1 or more")
        self._check_placement()

    def _check_placement(self) -> None:
        if self.device_map is None:
            for name in ("max_memory", "offload_folder"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is set, but there is no device_map; use auto")
            return
        if self.device not in ("auto", "cpu"):
            raise ConfigError(
                f"device is {self.device!r}, but device_map says where layers are; leave device at "
                "auto, or use cpu for no GPU"
            )
        if self.adapter is not None:
            raise ConfigError(
                f"the adapter {self.adapter!r} cannot be put into layers that a device_map has "
                "spread; merge it into a checkpoint of its own (peft's merge_and_unload) and load "
                "that"
            )
        if isinstance(self.placement, dict):
            if self.max_memory is not None:
                raise ConfigError("max_memory goes with device_map auto, not with a map of modules")
            if self.lower_layers is not None:
                self.check_lower_layers()
        elif self.placement not in DEVICE_MAPS:
            raise ConfigError(
                f"device_map is {self.device_map!r}; use one of {', '.join(DEVICE_MAPS)}, or a map "
                'as JSON, like {"model.embed_tokens": 0, "model.layers.0": "disk"}'
            )
        self.memory_limits  # noqa: B018

    def check_lower_layers(self) -> None:
        """Refuse a map of modules, where only the lowest layers are loaded.

        Raises
        ------
        ConfigError
            What to use.
        """
        if isinstance(self.placement, dict):
            raise ConfigError(
                "a leaf worker has only the lowest layers, for which a map of all modules does not "
                f"fit; use device_map {' or '.join(DEVICE_MAPS)}"
            )

    @classmethod
    def of(cls, options: LoadOptions | None, given: Mapping[str, Any]) -> LoadOptions:
        """`options`, or the defaults, with the fields of `given` in their place.

        Maps of devices and of memory may be given as such.
        """
        texts: dict[str, Any] = {
            name: json.dumps(value, default=str) if isinstance(value, Mapping) else value
            for name, value in given.items()
        }
        return dataclasses.replace(options or cls(), **texts)

    @property
    def placement(self) -> dict[str, int | str] | str | None:
        """`device_map` as accelerate takes it: a map of modules, or how to make one."""
        if self.device_map is None or not self.device_map.lstrip().startswith("{"):
            return self.device_map
        return _read_map("device_map", self.device_map)

    @property
    def memory_limits(self) -> dict[int | str, int | str] | None:
        """`max_memory` as accelerate takes it: GPUs by their numbers."""
        if self.max_memory is None:
            return None
        limits = _read_map("max_memory", self.max_memory)
        return {int(name) if name.isdigit() else name: limit for name, limit in limits.items()}

    @property
    def hub(self) -> dict[str, Any]:
        """What says where files come from, for any `from_pretrained`; only what is set."""
        places = {
            "revision": self.revision,
            "token": self.token,
            "local_files_only": self.local_files_only,
        }
        return {name: value for name, value in places.items() if value}


def _read_map(name: str, text: str) -> dict[str, int | str]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, which is no JSON: {error}") from error
    if not isinstance(read, dict) or not all(type(value) in (int, str) for value in read.values()):
        raise ConfigError(
            f"{name} is {text!r}; write an object of numbers and texts as JSON, like "
            '{"0": "20GiB", "cpu": "60GiB"}'
        )
    return read


def read_token(file: str | Path | None) -> str | None:
    """The hub's access token from `file`, else from HF_TOKEN, else None.

    It never comes from a command line, which every user of a machine can read.

    Raises
    ------
    ConfigError
        When the file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token file {file}: {error}") from error
    if not token:
        raise ConfigError(f"the token file {file} is empty; write the hub's access token into it")
    return token
