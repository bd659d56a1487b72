"""Answers as OpenAI's clients read them: one object, or chunks of a stream.

Knows nothing about HTTP or where the events come from.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cluster.client_wire import Event
from cluster.errors import ServiceError
from cluster.evidence import add_text
from cluster.http.bodies import HomerOptions
from cluster.http.errors import HttpError
from cluster.text import LocatedText
from homer.v1 import long_context_pb2 as pb
from homer.v1 import sampling_pb2

Kind = Literal["chat", "completion"]
DONE = "data: [DONE]\n\n"
PROGRESS_SECONDS = 1.0

_FINISH = {
    sampling_pb2.FINISH_REASON_STOP: "stop",
    sampling_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True)
class Answer:
    """One answer in the making: what all of its objects have in common.

    `document` is what the evidence of a request is about, where that was asked for.
    """

    kind: Kind
    id: str
    model: str
    options: HomerOptions
    document: LocatedText | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The answer as one object."""
        summary = None
        accepted = None
        async for event in events:
            accepted = event if isinstance(event, pb.Accepted) else accepted
            summary = event if isinstance(event, pb.Summary) else summary
        if summary is None:
            raise ServiceError("DATA_LOSS", "the service ended the answer before its summary")
        message: dict[str, Any] = {"text": summary.text}
        if self.kind == "chat":
            message = {"message": {"role": "assistant", "content": summary.text, "refusal": None}}
        return {
            **self._head(""),
            "choices": [self._choice(message, _FINISH[summary.finish_reason])],
            "usage": usage(summary),
            "homer": await asyncio.to_thread(self.facts, accepted, summary),
        }

    async def stream(self, events: AsyncIterator[Event], include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. What goes wrong on the way is an event too."""
        rest = {"usage": None} if include_usage else {}
        accepted = None
        if self.kind == "chat":
            yield self._chunk({"role": "assistant", "content": ""}, None, rest)
        told, sent = time.monotonic(), 0
        try:
            async for event in events:
                match event:
                    case pb.Accepted():
                        accepted = event
                        if self.options.progress:
                            yield self._told("accepted", event)
                    case pb.Progress() if self.options.progress:
                        yield self._told("progress", event)
                    case pb.Progress() if time.monotonic() - told > PROGRESS_SECONDS:
                        told = time.monotonic()
                        # A comment: clients pass over it, and nobody in between hangs up.
                        yield (
                            f": {event.leaves_done} of {event.leaves_total} leaves, "
                            f"{event.merges_done} of {event.merges_total} merges\n\n"
                        )
                    case pb.Token() if event.text:
                        sent += len(event.text)
                        yield self._chunk({"content": event.text}, None, rest)
                    case pb.Summary():
                        if left := event.text[sent:]:
                            yield self._chunk({"content": left}, None, rest)
                        # The evidence of a long document is long.
                        facts = await asyncio.to_thread(self.facts, accepted, event)
                        yield self._chunk(
                            {}, _FINISH[event.finish_reason], {**rest, "homer": facts}
                        )
                        if include_usage:
                            last = {**self._head(".chunk"), "choices": [], "usage": usage(event)}
                            yield _data(last)
        except ServiceError as error:
            yield _data(HttpError.of_service(error).body)
        yield DONE

    def facts(self, accepted: pb.Accepted | None, summary: pb.Summary) -> dict[str, Any]:
        """What Homer did, for whoever wants to know."""
        seconds = summary.seconds
        out: dict[str, Any] = {
            "request_id": summary.request_id,
            "kept_tokens": summary.kept_tokens,
            "leaves": summary.leaves,
            "levels": accepted.levels if accepted is not None else None,
            "moved_bytes": summary.moved_bytes,
            "nodes_by_worker": dict(summary.nodes_by_worker),
            "seconds": {f.name: getattr(seconds, f.name) for f in seconds.DESCRIPTOR.fields},
        }
        if self.options.return_kept_indices:
            out["kept_context_indices"] = list(summary.kept_context_indices)
        if self.options.return_evidence:
            if self.document is not None:
                add_text(summary.evidence, self.document)
            out["evidence"] = _fields(summary.evidence)
        return out

    def _told(self, name: str, event: pb.Accepted | pb.Progress) -> str:
        """A chunk without a choice, which clients that do not know of it pass over."""
        return _data({**self._head(".chunk"), "choices": [], "homer": {name: _fields(event)}})

    def _chunk(self, delta: dict[str, Any], finish: str | None, rest: dict[str, Any]) -> str:
        content = {"delta": delta} if self.kind == "chat" else {"text": delta.get("content", "")}
        return _data({**self._head(".chunk"), "choices": [self._choice(content, finish)], **rest})

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = "chat.completion" + chunk if self.kind == "chat" else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    @staticmethod
    def _choice(content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def usage(summary: pb.Summary) -> dict[str, int]:
    """Tokens of the whole prompt, whatever was kept of it, and of the answer."""
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.generated_tokens,
        "total_tokens": summary.prompt_tokens + summary.generated_tokens,
    }


def _fields(message: Message) -> dict[str, Any]:
    """A message as JSON: its fields by their names, zeros included."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # JSON from protobuf writes 64-bit integers as text.
    if "prompt_tokens" in fields:
        fields["prompt_tokens"] = int(fields["prompt_tokens"])
    if "kind" in fields:
        fields["kind"] = fields["kind"].removeprefix("KIND_").lower()
    return fields


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
