"""What the service does with a request, whatever door it came through.

Turns text into token ids, checks limits, plans, runs the job on the scheduler, and turns tokens
into text. Knows nothing about gRPC, HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, cast

from cluster.job import (
    CacheReady,
    Job,
    JobProgress,
    JobSummary,
    Sampling,
    TokenOut,
    WorkerInfo,
)
from cluster.scheduler import Scheduler
from cluster.seeing import Seeing
from cluster.stop_text import StopText
from cluster.text import LocatedText, PromptIds, PromptTokenizer
from homer.config import HomerConfig
from homer.errors import ModelError, PromptError
from homer.plan import MergePlan
from workers.logs import log_about

MAX_REQUEST_ID_LENGTH = 128
MAX_PRIORITY = 8
MAX_STOPS = 16
SEED_BITS = 32
REPORT_SECONDS_PER_WORKER = 0.002


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request, or one caller, may ask for.

    A message of a request comes within `read_seconds`, and a caller who reads nothing of an answer
    for `write_seconds` loses it.
    """

    message_bytes: int = 64 << 20
    metadata_bytes: int = 16 << 10
    calls_per_token: int = 256
    read_seconds: float = 120.0
    write_seconds: float = 60.0
    context_tokens: int = 1 << 20
    new_tokens: int = 1 << 16


@dataclass(frozen=True)
class TextPrompt:
    """A prompt as text."""

    prefix: str
    context: str
    suffix: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question about one document; `compression` overrides fields of the service's settings."""

    prompt: TextPrompt | PromptIds
    request_id: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    compression: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    return_evidence: bool = False


@dataclass(frozen=True)
class Accepted:
    """The request was understood and planned.

    It is `uncalibrated` where its score wants a calibration bias and the workers have none.
    """

    request_id: str
    job: Job
    subtrees: int
    uncalibrated: bool = False


@dataclass(frozen=True)
class TokenText:
    """A generated token, and the text that became certain with it."""

    token_id: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The whole answer; `document` is there where evidence was asked for of a text."""

    request_id: str
    job: Job
    summary: JobSummary
    token_ids: Sequence[int]
    text: str
    document: LocatedText | None = None


ServiceEvent = Accepted | JobProgress | CacheReady | TokenText | Finished


class LongContextService:
    """Answers requests with one model on one pool of workers.

    Parameters
    ----------
    scheduler : Scheduler
    info : WorkerInfo
        What every worker of the pool is.
    config : HomerConfig
        The settings for requests that bring none.
    tokenizer : PromptTokenizer, optional
        Without one only prompts of token ids are answered, and answers have no text.
    limits : Limits
    seeing : Seeing, optional
        What looks at the scheduler; its observer must be the scheduler's.

    Attributes
    ----------
    absent_workers : callable
        Gives the workers that should serve and do not, each with why; none by default.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        info: WorkerInfo,
        config: HomerConfig,
        tokenizer: PromptTokenizer | None,
        limits: Limits,
        seeing: Seeing | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.info = info
        self.config = config
        self.limits = limits
        self.seeing = seeing or Seeing()
        self.seeing.watch.scheduler = scheduler
        self.absent_workers: Callable[[], Mapping[str, str]] = dict
        self._tokenizer = tokenizer

    async def generate(self, request: Request) -> AsyncIterator[ServiceEvent]:
        """Answer `request`. Close the iterator to cancel.

        Raises
        ------
        PromptError, PlanError, ConfigError
            When the request cannot be answered as it is.
        WorkerLostError, WorkerCallError
            When the workers failed.
        """
        # Tokenizing a long document takes seconds: other requests must not wait for it.
        request_id = request.request_id or uuid.uuid4().hex
        log_about(request_id=request_id)
        job = await asyncio.to_thread(self._prepare, request, request_id)
        log_about(request_id=job.request_id)
        uncalibrated = job.plan.config.wants_bias and not self.info.calibrated
        yield Accepted(request_id, job, self.scheduler.subtrees(job.plan), uncalibrated)
        text = self._tokenizer.stream() if self._tokenizer else None
        stops = StopText(request.stop)
        token_ids: list[int] = []
        pieces: list[str] = []
        # An async generator has `aclose`, which AsyncIterator does not promise.
        async with aclosing(cast(Any, self.scheduler.run(job))) as events:
            async for event in events:
                match event:
                    case TokenOut() if stops.stopped:
                        # Was on its way when the answer was ended.
                        continue
                    case TokenOut(token_id):
                        token_ids.append(token_id)
                        pieces.append(stops.push(text.push(token_id)) if text else "")
                        yield TokenText(token_id, pieces[-1])
                        if stops.stopped:
                            self.scheduler.stop_answer(job.request_id)
                    case JobSummary():
                        if text:
                            pieces.append(stops.push(text.finish()) + stops.finish())
                        if stops.stopped:
                            event = replace(
                                event, generated_tokens=len(token_ids), finish_reason="stop"
                            )
                        whole = "".join(pieces)
                        document = await asyncio.to_thread(self._document, request)
                        yield Finished(request_id, job, event, token_ids, whole, document)
                    case _:
                        yield event

    def _prepare(self, request: Request, request_id: str) -> Job:
        prompt = request.prompt
        if isinstance(prompt, TextPrompt):
            prompt = self._tokenize(prompt)
        if len(prompt.context) > self.limits.context_tokens:
            raise PromptError(
                f"the context has {len(prompt.context)} tokens; this service takes at most "
                f"{self.limits.context_tokens}: shorten the document or serve with a higher "
                "--max-context-tokens"
            )
        for name, ids in zip(("prefix", "context", "suffix"), prompt, strict=True):
            if ids and max(ids) >= self.info.vocab_size:
                raise PromptError(
                    f"{name}_ids has token id {max(ids)}, but the model's vocabulary has "
                    f"{self.info.vocab_size} tokens; tokenize with the model's own tokenizer"
                )
        if request.sampling.max_new_tokens > self.limits.new_tokens:
            raise PromptError(
                f"max_tokens is {request.sampling.max_new_tokens}; this service generates at most "
                f"{self.limits.new_tokens}"
            )
        if request.stop and self._tokenizer is None:
            raise PromptError(
                f"the model {self.info.model} has no tokenizer, so its answers have no text to "
                "stop at; leave stop out, or put the tokenizer files beside the model"
            )
        if len(request.stop) > MAX_STOPS or "" in request.stop:
            raise PromptError(f"stop takes up to {MAX_STOPS} strings, none of them empty")
        if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
            raise PromptError(
                f"the request id has {len(request.request_id)} characters; use at most "
                f"{MAX_REQUEST_ID_LENGTH}, or leave it out"
            )
        if abs(request.priority) > MAX_PRIORITY:
            raise PromptError(
                f"the priority is {request.priority}; use one from -{MAX_PRIORITY} to "
                f"{MAX_PRIORITY}"
            )
        sampling = request.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            # Where a worker is lost another draws the same tokens again.
            sampling = replace(sampling, seed=secrets.randbits(SEED_BITS))
        config = self.config.replace(**request.compression)
        plan = MergePlan.build(
            len(prompt.prefix),
            len(prompt.context),
            len(prompt.suffix),
            self.info.num_layers,
            config,
        )
        # Workers refuse an id that was released before; a user may repeat theirs.
        job_id = f"{request_id}-{uuid.uuid4().hex}" if request.request_id else request_id
        return Job(
            job_id,
            plan,
            *prompt,
            sampling=sampling,
            priority=request.priority,
            spans=self.seeing.spans(job_id, plan),
            # All workers together report no more than a few hundred times a second.
            report_seconds=REPORT_SECONDS_PER_WORKER * len(self.scheduler.workers),
            with_evidence=request.return_evidence,
        )

    def _document(self, request: Request) -> LocatedText | None:
        """Where the document's tokens are, for the evidence; asked for when the answer is there."""
        prompt = request.prompt
        if not request.return_evidence or not isinstance(prompt, TextPrompt) or not self._tokenizer:
            return None
        return self._tokenizer.locate(prompt.context)

    def _tokenize(self, prompt: TextPrompt) -> PromptIds:
        if self._tokenizer is None:
            raise ModelError(
                f"the model {self.info.model} has no tokenizer: send token ids, or put its "
                "tokenizer files beside it"
            )
        return self._tokenizer.prompt_ids(prompt.prefix, prompt.context, prompt.suffix)
