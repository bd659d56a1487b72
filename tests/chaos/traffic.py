"""Requests with known answers: prompts of the demo model, and what an undisturbed process says.

Knows nothing about workers or faults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import torch

from cluster.job import Job, JobSummary, Sampling, TokenOut
from cluster.scheduler import Scheduler
from cluster.text import PromptIds, PromptTokenizer
from homer import HomerModel, MergePlan
from homer.demo import MODEL_DIR
from homer.demo.tasks import make_sample
from homer.shape import BIAS_FILE, homer_defaults

LENGTHS = (700, 3000, 6000, 12_000)
NEW_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """A prompt, its settings, and the right answer."""

    name: str
    plan: MergePlan
    ids: PromptIds
    sampling: Sampling
    context_indices: Sequence[int]
    tokens: Sequence[int]

    def job(self, request_id: str) -> Job:
        return Job(request_id, self.plan, *self.ids, sampling=self.sampling)


def questions(lengths: Sequence[int] = LENGTHS, new_tokens: int = NEW_TOKENS) -> list[Question]:
    """One greedy and one sampled question for each length, answered in this process."""
    tokenizer = PromptTokenizer.load(str(MODEL_DIR))
    assert tokenizer is not None
    config = homer_defaults(MODEL_DIR)
    torch.set_num_threads(1)
    model = HomerModel.from_pretrained(
        MODEL_DIR, config, MODEL_DIR / BIAS_FILE, device="cpu", dtype="float32"
    )
    out: list[Question] = []
    for seed, length in enumerate(lengths):
        sample = make_sample("passkey", length, tokenizer.count_tokens, seed=seed)
        ids = tokenizer.prompt_ids(sample.prefix, sample.context, sample.suffix)
        prefix, document, suffix = (torch.tensor(part) for part in ids)
        context = model.compress(prefix, document, suffix)
        plan = model.plan(len(ids.prefix), len(ids.context), len(ids.suffix))
        for kind, sampling in (
            ("greedy", Sampling(max_new_tokens=new_tokens, ignore_eos=True)),
            (
                "sampled",
                Sampling(
                    max_new_tokens=new_tokens,
                    ignore_eos=True,
                    temperature=1.0,
                    top_p=0.95,
                    repetition_penalty=1.1,
                    seed=seed + 1,
                ),
            ),
        ):
            tokens = model.generate(context, **dataclasses.asdict(sampling)).tolist()
            kept = context.context_indices.tolist()
            out.append(Question(f"{length} {kind}", plan, ids, sampling, kept, tokens))
    return out


async def ask(scheduler: Scheduler, question: Question, request_id: str) -> str | None:
    """Run a question; None when the answer is right, else what is wrong with it."""
    tokens: list[int] = []
    summary: JobSummary | None = None
    async with aclosing(cast(Any, scheduler.run(question.job(request_id)))) as events:
        async for event in events:
            if summary is not None:
                return f"{event} came after the summary"
            if isinstance(event, TokenOut):
                tokens.append(event.token_id)
            elif isinstance(event, JobSummary):
                summary = event
    if summary is None:
        return "it ended without a summary"
    if tokens != question.tokens:
        return f"tokens {tokens}, not {question.tokens}"
    if list(summary.context_indices) != question.context_indices:
        return "other context tokens survived"
    if summary.generated_tokens != len(tokens):
        return f"the summary counts {summary.generated_tokens} tokens of {len(tokens)}"
    return None
