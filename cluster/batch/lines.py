"""Lines of a batch's input: a question each, in Homer's own format or in OpenAI's.

A line is found again in an output by its `custom_id`, or else by its number and a hash of what it
says. Knows nothing about services.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.http.bodies import PRIORITY, ChatBody, CompletionBody, Text
from cluster.http.errors import HttpError

Key = str | tuple[int, str]
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
_BODIES: dict[str, type[ChatBody] | type[CompletionBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}
_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "ignore_eos", "stop",
)  # fmt: skip


class Question(BaseModel):
    """A line in Homer's own format. What it leaves out is as in `homer generate`."""

    model_config = ConfigDict(extra="forbid")

    custom_id: Text | None = Field(None, min_length=1)
    context: Text | None = Field(None, min_length=1)
    # A path, or a URI that fsspec opens.
    context_path: Text | None = Field(None, min_length=1)
    question: Text = Field(min_length=1)
    prefix: Text = ""
    max_tokens: int | None = Field(None, ge=1, lt=1 << 32)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=1 << 32)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=0, lt=1 << 64)
    ignore_eos: bool | None = None
    stop: list[Text] | None = None
    compression: dict[str, Any] = Field(default_factory=dict)
    return_kept_indices: bool = False
    priority: int | None = Field(None, ge=-PRIORITY, le=PRIORITY)

    @model_validator(mode="after")
    def _one_document(self) -> Self:
        if (self.context is None) == (self.context_path is None):
            raise ValueError("give the document as context or as context_path, one of them")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """As fields of `homer.v1.SamplingParams`."""
        given = ((name, getattr(self, name)) for name in _SAMPLING)
        return {name: value for name, value in given if value is not None}


class _Envelope(BaseModel):
    """A line in OpenAI's format, around the body of its request."""

    model_config = ConfigDict(extra="forbid")

    custom_id: Text = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line: what it asks, or what is wrong with it.

    It is `openai` where its result is wanted in OpenAI's format.
    """

    number: int
    digest: str
    custom_id: str | None
    openai: bool
    asks: Question | ChatBody | CompletionBody | HttpError

    @property
    def key(self) -> Key:
        """What the line's result is found by."""
        return (self.number, self.digest) if self.custom_id is None else self.custom_id


def read_lines(raw_lines: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a file, empty ones left out; numbers count from 1."""
    for number, raw in enumerate(raw_lines, start=1):
        if raw.strip():
            yield _read(number, raw.strip())


def _read(number: int, raw: bytes) -> Line:
    digest = xxhash.xxh3_128_hexdigest(raw)
    try:
        text = raw.decode("utf-8")
        fields = json.loads(text.removeprefix(_BOM) if number == 1 else text)
    except (ValueError, RecursionError) as error:
        return Line(number, digest, None, False, HttpError(400, f"the line is not JSON: {error}"))
    if not isinstance(fields, dict):
        problem = HttpError(400, "the line is no JSON object with a question")
        return Line(number, digest, None, False, problem)
    named = fields.get("custom_id")
    custom_id = named if isinstance(named, str) and named else None
    openai = not fields.keys().isdisjoint(_Envelope.model_fields.keys() - {"custom_id"})
    asks: Question | ChatBody | CompletionBody | HttpError
    try:
        asks = _openai(fields) if openai else Question.model_validate(fields)
    except ValidationError as error:
        asks = HttpError.of_validation(error.errors())
    except HttpError as error:
        asks = error
    # OpenAI's format has no place for what else a line is found by.
    return Line(number, digest, custom_id, openai and custom_id is not None, asks)


def _openai(fields: dict[str, Any]) -> ChatBody | CompletionBody:
    envelope = _Envelope.model_validate(fields)
    body = _BODIES[envelope.url].model_validate(envelope.body)
    if body.stream:
        raise HttpError(400, "an answer in a batch is no stream; leave stream out", param="stream")
    return body
