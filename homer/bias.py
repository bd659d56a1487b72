"""Calibration bias files: the mean significance at each distance, per layer.

Knows nothing about how a bias is measured (`homer.calibration`) or used (`homer.encode`).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from homer.errors import BiasError
from homer.shape import BIAS_FILE as BIAS_FILE
from homer.shape import UNCALIBRATED
from homer.shape import find_bias as find_bias

_METADATA_KEY = "homer"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BiasInfo:
    """What a bias was measured on."""

    model: str
    num_layers: int
    hidden_size: int
    chunk_len: int
    samples: int


def check_bias(bias: torch.Tensor, *, num_layers: int, max_distance: int) -> None:
    """Refuse a bias that does not fit.

    Raises
    ------
    BiasError
        With the shape that is there and the one that is needed.
    """
    if bias.dim() != 2 or bias.shape[0] != num_layers:
        raise BiasError(
            f"the bias has shape {tuple(bias.shape)}, but the model has {num_layers} layers and "
            f"needs ({num_layers}, distances); calibrate it for this model"
        )
    if bias.shape[1] <= max_distance:
        raise BiasError(
            f"the bias reaches distance {bias.shape[1] - 1}, but chunks of this plan reach "
            f"{max_distance}: its shape is {tuple(bias.shape)}, needed ({num_layers}, "
            f"{max_distance + 1}) or more; calibrate with longer chunks or lower max_chunk_len"
        )
    if not torch.isfinite(bias).all():
        raise BiasError("the bias has values that are not finite; calibrate it again")


def save_bias(path: str | Path, bias: torch.Tensor, info: BiasInfo) -> None:
    """Write `bias` of shape (num_layers, max_distance + 1) and what it was measured on."""
    path = Path(path)
    new = path.with_name(path.name + ".new")
    metadata = {_METADATA_KEY: json.dumps(asdict(info))}
    # Not by save_file, whose files nobody else may read: a service may run as another user.
    new.write_bytes(save({"bias": bias.float().contiguous()}, metadata=metadata))
    # A model that is loaded meanwhile finds the whole file or none.
    new.replace(path)


def load_bias(
    path: str | Path, *, num_layers: int | None = None, hidden_size: int | None = None
) -> torch.Tensor:
    """Read a bias file; with `num_layers` and `hidden_size`, refuse one made for another model.

    Raises
    ------
    BiasError
        When the file is missing, damaged, or does not fit.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            bias: torch.Tensor = file.get_tensor("bias")
            metadata = (file.metadata() or {}).get(_METADATA_KEY)
        info = BiasInfo(**json.loads(metadata)) if metadata else None
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise BiasError(
            f"{path} is not a readable bias file ({error}); make it with `homer calibrate`"
        ) from error
    if bias.dim() != 2:
        raise BiasError(
            f"{path} has shape {tuple(bias.shape)}, and a bias has (layers, distances); make "
            "it with `homer calibrate`"
        )
    if num_layers is not None and bias.shape[0] != num_layers:
        raise BiasError(
            f"{path} has shape {tuple(bias.shape)}"
            + (f", measured on {info.model} ({info.num_layers} layers)" if info else "")
            + f"; this model has {num_layers} layers: calibrate it for this model"
        )
    if info is not None and hidden_size is not None and info.hidden_size != hidden_size:
        raise BiasError(
            f"{path} was measured on {info.model} (hidden size {info.hidden_size}), but this "
            f"model's hidden size is {hidden_size}: calibrate it for this model"
        )
    return bias


@cache
def warn_uncalibrated() -> None:
    """Log what running without a bias costs, once in a process."""
    _log.warning(UNCALIBRATED)
