"""What Homer would do with a model, told from its config: no weights are read.

The model is built on the meta device, where tensors have shapes and no contents. Knows nothing
about the machine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from homer.bias import find_bias, load_bias
from homer.checkpoint import check_generation_config
from homer.config import HomerConfig
from homer.cost import PlanCost
from homer.errors import BiasError, ModelError, PlanError
from homer.families import Window
from homer.flash import missing_flash
from homer.load_options import FLASH_PACKAGES
from homer.plan import MergePlan
from homer.shape import UNCALIBRATED, ModelShape, defaults_for, load_config, settings_sources
from homer.stack import LayerStack

DOCUMENT_WINDOWS = 16
_QUESTION_TOKENS = 32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process that holds the whole model and runs a document of `document_tokens`.

    `kv_bytes` is the most KV that is held at once, `chunk_bytes` what a running chunk takes beside
    it (hidden states, and the widest layer's intermediate values).
    """

    document_tokens: int
    weight_bytes: int
    kv_bytes: int
    chunk_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.chunk_bytes


@dataclass(frozen=True)
class ModelReport:
    """What is known of a model before it is loaded. Refused models have a `reason` and no more.

    `attentions` are the attention implementations with which it would load here.
    """

    model: str
    model_type: str
    supported: bool
    reason: str | None = None
    tested: bool = False
    attentions: tuple[str, ...] = ()
    shape: ModelShape | None = None
    config: HomerConfig | None = None
    setting_sources: dict[str, str] = field(default_factory=dict)
    local_layers: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    kv_bytes_per_token: int = 0
    memory: MemoryEstimate | None = None
    calibrated: bool = False
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def examine_model(
    path_or_id: str | Path, document_tokens: int | None = None, **hub: Any
) -> ModelReport:
    """Find out whether Homer can run a model, and how it would.

    Memory is told for a document of `document_tokens`, by default 16 times the model's window.
    `hub` is as `LoadOptions.hub` gives it.
    """
    revision = hub.get("revision")
    model_type = "unknown"
    try:
        config = load_config(path_or_id, **hub)
        check_generation_config(path_or_id, revision)
        model_type = config.get_text_config(decoder=True).model_type
        shape = ModelShape.of(config)
        stack = LayerStack(_build_on_meta(config))
        settings = defaults_for(path_or_id, shape, revision)
        calibrated, notes = _calibration(path_or_id, revision, stack, settings)
    except (ModelError, BiasError) as error:
        return ModelReport(str(path_or_id), model_type, supported=False, reason=str(error))
    memory = None
    try:
        memory = _memory(stack, shape, settings, document_tokens)
    except PlanError as error:
        notes.append(f"no plan for a long document with these settings: {error}")
    if not stack.family.tested:
        notes.append(
            f"{model_type} is not in Homer's test matrix: when it is loaded, it is held against "
            f"its own forward pass and refused where the two differ"
        )
    return ModelReport(
        str(path_or_id),
        model_type,
        supported=True,
        tested=stack.family.tested,
        attentions=_attentions(stack.model),
        shape=shape,
        config=settings,
        setting_sources=settings_sources(path_or_id, revision),
        local_layers=dict(Counter(_name(window) for window in stack.windows if window)),
        parameters=sum(parameter.numel() for parameter in stack.model.parameters()),
        kv_bytes_per_token=shape.kv_bytes_per_row * shape.num_layers,
        memory=memory,
        calibrated=calibrated,
        notes=(*notes, *_window_notes(stack, settings)),
    )


def _build_on_meta(config: Any) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"transformers cannot build {config.model_type}: {error}") from error


def _attentions(model: Any) -> tuple[str, ...]:
    """The attention implementations with which the model would load here."""
    flash = set(FLASH_PACKAGES) if getattr(model, "_supports_flash_attn", False) else set()
    return "sdpa", "eager", *sorted(flash - set(missing_flash()))


def _memory(
    stack: LayerStack, shape: ModelShape, settings: HomerConfig, document_tokens: int | None
) -> MemoryEstimate:
    tokens = document_tokens or DOCUMENT_WINDOWS * shape.window
    suffix = min(_QUESTION_TOKENS, max(1, settings.max_chunk_len // 8))
    plan = MergePlan.build(1, tokens, suffix, shape.num_layers, settings)
    chunk = max(settings.max_chunk_len, settings.max_initial_chunk_len or 0)
    width = 4 * shape.hidden_size + 3 * shape.intermediate_size
    return MemoryEstimate(
        document_tokens=tokens,
        weight_bytes=sum(p.numel() * p.element_size() for p in stack.model.parameters()),
        kv_bytes=PlanCost.of(plan, shape).peak_kv_bytes,
        chunk_bytes=chunk * width * shape.value_bytes,
    )


def _calibration(
    path_or_id: str | Path, revision: str | None, stack: LayerStack, settings: HomerConfig
) -> tuple[bool, list[str]]:
    file = find_bias(path_or_id, revision)
    if file is None:
        return False, [UNCALIBRATED] if settings.wants_bias else []
    bias = load_bias(file, num_layers=stack.num_layers, hidden_size=stack.hidden_size)
    chunk = max(settings.max_chunk_len, settings.max_initial_chunk_len or 0)
    if bias.shape[1] < chunk:
        return True, [
            f"the bias reaches distance {bias.shape[1] - 1}, but chunks of {chunk} tokens may need "
            f"more; calibrate with longer chunks or lower max_chunk_len"
        ]
    return True, []


def _window_notes(stack: LayerStack, settings: HomerConfig) -> list[str]:
    """What local layers mean for the scores: those of a layer that sees the whole chunk decide."""
    chunk = max(settings.max_chunk_len, settings.max_initial_chunk_len or 0)
    whole = [i for i, window in enumerate(stack.windows) if not window or window.sees_all(chunk)]
    if len(whole) == stack.num_layers:
        return []
    if not whole:
        return [
            "no layer sees a whole chunk: scores come from local layers; lower max_chunk_len to "
            f"{max(window.size for window in stack.windows if window):,}"
        ]
    return [
        f"scores come from the {len(whole)} layers that see a whole chunk; in a node that runs "
        f"none of them, from its last layer"
    ]


def _name(window: Window) -> str:
    kind = "sliding window of" if window.kind == "sliding" else "blocks of"
    return f"{kind} {window.size:,}"
