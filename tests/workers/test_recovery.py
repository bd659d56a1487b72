"""What was lost with a worker is run again elsewhere, and the answer is the undisturbed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import grpc
import pytest
import torch

from homer import HomerModel, MergePlan
from homer.plan import NodeId
from homer.v1 import worker_pb2
from tests.golden_cases import GoldenCase
from tests.workers.conftest import WorkersOf
from tests.workers.processes import (
    CALL_SECONDS,
    Prompt,
    WorkerProcess,
    eventually,
    release,
    run_below_root,
    running_workers,
)
from tests.workers.test_across import local_model, plan_of
from tests.workers.test_calls import ENDLESS_TOKENS, LEAF, PARENT, fetch, refusal, run_subtree

TOKENS = 10
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "seed": 5}
_numbers = count()


def expected_answer(name: str, plan: MergePlan) -> tuple[list[int], list[int]]:
    """Surviving indices and tokens of the same prompt in one process."""
    local = local_model(name)
    model = HomerModel(local.model, plan.config, local.bias)
    context = model.compress(*GoldenCase.load(name).parts)
    tokens = model.generate(context, max_new_tokens=TOKENS, ignore_eos=True, **SAMPLING)
    return context.context_indices.tolist(), tokens.tolist()


@dataclass
class Run:
    """A prompt over workers of which some get lost: what lies where, and what has to run again."""

    prompt: Prompt
    workers: Sequence[WorkerProcess]
    cut_height: int
    places: dict[NodeId, int] = field(default_factory=dict)
    merged: dict[NodeId, list[int]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)

    def run(self) -> None:
        self.places, merges = run_below_root(self.prompt, self.workers, self.cut_height)
        self.merged = {node: list(done.context_indices) for node, done in merges.items()}

    def lose(self, where: int) -> None:
        """What `where` held is gone, and it is not asked any more."""
        reset = self.workers[where].stub.Reset(worker_pb2.ResetRequest(), timeout=CALL_SECONDS)
        assert reset.released_requests == 1
        assert reset.freed_bytes > 0
        self.lost.add(where)

    def repair(self, attempt: int) -> None:
        """Run again what was lost, in the order of the plan, on whoever is left in turn."""
        alive = [where for where in range(len(self.workers)) if where not in self.lost]
        lost = [node for node in self.places if self.places[node] in self.lost]
        for number, node_id in enumerate(lost):
            where = alive[number % len(alive)]
            self.places[node_id] = where
            worker = self.workers[where]
            if node_id.height == self.cut_height:
                run_subtree(worker, self.prompt.subtree(node_id, attempt))
                self._prune_to_highest(node_id, where)
                continue
            addresses = [
                "" if self.places[child] == where else self.workers[self.places[child]].address
                for child in self.prompt.plan.by_id[node_id].children
            ]
            request = self.prompt.merge(node_id, addresses, attempt)
            done = worker.stub.Merge(request, timeout=CALL_SECONDS)
            # The same as before, for the result of a node depends on nothing but the prompt.
            assert list(done.context_indices) == self.merged[node_id]
            self._prune_to_highest(node_id, where)

    def _prune_to_highest(self, node_id: NodeId, where: int) -> None:
        top, parents = node_id, self.prompt.plan.parents
        while parents.get(top) in self.merged:
            top = parents[top]
        if top != node_id:
            self.workers[where].stub.Prune(
                self.prompt.prune(top, self.merged[top]), timeout=CALL_SECONDS
            )

    def answer(
        self, attempt: int = 0, resume: Sequence[int] = ()
    ) -> Iterator[worker_pb2.GenerateTokensResponse]:
        root = self.places[self.prompt.plan.root.id]
        others = [self.workers[w].address for w in set(self.places.values()) - {root}]
        request = self.prompt.generate(others, TOKENS, attempt, resume, **SAMPLING)
        return self.workers[root].stub.GenerateTokens(request, timeout=CALL_SECONDS)


@pytest.mark.parametrize("mode", ["paper", "refreshed", "wide"])
@pytest.mark.parametrize(("name", "cut_height"), [("a_16c", 0), ("a_16c", 1), ("g_5c_gqa", 0)])
@pytest.mark.parametrize("which", ["root", "other"])
def test_an_answer_survives_the_loss_of_a_worker(
    workers_of: WorkersOf, name: str, cut_height: int, mode: str, which: str
) -> None:
    case = GoldenCase.load(name)
    workers = workers_of(case.case["model"])
    plan = plan_of(case, mode)
    prompt = Prompt.of(f"lost/{next(_numbers)}", plan, case.parts)
    indices, tokens = expected_answer(name, plan)
    run = Run(prompt, workers, cut_height)
    run.run()
    root = run.places[plan.root.id]
    before = list(run.answer())
    assert [event.token.token_id for event in before[1:-1]] == tokens
    delivered = tokens[:4] if which == "root" else []

    run.lose(root if which == "root" else 1 - root)
    run.repair(attempt=1)
    events = list(run.answer(attempt=1, resume=delivered))

    assert list(events[0].cache_ready.context_indices) == indices
    assert delivered + [event.token.token_id for event in events[1:-1]] == tokens
    assert events[-1].summary.generated_tokens == TOKENS
    release(prompt, workers)
    assert all(worker.holds_nothing() for worker in workers)


@pytest.mark.parametrize("mode", ["paper", "refreshed"])
def test_losses_one_after_the_other_before_the_root_is_used(
    workers_of: WorkersOf, mode: str
) -> None:
    """Each worker is lost once: first one that holds no root, then that of the root."""
    case = GoldenCase.load("a_16c")
    plan = plan_of(case, mode)
    prompt = Prompt.of(f"losses/{next(_numbers)}", plan, case.parts)
    indices, tokens = expected_answer("a_16c", plan)
    with running_workers(case.model_dir, count=1) as more:
        workers = [*workers_of("A"), *more]
        run = Run(prompt, workers, cut_height=1)
        run.run()
        run.lose(next(w for w in range(3) if w != run.places[plan.root.id]))
        run.repair(attempt=1)
        run.lose(run.places[plan.root.id])
        run.repair(attempt=2)
        events = list(run.answer())
        release(prompt, workers)
        assert all(worker.holds_nothing() for worker in workers)
    assert list(events[0].cache_ready.context_indices) == indices
    assert [event.token.token_id for event in events[1:-1]] == tokens


def test_an_answer_goes_on_when_its_process_is_killed() -> None:
    case = GoldenCase.load("a_16c")
    plan = plan_of(case, "refreshed")
    prompt = Prompt.of("killed", plan, case.parts)
    _, tokens = expected_answer("a_16c", plan)
    with running_workers(case.model_dir, count=1) as left:
        killed = WorkerProcess(case.model_dir).wait_until_ready()
        run = Run(prompt, [*left, killed], cut_height=1)
        run.run()
        assert run.places[plan.root.id] == 1
        got: list[int] = []
        try:
            for event in run.answer():
                if event.WhichOneof("event") == "token":
                    got.append(event.token.token_id)
                if len(got) == 3:
                    killed.process.kill()
        except grpc.RpcError:
            pass
        killed.process.wait()
        assert got == tokens[: len(got)]
        run.lost.add(1)
        run.repair(attempt=1)
        events = list(run.answer(attempt=1, resume=got))
    assert got + [event.token.token_id for event in events[1:-1]] == tokens


@pytest.fixture
def prompt(workers: list[WorkerProcess]) -> Iterator[Prompt]:
    """A prompt of four leaves under an id of its own; released when the test ends."""
    case = GoldenCase.load("a_4c_full")
    prompt = Prompt.of(f"recovery/{next(_numbers)}", case.plan, case.parts)
    yield prompt
    release(prompt, workers)
    eventually(lambda: all(worker.holds_nothing() for worker in workers))


def test_states_stay_until_the_request_is_released(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    places, _ = run_below_root(prompt, workers, cut_height=0)
    assert sum(worker.stats().node_states for worker in workers) == len(prompt.plan.nodes)
    for node, where in places.items():
        if node != prompt.plan.root.id:
            assert fetch(workers[where], prompt.request_id, node)["context_indices"]


def test_a_node_that_won_elsewhere_is_forgotten(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(LEAF, attempt=1))
    held = worker.stats()
    older = worker.stub.Drop(prompt.drop(LEAF, attempt=0), timeout=CALL_SECONDS)
    assert older.freed_bytes == 0
    dropped = worker.stub.Drop(prompt.drop(LEAF, attempt=1), timeout=CALL_SECONDS)
    assert dropped.freed_bytes == held.state_bytes + held.kv_shard_bytes
    assert (worker.stats().node_states, worker.stats().kv_shards) == (0, 0)
    code, message = refusal(lambda: run_subtree(worker, prompt.subtree(LEAF, attempt=1)))
    assert code is grpc.StatusCode.ABORTED
    assert "dropped" in message
    run_subtree(worker, prompt.subtree(LEAF, attempt=2))
    assert worker.stats().node_states == 1


def test_a_merge_that_is_forgotten_leaves_its_children(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    """The children may be needed by whoever merges them in its place."""
    worker = workers[0]
    for child in prompt.plan.by_id[PARENT].children:
        run_subtree(worker, prompt.subtree(child))
    merge = prompt.merge(PARENT, ["", ""])
    merged = worker.stub.Merge(merge, timeout=CALL_SECONDS)
    worker.stub.Drop(prompt.drop(PARENT), timeout=CALL_SECONDS)
    assert (worker.stats().node_states, worker.stats().kv_shards) == (2, 2)
    merge.attempt = 1
    again = worker.stub.Merge(merge, timeout=CALL_SECONDS)
    assert again.context_indices == merged.context_indices


def test_a_drop_stops_what_runs(workers: list[WorkerProcess], prompt: Prompt) -> None:
    worker, root = workers[0], prompt.plan.root.id
    call = worker.stub.RunSubtree(prompt.subtree(root), timeout=CALL_SECONDS)
    next(iter(call))
    worker.stub.Drop(prompt.drop(root), timeout=CALL_SECONDS)
    code, _ = refusal(lambda: list(call))
    assert code is grpc.StatusCode.ABORTED
    eventually(lambda: worker.stats().running_calls == 0)
    assert worker.stats().node_states == 0


def test_a_drop_for_a_request_that_never_came_does_nothing(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    assert workers[0].stub.Drop(prompt.drop(LEAF), timeout=CALL_SECONDS).freed_bytes == 0


def test_reset_releases_all_but_what_is_kept(workers: list[WorkerProcess], prompt: Prompt) -> None:
    worker = workers[0]
    other = Prompt.of(f"{prompt.request_id}/other", prompt.plan, GoldenCase.load("a_4c_full").parts)
    for one in (prompt, other):
        run_subtree(worker, one.subtree(LEAF))
    reset = worker_pb2.ResetRequest(keep_request_ids=[other.request_id])
    assert worker.stub.Reset(reset, timeout=CALL_SECONDS).released_requests == 1
    assert worker.stats().requests == 1
    run_subtree(worker, other.subtree(PARENT))
    assert worker.stub.Reset(worker_pb2.ResetRequest(), timeout=CALL_SECONDS).released_requests == 1
    assert worker.holds_nothing()


def test_a_worker_that_was_reset_takes_part_again_in_what_goes_on(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(PARENT))
    worker.stub.Reset(worker_pb2.ResetRequest(), timeout=CALL_SECONDS)
    run_subtree(worker, prompt.subtree(LEAF, attempt=1))
    assert worker.stats().node_states == 1


def test_a_call_whose_caller_has_gone_leaves_no_trace(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    call = worker.stub.RunSubtree(prompt.subtree(prompt.plan.root.id), timeout=CALL_SECONDS)
    next(iter(call))
    call.cancel()
    eventually(lambda: worker.stats().running_calls == 0)
    assert worker.holds_nothing()


def test_an_answer_goes_on_where_it_was_cut_off(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(prompt.plan.root.id))

    def answer(attempt: int, resume: Sequence[int]) -> list[Any]:
        request = prompt.generate([], TOKENS, attempt, resume, **SAMPLING, repetition_penalty=1.3)
        return list(worker.stub.GenerateTokens(request, timeout=CALL_SECONDS))

    whole = [event.token.token_id for event in answer(0, [])[1:-1]]
    made = worker.stats().generated_tokens
    for attempt, delivered in enumerate((1, 6, TOKENS), start=1):
        events = answer(attempt, whole[:delivered])
        assert [event.token.token_id for event in events[1:-1]] == whole[delivered:]
        assert events[-1].summary.generated_tokens == TOKENS
    # Only tokens that were streamed count as the worker's.
    assert worker.stats().generated_tokens - made == (TOKENS - 1) + (TOKENS - 6)
    for attempt, resume, words in (
        (4, [0] * (TOKENS + 1), "delivered already"),
        (4, [10**6], "vocabulary"),
    ):
        code, message = refusal(lambda a=attempt, r=resume: answer(a, r))  # type: ignore[misc]
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in message
    code, message = refusal(lambda: answer(3, whole[:2]))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "newer attempt" in message


def test_several_answers_go_on_where_they_were_cut_off(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(prompt.plan.root.id))
    sampling = {**SAMPLING, "n": 3, "logprobs": 1}

    def answers(attempt: int, delivered: Sequence[Sequence[int]]) -> list[list[Any]]:
        request = prompt.generate([], TOKENS, attempt, **sampling)
        request.ClearField("delivered")
        request.delivered.extend(worker_pb2.DeliveredTokens(token_ids=ids) for ids in delivered)
        told: list[list[Any]] = [[], [], []]
        ended = []
        for event in worker.stub.GenerateTokens(request, timeout=CALL_SECONDS):
            match event.WhichOneof("event"):
                case "token":
                    told[event.token.answer].append(event.token)
                case "summary":
                    ended.append((event.summary.answer, event.summary.generated_tokens))
        assert sorted(ended) == [(number, TOKENS) for number in range(3)]
        return told

    whole = answers(0, [])
    ids = [[piece.token_id for piece in one] for one in whole]
    assert len({tuple(one) for one in ids}) == 3
    # The first is what it is alone.
    alone = worker.stub.GenerateTokens(
        prompt.generate([], TOKENS, 1, **SAMPLING), timeout=CALL_SECONDS
    )
    assert [event.token.token_id for event in alone if event.HasField("token")] == ids[0]
    # Answers that others leave are decoded in other batches, so the last digits may differ.
    rest = answers(2, [ids[0][:1], ids[1], ids[2][:4]])
    for one, expected in zip(rest, (whole[0][1:], [], whole[2][4:]), strict=True):
        assert [piece.token_id for piece in one] == [piece.token_id for piece in expected]
        assert [piece.logprob.logprob for piece in one] == pytest.approx(
            [piece.logprob.logprob for piece in expected], abs=1e-4
        )
    code, message = refusal(lambda: answers(3, [[]] * 4))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "4 had begun" in message


def test_one_of_several_answers_is_ended_alone(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(prompt.plan.root.id))

    def answers(attempt: int, max_tokens: int, *ended: bool) -> Iterator[tuple[int, int]]:
        """Which answer each token is of, and the token."""
        request = prompt.generate([], max_tokens, attempt, **SAMPLING, n=3)
        request.ClearField("delivered")
        request.delivered.extend(worker_pb2.DeliveredTokens(ended=one) for one in ended)
        for event in worker.stub.GenerateTokens(request, timeout=CALL_SECONDS):
            if event.HasField("token"):
                yield event.token.answer, event.token.token_id

    def end(number: int) -> None:
        request = worker_pb2.EndAnswerRequest(request_id=prompt.request_id, answer=number)
        worker.stub.EndAnswer(request, timeout=CALL_SECONDS)

    def reserves(nbytes: int) -> bool:
        return worker.stats().reserved_bytes == nbytes

    told: list[list[int]] = [[], [], []]
    copies = 0
    # Far more tokens than there is time for: the answers have to be ended.
    for number, token in answers(0, ENDLESS_TOKENS):
        told[number].append(token)
        if min(map(len, told)) >= TOKENS and not copies:
            copies = worker.stats().reserved_bytes
            end(1)
            eventually(partial(reserves, copies // 2))
            for again in (1, 0, 2):
                end(again)
    assert worker.stats().reserved_bytes == 0 < copies
    assert max(map(len, told)) < ENDLESS_TOKENS
    # What has ended is not begun again.
    kept: list[list[int]] = [[], [], []]
    for number, token in answers(1, TOKENS, False, True):
        kept[number].append(token)
    assert kept == [told[0][:TOKENS], [], told[2][:TOKENS]]
    request = worker_pb2.EndAnswerRequest(request_id="nobody's")
    code, _ = refusal(lambda: worker.stub.EndAnswer(request, timeout=CALL_SECONDS))
    assert code is grpc.StatusCode.NOT_FOUND


def test_nodes_say_when_they_began(workers: list[WorkerProcess], prompt: Prompt) -> None:
    worker = workers[0]
    events = run_subtree(worker, prompt.subtree(PARENT))
    ends = [event.started_unix_seconds + event.compute_seconds for event in events]
    starts = [event.started_unix_seconds for event in events]
    assert starts == sorted(starts)
    # Clocks of wall time and of seconds passed agree within a few milliseconds.
    assert all(end < start + 0.05 for end, start in zip(ends, starts[1:], strict=False))


def test_each_process_has_an_id_of_its_own(workers: list[WorkerProcess]) -> None:
    infos = [
        worker.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=CALL_SECONDS)
        for worker in workers
    ]
    assert len({info.worker_id for info in infos} - {""}) == 2
    row = 2 * infos[0].num_kv_heads * infos[0].head_dim * torch.float32.itemsize
    assert infos[0].kv_bytes_per_token == infos[0].num_layers * row
