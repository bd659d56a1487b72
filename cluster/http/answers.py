"""Answers as OpenAI's clients read them: one object, or chunks of a stream.

Knows nothing about HTTP or where the events come from.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from google.protobuf.message import Message

from cluster.client_wire import Event, message_fields
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
        tokens: defaultdict[int, list[pb.Token]] = defaultdict(list)
        async for event in events:
            match event:
                case pb.Accepted():
                    accepted = event
                case pb.Token():
                    tokens[event.answer].append(event)
                case pb.Summary():
                    summary = event
        if summary is None:
            raise ServiceError("DATA_LOSS", "the service ended the answer before its summary")
        choices = []
        for number, one in enumerate(answers_of(summary)):
            content: dict[str, Any] = {"text": one.text}
            if self.kind == "chat":
                content = {"message": {"role": "assistant", "content": one.text, "refusal": None}}
            logprobs = logprobs_of(self.kind, tokens[number])
            choices.append(choice(number, content, logprobs, _FINISH[one.finish_reason]))
        return {
            **self._head(""),
            "choices": choices,
            "usage": usage(summary),
            "homer": await asyncio.to_thread(self.facts, accepted, summary),
        }

    async def stream(self, events: AsyncIterator[Event], include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. What goes wrong on the way is an event too."""
        rest = {"usage": None} if include_usage else {}
        accepted = None
        told = time.monotonic()
        # Characters that were sent of each answer, in text and in what logprobs count as text.
        sent: Counter[int] = Counter()
        spelled: Counter[int] = Counter()
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
                    case pb.Token() if event.text or event.HasField("logprob"):
                        number = event.answer
                        logprobs = logprobs_of(self.kind, [event], spelled[number])
                        spelled[number] += len(event.logprob.text)
                        yield self._piece(number, event.text, rest, sent, logprobs)
                    case pb.Summary():
                        # The evidence of a long document is long.
                        facts = await asyncio.to_thread(self.facts, accepted, event)
                        ended = answers_of(event)
                        for number, one in enumerate(ended):
                            if (left := one.text[sent[number] :]) or number not in sent:
                                yield self._piece(number, left, rest, sent)
                            yield self._chunk(
                                choice(number, self._delta(""), None, _FINISH[one.finish_reason]),
                                {**rest, "homer": facts} if number == len(ended) - 1 else rest,
                            )
                        if include_usage:
                            chunk = {**self._head(".chunk"), "choices": [], "usage": usage(event)}
                            yield _data(chunk)
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

    def _piece(
        self,
        number: int,
        text: str,
        rest: dict[str, Any],
        sent: Counter[int],
        logprobs: dict[str, Any] | None = None,
    ) -> str:
        """More text of an answer; its first piece says whose it is."""
        content = self._delta(text)
        if self.kind == "chat" and number not in sent:
            content["delta"]["role"] = "assistant"
        sent[number] += len(text)
        return self._chunk(choice(number, content, logprobs, None), rest)

    def _delta(self, text: str) -> dict[str, Any]:
        if self.kind == "completion":
            return {"text": text}
        return {"delta": {"content": text} if text else {}}

    def _chunk(self, one: dict[str, Any], rest: dict[str, Any]) -> str:
        return _data({**self._head(".chunk"), "choices": [one], **rest})

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = "chat.completion" + chunk if self.kind == "chat" else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def answers_of(summary: pb.Summary) -> Sequence[pb.Summary | pb.AnswerSummary]:
    """Every answer: where there is one, the summary is its own."""
    return list(summary.answers) or [summary]


def choice(
    number: int, content: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None
) -> dict[str, Any]:
    return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish}


def logprobs_of(kind: Kind, tokens: Sequence[pb.Token], offset: int = 0) -> dict[str, Any] | None:
    """What an answer's tokens were chosen from, where that was asked for.

    In a completion each token has its place in the text, of which `offset` characters came before.
    """
    if not tokens or not tokens[0].HasField("logprob"):
        return None
    if kind == "chat":
        content = [
            {**_spelled(token.logprob), "top_logprobs": list(map(_spelled, token.top_logprobs))}
            for token in tokens
        ]
        return {"content": content, "refusal": None}
    texts = [token.logprob.text for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob.logprob for token in tokens],
        "top_logprobs": [{o.text: o.logprob for o in token.top_logprobs} for token in tokens],
        "text_offset": [*accumulate(map(len, texts), initial=offset)][:-1],
    }


def _spelled(one: sampling_pb2.TokenLogprob) -> dict[str, Any]:
    # A token may be a part of a character, which has no text, and whose bytes are not known here.
    whole = None if "\N{REPLACEMENT CHARACTER}" in one.text else list(one.text.encode())
    return {"token": one.text, "logprob": one.logprob, "bytes": whole}


def usage(summary: pb.Summary) -> dict[str, int]:
    """Tokens of the whole prompt, whatever was kept of it, and of all answers."""
    generated = sum(answer.generated_tokens for answer in answers_of(summary))
    return {
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": summary.prompt_tokens + generated,
    }


def _fields(message: Message) -> dict[str, Any]:
    """A message as `message_fields` has it, with numbers and names as callers expect them."""
    fields = message_fields(message)
    # JSON from protobuf writes 64-bit integers as text.
    if "prompt_tokens" in fields:
        fields["prompt_tokens"] = int(fields["prompt_tokens"])
    if "kind" in fields:
        fields["kind"] = fields["kind"].removeprefix("KIND_").lower()
    return fields


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
