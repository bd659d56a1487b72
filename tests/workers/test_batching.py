"""Answers that a worker decodes together are those that it decodes alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import grpc
import pytest

from homer import HomerModel, MergePlan
from tests.golden_cases import GoldenCase
from tests.workers.processes import CALL_SECONDS, Prompt, WorkerProcess, eventually, release
from tests.workers.test_across import local_model, plan_of
from tests.workers.test_calls import ENDLESS_TOKENS, run_subtree

_numbers = count()


@dataclass
class Asked:
    """One of several answers: a prompt of a length of its own, and how it is sampled."""

    prompt: Prompt
    max_tokens: int
    sampling: dict[str, Any]
    expected: list[int]


def asked(number: int) -> Asked:
    """Answer `number`: lengths, samplings and numbers of tokens all differ."""
    case = GoldenCase.load("a_16c")
    prefix, context, suffix = (part.flatten() for part in case.parts)
    context = context[: len(context) // (1 + number % 3) - 7 * number]
    config = plan_of(case, "refreshed").config
    plan = MergePlan.build(len(prefix), len(context), len(suffix), case.num_layers, config)
    sampling: dict[str, Any] = {} if number % 2 else {"temperature": 0.9, "seed": number}
    if number % 4 == 0:
        sampling["repetition_penalty"] = 1.5
    max_tokens = 6 + 5 * number
    local = local_model("a_16c")
    model = HomerModel(local.model, config, local.bias)
    parts = (prefix, context, suffix)
    expected = model.generate(
        model.compress(*parts), max_new_tokens=max_tokens, ignore_eos=True, **sampling
    )
    prompt = Prompt.of(f"batch/{next(_numbers)}", plan, parts)
    return Asked(prompt, max_tokens, sampling, expected.tolist())


def answer(worker: WorkerProcess, one: Asked) -> list[int]:
    request = one.prompt.generate([], one.max_tokens, **one.sampling)
    events = list(worker.stub.GenerateTokens(request, timeout=CALL_SECONDS))
    assert events[-1].summary.generated_tokens == one.max_tokens
    return [event.token.token_id for event in events[1:-1]]


@pytest.fixture
def answers(workers: list[WorkerProcess]) -> Iterator[list[Asked]]:
    """Eight requests whose roots are done on the first worker."""
    eight = [asked(number) for number in range(8)]
    for one in eight:
        run_subtree(workers[0], one.prompt.subtree(one.prompt.plan.root.id))
    yield eight
    for one in eight:
        release(one.prompt, workers)
    eventually(lambda: all(worker.holds_nothing() for worker in workers))


def test_answers_decoded_together_are_those_decoded_alone(
    workers: list[WorkerProcess], answers: list[Asked]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda one: answer(workers[0], one), answers))
    assert got == [one.expected for one in answers]


def test_answers_go_on_when_others_are_cancelled(
    workers: list[WorkerProcess], answers: list[Asked]
) -> None:
    worker = workers[0]
    endless = [
        worker.stub.GenerateTokens(one.prompt.generate([], ENDLESS_TOKENS), timeout=CALL_SECONDS)
        for one in answers[:2]
    ]
    for call in endless:
        while next(call).WhichOneof("event") != "token":
            pass
    with ThreadPoolExecutor(6) as pool:
        going = [pool.submit(answer, worker, one) for one in answers[2:]]
        endless[0].cancel()
        release(answers[1].prompt, [worker])
        assert [future.result() for future in going] == [one.expected for one in answers[2:]]
    with pytest.raises(grpc.RpcError) as ended:
        list(endless[1])
    error: Any = ended.value
    assert error.code() is grpc.StatusCode.ABORTED
    # What was cancelled can be asked for again, from the same cache.
    assert answer(worker, answers[0]) == answers[0].expected


def test_an_answer_comes_while_a_long_document_is_read(
    workers: list[WorkerProcess], answers: list[Asked]
) -> None:
    """Both go on: neither the nodes nor the tokens wait until the others are done."""
    worker, one = workers[0], answers[0]
    long = [asked(0).prompt for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        reading = [
            pool.submit(run_subtree, worker, prompt.subtree(prompt.plan.root.id)) for prompt in long
        ]
        before = worker.stats().leaves_done
        eventually(lambda: worker.stats().leaves_done > before)
        assert answer(worker, one) == one.expected
        for future in reading:
            future.result()
    for prompt in long:
        release(prompt, [worker])
