"""What a worker does with repeated, late, wrong and abandoned calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from typing import Any, cast

import grpc
import pytest

from homer import MergePlan
from homer.errors import PromptError
from homer.plan import NodeId
from homer.v1 import sampling_pb2, tensor_pb2, worker_pb2
from tests.golden_cases import GoldenCase
from tests.workers.processes import (
    CALL_SECONDS,
    Prompt,
    WorkerProcess,
    eventually,
    release,
    run_below_root,
)
from workers.frames import decode_frame
from workers.intake import read_delivered
from workers.plan_wire import write_node
from workers.tensor_stream import Limits, StreamReader

_numbers = count()
LEAF, PARENT = NodeId(0, 0), NodeId(1, 0)
ENDLESS_TOKENS = 20_000


@cache
def case() -> GoldenCase:
    return GoldenCase.load("a_4c_full")


@pytest.fixture
def prompt(workers: list[WorkerProcess]) -> Iterator[Prompt]:
    """A prompt of four leaves under an id of its own; released when the test ends."""
    prompt = Prompt.of(f"calls/{next(_numbers)}", case().plan, case().parts)
    yield prompt
    release(prompt, workers)
    eventually(lambda: all(worker.holds_nothing() for worker in workers))


def run_subtree(worker: WorkerProcess, request: worker_pb2.RunSubtreeRequest) -> list[Any]:
    return list(worker.stub.RunSubtree(request, timeout=CALL_SECONDS))


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Status and message with which a call is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def fetch(worker: WorkerProcess, request_id: str, node: NodeId) -> dict[str, Any]:
    request = worker_pb2.FetchStateRequest(request_id=request_id, node=write_node(node))
    # The generated client parses every frame itself: what we write by hand is true protobuf.
    frames = list(worker.stub.FetchState(request, timeout=CALL_SECONDS))
    assert all(isinstance(frame, tensor_pb2.TensorFrame) for frame in frames)
    reader = StreamReader(Limits(total_bytes=1 << 24, tensors=64))
    tensors = [
        named for frame in frames for named in reader.feed(decode_frame(frame.SerializeToString()))
    ]
    reader.finish()
    return {named.name: named.tensor.tolist() for named in tensors}


def test_a_repeated_subtree_is_not_run_again(workers: list[WorkerProcess], prompt: Prompt) -> None:
    worker = workers[0]
    first = run_subtree(worker, prompt.subtree(PARENT))
    between = worker.stats()
    state = fetch(worker, prompt.request_id, PARENT)

    assert run_subtree(worker, prompt.subtree(PARENT)) == first
    assert run_subtree(worker, prompt.subtree(PARENT, attempt=3)) == first
    after = worker.stats()
    assert (after.leaves_done, after.merges_done) == (between.leaves_done, between.merges_done)
    assert (after.node_states, after.kv_shard_bytes) == (1, between.kv_shard_bytes)
    assert fetch(worker, prompt.request_id, PARENT) == state


def test_an_older_attempt_is_refused(workers: list[WorkerProcess], prompt: Prompt) -> None:
    run_subtree(workers[0], prompt.subtree(LEAF, attempt=2))
    code, message = refusal(lambda: run_subtree(workers[0], prompt.subtree(LEAF, attempt=1)))
    assert code is grpc.StatusCode.ABORTED
    assert "older than attempt 2" in message


def test_repeated_merges_prunes_and_answers_do_no_harm(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    places, merges = run_below_root(prompt, workers, cut_height=0)
    root = prompt.plan.root.id
    merger, other = workers[places[root]], workers[1 - places[root]]
    addresses = [
        "" if places[child] == places[root] else workers[places[child]].address
        for child in prompt.plan.root.children
    ]
    done = merger.stats().merges_done
    again = merger.stub.Merge(prompt.merge(root, addresses), timeout=CALL_SECONDS)
    assert again == merges[root]
    assert merger.stats().merges_done == done

    held = other.stats()
    prune = prompt.prune(root, merges[root].context_indices)
    assert other.stub.Prune(prune, timeout=CALL_SECONDS).freed_bytes == 0
    assert other.stats().kv_shard_bytes == held.kv_shard_bytes > 0
    assert held.node_states == 3

    request = prompt.generate([other.address], max_tokens=6)
    answers = [list(merger.stub.GenerateTokens(request, timeout=CALL_SECONDS)) for _ in range(2)]
    assert answers[0] == answers[1]
    generated = merger.stats().generated_tokens
    newer = prompt.generate([other.address], max_tokens=6, attempt=1)
    assert list(merger.stub.GenerateTokens(newer, timeout=CALL_SECONDS)) == answers[0]
    assert merger.stats().generated_tokens == generated


def test_a_merge_that_failed_for_its_peer_can_be_repeated(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    merger, other = workers
    right = prompt.plan.by_id[PARENT].children[1]
    run_subtree(merger, prompt.subtree(LEAF))
    request = prompt.merge(PARENT, ["", other.address])
    code, message = refusal(lambda: merger.stub.Merge(request, timeout=CALL_SECONDS))
    assert code is grpc.StatusCode.NOT_FOUND
    assert other.address in message

    run_subtree(other, prompt.subtree(right))
    merged = merger.stub.Merge(request, timeout=CALL_SECONDS)
    assert len(merged.context_indices) == prompt.plan.by_id[PARENT].context_out


def test_an_answer_whose_gather_failed_can_be_repeated(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    places, _ = run_below_root(prompt, workers, cut_height=0)
    root, other = (workers[places[prompt.plan.root.id]], workers[1 - places[prompt.plan.root.id]])
    code, message = refusal(
        lambda: list(
            root.stub.GenerateTokens(
                prompt.generate(["127.0.0.1:1"], max_tokens=4), timeout=CALL_SECONDS
            )
        )
    )
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "127.0.0.1:1" in message
    code, message = refusal(
        lambda: list(
            root.stub.GenerateTokens(prompt.generate([], max_tokens=4), timeout=CALL_SECONDS)
        )
    )
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "KV rows" in message
    assert root.stats().running_calls == 0
    assert other.stats().kv_shard_bytes > 0


def test_a_client_that_goes_away_stops_the_answer(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(prompt.plan.root.id))
    call = worker.stub.GenerateTokens(prompt.generate([], ENDLESS_TOKENS), timeout=CALL_SECONDS)
    events = iter(call)
    assert next(events).WhichOneof("event") == "cache_ready"
    assert next(events).WhichOneof("event") == "token"
    assert worker.stats().running_calls == 1
    call.cancel()
    eventually(lambda: worker.stats().running_calls == 0)
    # The step that was being made may still end; after a step of other work no more come.
    run_subtree(worker, prompt.subtree(LEAF))
    stopped_at = worker.stats().generated_tokens
    run_subtree(worker, prompt.subtree(NodeId(0, 1)))
    assert worker.stats().generated_tokens == stopped_at < ENDLESS_TOKENS

    again = list(worker.stub.GenerateTokens(prompt.generate([], 3), timeout=CALL_SECONDS))
    assert again[-1].summary.generated_tokens == 3


def test_other_work_goes_on_beside_an_answer(workers: list[WorkerProcess], prompt: Prompt) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(prompt.plan.root.id))
    call = worker.stub.GenerateTokens(prompt.generate([], ENDLESS_TOKENS), timeout=CALL_SECONDS)
    events = iter(call)
    next(events)
    other = Prompt.of(f"{prompt.request_id}/other", prompt.plan, case().parts)
    before = worker.stats().generated_tokens
    assert len(run_subtree(worker, other.subtree(other.plan.root.id))) == len(other.plan.nodes)
    between = worker.stats()
    assert before < between.generated_tokens < ENDLESS_TOKENS
    assert next(events).WhichOneof("event") == "token"
    release(other, [worker])
    call.cancel()


def test_release_stops_what_runs_and_frees_everything(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(prompt.plan.root.id))
    held = worker.stats()
    assert (held.requests, held.node_states) == (1, 1)
    assert held.state_bytes > 0
    assert held.kv_shard_bytes > 0
    call = worker.stub.GenerateTokens(prompt.generate([], ENDLESS_TOKENS), timeout=CALL_SECONDS)
    events = iter(call)
    next(events)

    assert release(prompt, [worker]) > 0
    code, message = refusal(lambda: list(events))
    assert code is grpc.StatusCode.ABORTED
    assert "released" in message
    eventually(worker.holds_nothing)
    assert release(prompt, [worker]) == 0


def test_a_late_call_cannot_bring_a_released_request_back(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    assert release(prompt, [worker]) == 0
    for attempt in (0, 5):
        late = prompt.subtree(LEAF, attempt)
        code, message = refusal(lambda late=late: run_subtree(worker, late))  # type: ignore[misc]
        assert code is grpc.StatusCode.ABORTED
        assert "new id" in message
    assert worker.holds_nothing()


def test_an_unknown_request_or_node_is_not_found(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    nobody = worker_pb2.GatherKvRequest(request_id="nobody")
    for call in (
        lambda: fetch(worker, "nobody", LEAF),
        lambda: list(worker.stub.GatherKv(nobody, timeout=CALL_SECONDS)),
        lambda: worker.stub.Prune(
            worker_pb2.PruneRequest(request_id="nobody"), timeout=CALL_SECONDS
        ),
    ):
        code, message = refusal(call)
        assert code is grpc.StatusCode.NOT_FOUND
        assert "nobody" in message
    run_subtree(worker, prompt.subtree(LEAF))
    code, message = refusal(lambda: fetch(worker, prompt.request_id, PARENT))
    assert code is grpc.StatusCode.NOT_FOUND


def _changed(prompt: Prompt, change: Callable[[Any], None]) -> worker_pb2.RunSubtreeRequest:
    request = prompt.subtree(LEAF)
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda r: r.context_ids.pop(), "INVALID_ARGUMENT", "context tokens"),
        (lambda r: r.context_ids.__setitem__(0, 10**6), "INVALID_ARGUMENT", "vocabulary"),
        (lambda r: setattr(r.node, "height", 9), "INVALID_ARGUMENT", "no node"),
        (lambda r: setattr(r.request, "request_id", ""), "INVALID_ARGUMENT", "request id"),
        (lambda r: r.request.suffix_ids.pop(), "INVALID_ARGUMENT", "suffix_ids"),
        (lambda r: r.request.prefix_ids.append(10), "INVALID_ARGUMENT", "prefix_ids"),
        (lambda r: setattr(r.request.plan, "max_chunk_len", 3), "INVALID_ARGUMENT", "chunk"),
        (lambda r: setattr(r.request.plan, "target_len", 1), "INVALID_ARGUMENT", "target_len"),
        (lambda r: setattr(r.request.plan, "context_len", 1 << 60), "INVALID_ARGUMENT", "tokens"),
        (lambda r: setattr(r.request.plan, "num_layers", 99), "FAILED_PRECONDITION", "99 layers"),
    ],
)
def test_a_wrong_call_is_refused_with_what_to_change(
    workers: list[WorkerProcess],
    prompt: Prompt,
    change: Callable[[Any], None],
    code: str,
    words: str,
) -> None:
    request = _changed(prompt, change)
    got, message = refusal(lambda: run_subtree(workers[0], request))
    assert got.name == code
    assert words in message


def test_one_id_cannot_mean_two_requests(workers: list[WorkerProcess], prompt: Prompt) -> None:
    run_subtree(workers[0], prompt.subtree(LEAF))
    other = _changed(prompt, lambda r: r.request.suffix_ids.__setitem__(0, 7))
    code, message = refusal(lambda: run_subtree(workers[0], other))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "its own id" in message


def test_wrong_children_spans_and_roots_are_refused(
    workers: list[WorkerProcess], prompt: Prompt
) -> None:
    worker = workers[0]
    run_subtree(worker, prompt.subtree(PARENT))
    merge = prompt.merge(PARENT, ["", ""])
    merge.children.reverse()
    prune = prompt.prune(PARENT, [])
    prune.context_end += 1
    not_root = prompt.generate([], 4)
    not_root.node.CopyFrom(write_node(LEAF))
    sampling = prompt.generate([], 4)
    sampling.sampling.CopyFrom(sampling_pb2.SamplingParams(top_p=1.5))
    for call, words in (
        (lambda: worker.stub.Merge(merge, timeout=CALL_SECONDS), "merges"),
        (lambda: worker.stub.Prune(prune, timeout=CALL_SECONDS), "spans"),
        (lambda: list(worker.stub.GenerateTokens(not_root, timeout=CALL_SECONDS)), "root"),
        (lambda: list(worker.stub.GenerateTokens(sampling, timeout=CALL_SECONDS)), "top_p"),
    ):
        code, message = refusal(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in message


def test_workers_say_what_they_are(workers: list[WorkerProcess]) -> None:
    worker = workers[0]
    info = worker.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=CALL_SECONDS)
    assert info.model == str(case().model_dir)
    assert (info.num_layers, info.hidden_size, info.num_kv_heads) == (8, 64, 4)
    assert (info.head_dim, info.dtype, info.device) == (16, "float32", "cpu")
    assert (info.calibrated, info.max_distance) == (True, 4095)
    assert info.process_id == worker.reported_pid == worker.process.pid
    assert worker.stats().resident_bytes > 50 << 20


def test_a_plan_is_the_same_on_both_sides(workers: list[WorkerProcess], prompt: Prompt) -> None:
    plan = MergePlan.build(
        prompt.plan.prefix_len,
        prompt.plan.context_len,
        prompt.plan.suffix_len,
        prompt.plan.num_layers,
        prompt.plan.config,
    )
    events = run_subtree(workers[0], prompt.subtree(plan.root.id))
    assert [
        (e.node.height, e.node.index, e.context_tokens_in, e.context_tokens_out) for e in events
    ] == [(*node.id, node.context_in, node.context_out) for node in plan.nodes]


def test_more_answers_than_there_can_be_are_refused_before_they_take_memory() -> None:
    request, stack = worker_pb2.GenerateTokensRequest(), cast(Any, None)
    with pytest.raises(PromptError, match="2147483647 answers are asked for; a worker gives at"):
        read_delivered(request, 2**31 - 1, 1, stack)
    assert read_delivered(request, 2, 1, stack) == ((), ())
