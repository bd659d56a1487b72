"""The ways of answering that are measured side by side.

*homer* and its variants compress; *uncalibrated* is homer without the model's bias; *plain* gives
the model the whole prompt, far beyond its window if need be; *truncation* gives it the beginning
and the last window-full; *yarn* is plain with positions scaled by YaRN. All answer greedily through
the same decoding. Knows nothing about tasks.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from homer.bench.plain import plain_context, yarn
from homer.config import HomerConfig
from homer.context import CompressedContext
from homer.errors import ConfigError
from homer.generation import generate_tokens
from homer.model import HomerModel
from homer.sampling import SamplingParams
from homer.stack import LayerStack

Kind = Literal["homer", "plain", "truncation", "yarn"]
METHODS = ("homer", "paper", "plain", "truncation", "yarn", "uncalibrated")


@dataclass(frozen=True)
class Method:
    """A way of answering; `config` are the settings of those that compress.

    Those get the model's calibration bias where they are `calibrated`.
    """

    name: str
    kind: Kind
    config: HomerConfig | None = None
    calibrated: bool = True

    @property
    def is_full_attention(self) -> bool:
        """Whether its time grows with the square of the length."""
        return self.kind in ("plain", "yarn")

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on, its name left out."""
        config = None if self.config is None else dataclasses.asdict(self.config)
        return {"kind": self.kind, "config": config, "calibrated": self.calibrated}


@dataclass(frozen=True)
class Prompt:
    """Token ids of the three parts, each of shape (n,)."""

    prefix: torch.Tensor
    context: torch.Tensor
    suffix: torch.Tensor

    def __len__(self) -> int:
        return len(self.prefix) + len(self.context) + len(self.suffix)

    @property
    def ids(self) -> torch.Tensor:
        return torch.cat((self.prefix, self.context, self.suffix))


@dataclass(frozen=True)
class Answer:
    """Generated ids, the context tokens that the model had when it answered, and the seconds."""

    ids: list[int]
    context_indices: torch.Tensor
    seconds: float


def choose_methods(
    names: Sequence[str],
    variants: Sequence[str],
    base: HomerConfig,
    scores: Sequence[str] = (),
) -> tuple[Method, ...]:
    """Methods by name, then variants of the settings, written `name:field=value,field=value`.

    Each of `scores` is a variant that is called like its score.

    Raises
    ------
    ConfigError
        For an unknown method or field, or a name that is there twice.
    """
    methods = [_method(name, base) for name in names]
    methods += [_variant(text, base) for text in variants]
    methods += [Method(name, "homer", base.replace(score=name)) for name in scores]
    if len({method.name for method in methods}) < len(methods):
        raise ConfigError("two methods have the same name; give each variant a name of its own")
    return tuple(methods)


def _method(name: str, base: HomerConfig) -> Method:
    if name == "homer":
        return Method(name, "homer", base)
    if name == "uncalibrated":
        return Method(name, "homer", base, calibrated=False)
    if name == "paper":
        lengths = ("max_chunk_len", "target_len", "warmup_layers", "max_initial_chunk_len")
        settings = {field: getattr(base, field) for field in lengths}
        return Method(name, "homer", HomerConfig.paper(**settings))
    if name in METHODS:
        return Method(name, cast(Kind, name))
    raise ConfigError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")


def _variant(text: str, base: HomerConfig) -> Method:
    name, colon, changes = text.partition(":")
    known = {field.name for field in dataclasses.fields(HomerConfig)}
    settings: dict[str, Any] = {}
    for change in changes.split(","):
        field, equals, value = change.partition("=")
        if not (name and colon and equals) or field not in known:
            raise ConfigError(
                f"variant {text!r} is not name:field=value,field=value; fields are "
                f"{', '.join(sorted(known))}"
            )
        settings[field] = _value(value)
    return Method(name, "homer", base.replace(**settings))


def _value(text: str) -> int | bool | str | None:
    try:
        value: int | bool | None = json.loads(text.replace("None", "null").lower())
    except ValueError:
        return text
    return value


class Answerer:
    """Answers prompts by any method, with one loaded model."""

    def __init__(self, model: Any, bias: torch.Tensor | None) -> None:
        self.model = model
        self.bias = bias
        self.window: int = model.config.max_position_embeddings

    def answer(self, method: Method, prompt: Prompt, max_new_tokens: int) -> Answer:
        """Answer greedily with at most `max_new_tokens` tokens."""
        started = time.perf_counter()
        kept = torch.arange(len(prompt.context))
        if method.config is not None:
            bias = self.bias if method.calibrated else None
            homer = HomerModel(self.model, method.config, bias)
            context = homer.compress(prompt.prefix, prompt.context, prompt.suffix)
            kept = context.context_indices.cpu()
            ids = self._generate(context, max_new_tokens)
        elif method.kind == "yarn":
            with yarn(self.model, len(prompt) + max_new_tokens):
                ids = self._answer_plainly(prompt, max_new_tokens)
        else:
            if method.kind == "truncation":
                kept = kept[len(kept) - self._truncated_len(prompt, max_new_tokens) :]
                prompt = dataclasses.replace(prompt, context=prompt.context[kept])
            ids = self._answer_plainly(prompt, max_new_tokens)
        return Answer(ids, kept, time.perf_counter() - started)

    def _answer_plainly(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        return self._generate(plain_context(self.model, prompt.ids), max_new_tokens)

    def _generate(self, context: CompressedContext, max_new_tokens: int) -> list[int]:
        params = SamplingParams(max_new_tokens=max_new_tokens)
        return list(generate_tokens(LayerStack(self.model), context, params))

    def _truncated_len(self, prompt: Prompt, max_new_tokens: int) -> int:
        """Context tokens that fit the window beside prefix, suffix and the answer."""
        room = self.window - len(prompt.prefix) - len(prompt.suffix) - max_new_tokens
        return max(0, min(room, len(prompt.context)))
