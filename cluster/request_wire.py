"""Requests and events of the service, as messages of `homer.v1.LongContext` and back.

Knows nothing about gRPC servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from cluster.job import CacheReady, JobProgress, Sampling
from cluster.service import Accepted, Finished, Request, ServiceEvent, TextPrompt, TokenText
from cluster.text import PromptIds
from homer.errors import PromptError
from homer.v1 import long_context_pb2 as pb
from homer.v1 import sampling_pb2
from workers.plan_wire import read_plan_kind

MAX_LOGPROBS = 20

_FINISH_REASONS = {
    "stop": sampling_pb2.FINISH_REASON_STOP,
    "length": sampling_pb2.FINISH_REASON_LENGTH,
}


def request_from_wire(request: pb.GenerateRequest) -> Request:
    """A request as the service knows it.

    Raises
    ------
    PromptError
        When it has no prompt.
    """
    prompt: TextPrompt | PromptIds
    match request.WhichOneof("prompt"):
        case "text":
            prompt = TextPrompt(request.text.prefix, request.text.context, request.text.suffix)
        case "tokens":
            prompt = PromptIds(
                list(request.tokens.prefix_ids),
                list(request.tokens.context_ids),
                list(request.tokens.suffix_ids),
            )
        case _:
            raise PromptError("the request has no prompt; set text or tokens")
    return Request(
        prompt=prompt,
        request_id=request.request_id,
        sampling=sampling_from_wire(request.sampling),
        answers=request.sampling.n or 1,
        stop=list(request.sampling.stop),
        compression=compression_from_wire(request.compression),
        return_kept_indices=request.return_kept_indices,
        return_evidence=request.return_evidence,
        priority=request.priority,
    )


def compression_from_wire(wire: pb.CompressionOptions) -> dict[str, Any]:
    """The settings that a message sets, to 0 too: `HomerConfig` refuses what is wrong."""
    settings = {field.name: value for field, value in wire.ListFields()}
    if "plan" in settings:
        settings["plan"] = read_plan_kind(settings["plan"])
    return settings


def sampling_from_wire(wire: sampling_pb2.SamplingParams) -> Sampling:
    """Sampling settings, where 0 means off or the default; refused when out of range.

    Raises
    ------
    PromptError
        When a setting is out of its range.
    """
    problems = {
        "temperature must be 0 (greedy) or more": wire.temperature >= 0,
        "top_p must be from 0 (off) to 1": 0 <= wire.top_p <= 1,
        "min_p must be from 0 (off) to 1": 0 <= wire.min_p <= 1,
        "repetition_penalty must be 0 (off) or more": wire.repetition_penalty >= 0,
        f"logprobs must be from 0 to {MAX_LOGPROBS}": wire.logprobs <= MAX_LOGPROBS,
    }
    for message, holds in problems.items():
        if not holds:
            raise PromptError(f"{message}; got {getattr(wire, message.split()[0])}")
    default = Sampling()
    return Sampling(
        max_new_tokens=wire.max_tokens or default.max_new_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p or default.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty or default.repetition_penalty,
        seed=wire.seed if wire.HasField("seed") else None,
        ignore_eos=wire.ignore_eos,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
    )


def event_to_wire(event: ServiceEvent, with_indices: bool) -> dict[str, Message]:
    """An event of the service as it travels: the field of a response, and its value."""
    match event:
        case Accepted(request_id, job, subtrees, uncalibrated):
            plan = job.plan
            accepted = pb.Accepted(
                request_id=request_id,
                prompt_tokens=plan.prompt_len,
                leaves=len(plan.leaves),
                levels=plan.height + 1,
                merges=len(plan.merges),
                subtrees=subtrees,
                uncalibrated=uncalibrated,
                level_nodes=plan.level_nodes,
                context_tokens=plan.context_len,
            )
            return {"accepted": accepted}
        case JobProgress(done):
            progress = pb.Progress(
                kind=pb.Progress.KIND_MERGE if done.node.height else pb.Progress.KIND_LEAF,
                height=done.node.height,
                index=done.node.index,
                worker=event.worker,
                leaves_done=event.leaves_done,
                leaves_total=event.leaves_total,
                merges_done=event.merges_done,
                merges_total=event.merges_total,
                context_tokens_in=done.context_in,
                context_tokens_out=done.context_out,
                seconds=done.seconds,
                context_start=event.context_start,
                context_end=event.context_end,
            )
            return {"progress": progress}
        case CacheReady():
            progress = pb.Progress(
                kind=pb.Progress.KIND_GATHER,
                context_tokens_out=len(event.context_indices),
                seconds=event.gather_seconds + event.refresh_seconds,
            )
            return {"progress": progress}
        case TokenText():
            return {"token": _token(event)}
        case Finished():
            indices = event.summary.context_indices if with_indices else ()
            return {"summary": _summary(event, indices)}


def _token(event: TokenText) -> pb.Token:
    token = pb.Token(token_id=event.token_id, text=event.text, answer=event.answer)
    if event.logprobs:
        chosen, *top = (
            sampling_pb2.TokenLogprob(token_id=one.token_id, logprob=one.logprob, text=text)
            for one, text in event.logprobs
        )
        token.logprob.CopyFrom(chosen)
        token.top_logprobs.extend(top)
    return token


def _summary(event: Finished, indices: Sequence[int]) -> pb.Summary:
    summary, plan = event.summary, event.job.plan
    answers = [
        pb.AnswerSummary(
            generated_tokens=len(answer.token_ids),
            finish_reason=_FINISH_REASONS[reason],
            token_ids=answer.token_ids,
            text=answer.text,
        )
        for answer, reason in zip(event.answers, summary.finish_reasons, strict=True)
    ]
    first = answers[0]
    return pb.Summary(
        request_id=event.request_id,
        prompt_tokens=plan.prompt_len,
        leaves=len(plan.leaves),
        kept_tokens=summary.kept_tokens,
        generated_tokens=first.generated_tokens,
        finish_reason=first.finish_reason,
        seconds=pb.StageSeconds(
            queue=summary.seconds.queue,
            leaves=summary.seconds.leaves,
            merges=summary.seconds.merges,
            gather=summary.seconds.gather,
            time_to_first_token=summary.seconds.time_to_first_token,
            decode=summary.seconds.decode,
            total=summary.seconds.total,
        ),
        moved_bytes=summary.moved_bytes,
        kept_context_indices=indices,
        token_ids=first.token_ids,
        text=first.text,
        nodes_by_worker=summary.nodes_by_worker,
        answers=answers if len(answers) > 1 else (),
    )
