"""Bodies of requests, as OpenAI's clients send them.

What Homer cannot do is refused where it would change the answer, and taken where it is at its
neutral value. Knows nothing about prompts or answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(strict=True)]
PRIORITY = 8
MAX_LOGPROBS = 20


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class HomerOptions(_Body):
    """Homer's own settings, in `homer` of a request's body."""

    # Of a completion: what comes before the document, and after it. The prompt is the document.
    prefix: Text | None = None
    question: Text | None = None
    max_chunk_len: int | None = Field(default=None, ge=1)
    target_len: int | None = Field(default=None, ge=1)
    warmup_layers: int | None = Field(default=None, ge=0)
    score: Text | None = None
    return_kept_indices: bool = False
    return_evidence: bool = False
    # Of a stream: tell of every node that is done.
    progress: bool = False
    priority: int = Field(default=0, ge=-PRIORITY, le=PRIORITY)

    @property
    def compression(self) -> dict[str, Any]:
        names = ("max_chunk_len", "target_len", "warmup_layers", "score")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Body):
    """One piece of a message's content."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a chat. Fields that templates read besides these (name, …) are passed on."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def parts(self) -> list[str]:
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content]


class _Generation(_Body):
    """What both kinds of requests have."""

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    # As OpenAI has it: an answer is sampled unless a request says otherwise.
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=0, lt=1 << 64)
    stop: Text | list[Text] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    homer: HomerOptions = HomerOptions()
    # Taken, and of no consequence for an answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Only at their neutral value.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens are wanted beside each token; None where not even its own."""
        raise NotImplementedError

    @property
    def sampling(self) -> dict[str, Any]:
        """As fields of `homer.v1.SamplingParams`."""
        given = {
            "max_tokens": self.longest,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stop": self.stops,
            "n": self.n,
            "logprobs": self.alternatives,
        }
        return {name: value for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        if self.homer.progress and not self.stream:
            raise ValueError("homer.progress is only for stream=true")
        return self


class ChatBody(_Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs=true")
        return self


class CompletionBody(_Generation):
    """`POST /v1/completions`."""

    prompt: Text
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
