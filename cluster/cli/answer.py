"""Asks a question and prints what comes: the answer as it grows, or all of it as JSON.

On stdout; how the request is doing goes to a view. Knows nothing about where the service is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import typer

from cluster.errors import ServiceError
from homer.shape import UNCALIBRATED

if TYPE_CHECKING:
    from cluster.cli.progress import ProgressView
    from cluster.client import HomerClient
    from homer.v1 import long_context_pb2 as pb
    from homer.v1 import sampling_pb2

Tokens = Mapping[int, Sequence["pb.Token"]]


def tell_answer(
    client: HomerClient, request: Mapping[str, Any], view: ProgressView, as_json: bool
) -> pb.Summary:
    """Ask, show what happens, and print the answer as it comes, or everything as JSON.

    Of several answers the first is printed as it comes, the others behind it; each has a heading
    then. Log-probabilities, where they were asked for, follow their answer.
    """
    from cluster.cli.progress import describe_summary
    from homer.v1 import long_context_pb2 as pb

    count = request["sampling"].get("n") or 1
    text = _AnswerText(count)
    # With log-probabilities, by the answer that they belong to.
    tokens: defaultdict[int, list[pb.Token]] = defaultdict(list)
    warned = False
    with closing(client.generate(**request)) as events:
        for event in events:
            match event:
                case pb.Accepted():
                    view.accepted(event)
                    if event.uncalibrated and not warned:
                        warned = True
                        typer.echo(f"homer: {UNCALIBRATED}", err=True)
                case pb.Progress():
                    view.progress(event)
                case pb.Token():
                    if event.HasField("logprob"):
                        tokens[event.answer].append(event)
                    if not as_json and event.answer == 0:
                        text.add(event.text)
                case pb.Summary():
                    if as_json:
                        print(json.dumps(_as_json(event, tokens)), flush=True)
                    else:
                        text.finish(event, tokens)
                        view.status(describe_summary(event))
                    return event
    raise ServiceError("DATA_LOSS", "the service ended the answer before its summary")


class _AnswerText:
    """Prints answers, the first of them as it grows."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._told = 0
        self._begun = False

    def add(self, text: str) -> None:
        """More of the first answer."""
        self._begin()
        self._told += len(text)
        print(text, end="", flush=True)

    def finish(self, summary: pb.Summary, tokens: Tokens) -> None:
        """What is left of the first answer, and then the others."""
        self._begin()
        print(summary.text[self._told :])
        answers: Sequence[pb.Summary | pb.AnswerSummary] = summary.answers or [summary]
        for number, answer in enumerate(answers):
            if number:
                print(f"\n{self._heading(number)}\n{answer.text}")
            if number in tokens:
                print("\nlog-probability, token, and the likeliest there:")
                print("\n".join(_logprob_lines(tokens[number])))
        print(end="", flush=True)

    def _begin(self) -> None:
        if self._count > 1 and not self._begun:
            print(self._heading(0))
        self._begun = True

    def _heading(self, number: int) -> str:
        return f"--- answer {number + 1} of {self._count} ---"


def _logprob_lines(tokens: Sequence[pb.Token]) -> Iterator[str]:
    for token in tokens:
        likeliest = ", ".join(f"{_quoted(one)} {one.logprob:.4f}" for one in token.top_logprobs)
        line = f"{token.logprob.logprob:9.4f}  {_quoted(token.logprob):<16} {likeliest}"
        yield line.rstrip()


def _quoted(token: sampling_pb2.TokenLogprob) -> str:
    # A token may be a line break, or nothing but spaces.
    return json.dumps(token.text, ensure_ascii=False)


def _as_json(summary: pb.Summary, tokens: Tokens) -> dict[str, Any]:
    """The summary; and of each answer its tokens' log-probabilities, where they were asked for."""
    from cluster.client_wire import message_fields, summary_to_json

    fields = summary_to_json(summary)
    # It has a file of its own.
    fields.pop("evidence", None)
    for number, answer in ((0, fields), *enumerate(fields["answers"])):
        if number in tokens:
            answer["logprobs"] = [
                {
                    **message_fields(token.logprob),
                    "top_logprobs": list(map(message_fields, token.top_logprobs)),
                }
                for token in tokens[number]
            ]
    return fields
