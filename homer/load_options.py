"""How a model is loaded: what goes to transformers' `from_pretrained`, in one place.

Workers carry it, command lines take their options from it. Knows nothing about torch, so that
a command line need not wait for it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from homer.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")
ATTENTIONS = ("auto", "sdpa", "eager")
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
        "auto" and "sdpa" are torch's own attention, with its flash kernels on a GPU; "eager" is
        the family's plain one, which only matters where the model runs outside of Homer.
    quantization : str, optional
        Quantize while loading: a name of `homer.quantization.QUANTIZATIONS`, or transformers'
        quantization config as JSON. A checkpoint that is quantized says so itself.
    adapter : str, optional
        A PEFT adapter (LoRA) for the model: a folder or an id.
    merge_adapter : bool
        Add the adapter to the weights, which costs nothing later; else it stays beside them.
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
    lower_layers: int | None = None

    def __post_init__(self) -> None:
        if self.attention.startswith("flash"):
            raise ConfigError(
                f"attention is {self.attention!r}, which would never run: Homer computes attention "
                "itself, with torch's own, which has flash kernels on a GPU; use sdpa"
            )
        for name, known in (("dtype", DTYPES), ("attention", ATTENTIONS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; use {', '.join(known)}")
        if self.merge_adapter and self.adapter is None:
            raise ConfigError("merge_adapter is set, but there is no adapter; name one")
        if self.lower_layers is not None and self.lower_layers < 1:
            raise ConfigError(f"lower_layers is {self.lower_layers}; use 1 or more")

    @classmethod
    def of(cls, options: LoadOptions | None, given: Mapping[str, Any]) -> LoadOptions:
        """`options`, or the defaults, with the fields of `given` in their place."""
        return dataclasses.replace(options or cls(), **given)

    @property
    def hub(self) -> dict[str, Any]:
        """What says where files come from, for any `from_pretrained`; only what is set."""
        places = {
            "revision": self.revision,
            "token": self.token,
            "local_files_only": self.local_files_only,
        }
        return {name: value for name, value in places.items() if value}


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
