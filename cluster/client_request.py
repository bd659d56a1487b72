"""A question as a client's caller puts it: one frozen object, by the same keywords everywhere.

Knows nothing about connections.
"""

from __future__ import annotations

import functools
import inspect
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from homer.errors import ConfigError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import sampling_pb2
from workers.plan_wire import PLAN_KINDS

SEED_BITS = 63
# Longer documents are sent in pieces; no piece has more than four times as many bytes.
PIECE_LENGTH = 1 << 18

P = ParamSpec("P")
Self = TypeVar("Self")
Made = TypeVar("Made")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ClientRequest:
    """A question about a document.

    Parameters
    ----------
    context, question, prefix : str, or sequence of int
        All as text, or all as token ids (an empty prefix goes with both).
    request_id : str
        Made by the service when empty.
    sampling : mapping, optional
        Fields of `homer.v1.SamplingParams`: max_tokens, temperature, top_p, …
    compression : mapping, optional
        Fields of `homer.HomerConfig` that override the service's settings.
    return_kept_indices : bool
        Ask for the context indices that survived, in the summary.
    return_evidence : bool
        Ask for what survived at each node of the tree, and for the passages that the answer is
        from, in the summary's `evidence`; `cluster.evidence.kept_of` reads what a node kept.
    priority : int
        From -8 to 8: higher ones start first and get a larger share of the workers.
    timeout_seconds : float, optional
        After this long, all attempts together, the request is cancelled everywhere.

    Raises
    ------
    TypeError
        When its parts are neither all text nor all token ids.
    """

    context: str | Sequence[int]
    question: str | Sequence[int]
    prefix: str | Sequence[int] = ""
    request_id: str = ""
    sampling: Mapping[str, Any] | None = None
    compression: Mapping[str, Any] | None = None
    return_kept_indices: bool = False
    return_evidence: bool = False
    priority: int = 0
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        parts = [self.context, self.question, *([self.prefix] if len(self.prefix) else [])]
        if len({isinstance(part, str) for part in parts}) > 1:
            raise TypeError("give prefix, context and question all as text or all as token ids")

    @property
    def is_long(self) -> bool:
        """Whether its document is sent in pieces, behind a message without it."""
        return len(self.context) > PIECE_LENGTH

    def pieces(self) -> Iterator[pb.GenerateFromStreamRequest]:
        """The document as it is sent in pieces."""
        for start in range(0, len(self.context), PIECE_LENGTH):
            piece: Any = self.context[start : start + PIECE_LENGTH]
            if isinstance(piece, str):
                yield pb.GenerateFromStreamRequest(context_utf8=piece.encode())
            else:
                yield pb.GenerateFromStreamRequest(context_ids=pb.TokenIds(ids=piece))

    def to_wire(self, *, repeatable: bool = False) -> pb.GenerateRequest:
        """The message, without a long document.

        Where it is to be `repeatable` and samples, it has a seed.

        Raises
        ------
        ConfigError
            When a setting does not exist, or has a value of another kind.
        """
        try:
            sampling = sampling_pb2.SamplingParams(**(self.sampling or {}))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"sampling settings: {error}") from error
        if repeatable and sampling.temperature and not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(SEED_BITS)
        message = pb.GenerateRequest(
            request_id=self.request_id,
            sampling=sampling,
            compression=compression_to_wire(self.compression or {}),
            return_kept_indices=self.return_kept_indices,
            return_evidence=self.return_evidence,
            priority=self.priority,
        )
        prefix: Any = self.prefix if len(self.prefix) else None
        context: Any = None if self.is_long else self.context
        question: Any = self.question
        if isinstance(self.context, str):
            message.text.CopyFrom(pb.TextPrompt(prefix=prefix, context=context, suffix=question))
        else:
            message.tokens.CopyFrom(
                pb.TokenPrompt(prefix_ids=prefix, context_ids=context, suffix_ids=question)
            )
        return message


def from_keywords(
    make: Callable[P, Made],
) -> Callable[[Callable[[Self, Made], Result]], Callable[Concatenate[Self, P], Result]]:
    """Have a method take what `make` is made from in place of what it makes."""

    def decorate(method: Callable[[Self, Made], Result]) -> Callable[Concatenate[Self, P], Result]:
        @functools.wraps(method)
        def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            return method(self, make(*args, **kwargs))

        signature = inspect.signature(make)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        described: Any = call
        described.__signature__ = signature.replace(
            parameters=[own, *signature.parameters.values()],
            return_annotation=method.__annotations__.get("return"),
        )
        return call

    return decorate


def compression_to_wire(settings: Mapping[str, Any]) -> pb.CompressionOptions:
    """Fields of `homer.HomerConfig` as a message.

    Raises
    ------
    ConfigError
        When there is no such field or plan.
    """
    wire = {name: value for name, value in settings.items() if value is not None}
    if wire.get("plan", "balanced") not in PLAN_KINDS:
        raise ConfigError(f"plan is {wire['plan']!r}; use one of {list(PLAN_KINDS)}")
    if "plan" in wire:
        wire["plan"] = PLAN_KINDS[wire["plan"]]
    try:
        return pb.CompressionOptions(**wire)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"compression settings: {error}") from error
