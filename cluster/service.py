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

from cluster.errors import RequestAbortedError
from cluster.job import (
    CacheReady,
    Job,
    JobProgress,
    JobSummary,
    Logprob,
    Sampling,
    Stop,
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

    `document_bytes` bounds a document that is sent in pieces, `all_documents_bytes` those that are
    there at the same time; whatever is in one message is bounded by `message_bytes`. A message of a
    request comes within `read_seconds`, and a caller who reads nothing of an answer for
    `write_seconds` loses it.
    """

    message_bytes: int = 64 << 20
    metadata_bytes: int = 16 << 10
    calls_per_token: int = 256
    read_seconds: float = 120.0
    write_seconds: float = 60.0
    document_bytes: int = 256 << 20
    all_documents_bytes: int = 1 << 30
    context_tokens: int = 1 << 20
    new_tokens: int = 1 << 16
    answers: int = 16


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
    answers: int = 1
    stop: Sequence[str] = ()
    compression: Mapping[str, Any] = field(default_factory=dict)
    return_kept_indices: bool = False
    priority: int = 0
    return_evidence: bool = False
    # Whose it is: the name of a token, or empty where none is asked for.
    caller: str = ""


@dataclass(eq=False)
class _Running:
    """A request between its arrival and its end; it has a job once it was understood."""

    request_id: str
    caller: str
    job_id: str = ""
    aborted: bool = False


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
    """A generated token, and the text that became certain with it.

    `logprobs` are its own and then those of the likeliest, each with its token as text, where they
    were asked for.
    """

    token_id: int
    text: str
    answer: int = 0
    logprobs: Sequence[tuple[Logprob, str]] = ()


class AnswerText:
    """An answer as it grows: its tokens, and its text up to where a stop string begins."""

    def __init__(self, tokenizer: PromptTokenizer | None, stops: Sequence[str]) -> None:
        self._stream = tokenizer.stream() if tokenizer else None
        self._stops = StopText(stops)
        self._pieces: list[str] = []
        self.token_ids: list[int] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it."""
        return self._stops.stopped

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that became certain with it."""
        self.token_ids.append(token_id)
        text = self._stops.push(self._stream.push(token_id)) if self._stream else ""
        self._pieces.append(text)
        return text

    def finish(self) -> None:
        """Take the text that was held back."""
        if self._stream:
            self._pieces.append(self._stops.push(self._stream.finish()) + self._stops.finish())


@dataclass(frozen=True)
class Finished:
    """All answers, complete; `document` is there where evidence was asked for of a text."""

    request_id: str
    job: Job
    summary: JobSummary
    answers: Sequence[AnswerText]
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
        self._running: set[_Running] = set()

    @property
    def has_tokenizer(self) -> bool:
        """Whether it takes and gives text."""
        return self._tokenizer is not None

    def abort(self, request_id: str, caller: str = "") -> int:
        """End the requests that `caller` began under a name, theirs or the service's own.

        Returns how many: those of others are none to them.
        """
        named = [
            one
            for one in self._running
            if request_id in (one.request_id, one.job_id)
            and one.caller == caller
            and not one.aborted
        ]
        for one in named:
            one.aborted = True
            self.scheduler.abort(one.job_id, _aborted(one))
        return len(named)

    async def generate(self, request: Request) -> AsyncIterator[ServiceEvent]:
        """Answer `request`. Close the iterator to cancel.

        Raises
        ------
        PromptError, PlanError, ConfigError
            When the request cannot be answered as it is.
        WorkerLostError, WorkerCallError
            When the workers failed.
        RequestAbortedError
            When somebody ended it by its name.
        """
        running = _Running(request.request_id or uuid.uuid4().hex, request.caller)
        self._running.add(running)
        try:
            async with aclosing(cast(Any, self._generate(request, running))) as events:
                async for event in events:
                    yield event
        finally:
            self._running.remove(running)

    async def _generate(self, request: Request, running: _Running) -> AsyncIterator[ServiceEvent]:
        request_id = running.request_id
        log_about(request_id=request_id)
        # Tokenizing a long document takes seconds: other requests must not wait for it.
        job = await asyncio.to_thread(self._prepare, request, request_id)
        running.job_id = job.request_id
        log_about(request_id=job.request_id)
        uncalibrated = job.plan.config.wants_bias and not self.info.calibrated
        yield Accepted(request_id, job, self.scheduler.subtrees(job.plan), uncalibrated)
        if running.aborted:
            # The scheduler did not know it yet.
            raise _aborted(running)
        answers = [AnswerText(self._tokenizer, request.stop) for _ in range(job.answers)]
        # An async generator has `aclose`, which AsyncIterator does not promise.
        async with aclosing(cast(Any, self.scheduler.run(job))) as events:
            async for event in events:
                match event:
                    case TokenOut(token_id, number):
                        answer = answers[number]
                        if answer.stopped:
                            # Was on its way when the answer was ended.
                            continue
                        text = answer.push(token_id)
                        yield TokenText(token_id, text, number, self._with_text(event))
                        if answer.stopped:
                            self.scheduler.stop_answer(job.request_id, number)
                    case JobSummary():
                        for answer in answers:
                            answer.finish()
                        count = sum(len(answer.token_ids) for answer in answers)
                        reasons: list[Stop] = [
                            "stop" if answer.stopped else reason
                            for answer, reason in zip(answers, event.finish_reasons, strict=True)
                        ]
                        event = replace(event, generated_tokens=count, finish_reasons=reasons)
                        document = await asyncio.to_thread(self._document, request)
                        yield Finished(request_id, job, event, answers, document)
                    case _:
                        yield event

    def _with_text(self, token: TokenOut) -> list[tuple[Logprob, str]]:
        if token.logprob is None:
            return []
        found = (token.logprob, *token.top_logprobs)
        spell = self._tokenizer.spell if self._tokenizer else lambda _: ""
        return [(one, spell(one.token_id)) for one in found]

    def _prepare(self, request: Request, request_id: str) -> Job:
        prompt = request.prompt
        if isinstance(prompt, TextPrompt):
            prompt = self.tokenize(prompt)
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
        if not 1 <= request.answers <= self.limits.answers:
            raise PromptError(
                f"n is {request.answers}; this service gives from 1 to {self.limits.answers} "
                "answers"
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
            answers=request.answers,
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

    def tokenize(self, prompt: TextPrompt) -> PromptIds:
        """The token ids of a prompt.

        Raises
        ------
        ModelError
            When the model has no tokenizer.
        """
        if self._tokenizer is None:
            raise ModelError(
                f"the model {self.info.model} has no tokenizer: send token ids, or put its "
                "tokenizer files beside it"
            )
        return self._tokenizer.prompt_ids(prompt.prefix, prompt.context, prompt.suffix)


def _aborted(running: _Running) -> RequestAbortedError:
    return RequestAbortedError(f"request {running.request_id!r} was aborted")
