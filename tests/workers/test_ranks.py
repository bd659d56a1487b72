"""A worker of several processes is one worker: same answers, beside others, and ends as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest

from homer import HomerConfig, HomerModel
from homer.load_options import LoadOptions
from homer.v1 import worker_pb2
from tests.homer.families.zoo import model_dir, prompt, save_adapter
from tests.workers.processes import (
    CALL_SECONDS,
    Prompt,
    WorkerProcess,
    eventually,
    release,
    run_across,
    run_below_root,
    running_workers,
)

pytest.importorskip("deepspeed")

TOKENS = 8
CONFIG = HomerConfig(max_chunk_len=64, target_len=48, warmup_layers=2)
CHANGES = {"refreshed": CONFIG, "averaged": CONFIG.replace(refresh_suffix=False)}
ENGINES = {"one": (), "deepspeed": ("--engine", "deepspeed-tp", "--ranks", "2")}


@pytest.fixture(scope="module")
def pair() -> Iterator[dict[str, WorkerProcess]]:
    """A worker of one process, and one of two ranks."""
    with ExitStack() as stack:
        workers = {
            name: WorkerProcess(model_dir("llama3"), *options) for name, options in ENGINES.items()
        }
        for worker in workers.values():
            stack.callback(worker.stop)
        yield {name: worker.wait_until_ready() for name, worker in workers.items()}


def followers(worker: WorkerProcess) -> list[psutil.Process]:
    return psutil.Process(worker.reported_pid).children()


@pytest.mark.parametrize("mode", CHANGES)
@pytest.mark.parametrize("order", [("one", "deepspeed"), ("deepspeed", "one"), ("deepspeed",)])
def test_workers_of_one_and_two_ranks_equal_one_process(
    pair: dict[str, WorkerProcess], order: tuple[str, ...], mode: str
) -> None:
    config = CHANGES[mode]
    model = HomerModel.from_pretrained(model_dir("llama3"), config, device="cpu", dtype="float32")
    parts = prompt(3, 150, 5)
    context = model.compress(*parts)
    expected = model.generate(context, max_new_tokens=TOKENS, ignore_eos=True).tolist()
    plan = model.plan(*(len(part) for part in parts))
    workers = [pair[name] for name in order]
    across = Prompt.of(f"{order}/{mode}", plan, [part[None] for part in parts])

    answer = run_across(across, workers, 0, max_tokens=TOKENS)

    assert list(answer.ready.context_indices) == context.context_indices.tolist()
    assert answer.tokens == expected
    # Again, from the same cache and in memory of its own, with the first tokens known.
    root = workers[answer.places[plan.root.id]]
    addresses = [worker.address for worker in workers if worker is not root]
    again = across.generate(addresses, TOKENS + 4, attempt=1, resume=expected[:3])
    events = list(root.stub.GenerateTokens(again, timeout=CALL_SECONDS))
    tokens = [event.token.token_id for event in events if event.WhichOneof("event") == "token"]
    assert tokens[: TOKENS - 3] == expected[3:]
    release(across, workers)
    assert all(worker.holds_nothing() for worker in workers)


def test_a_group_holds_its_part_of_the_heads(pair: dict[str, WorkerProcess]) -> None:
    infos = {
        name: worker.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
        for name, worker in pair.items()
    }
    assert infos["one"].num_kv_heads == infos["deepspeed"].num_kv_heads
    assert infos["one"].kv_bytes_per_token == 2 * infos["deepspeed"].kv_bytes_per_token


def test_a_request_that_is_refused_harms_no_rank(pair: dict[str, WorkerProcess]) -> None:
    worker = pair["deepspeed"]
    parts = prompt(3, 150, 5)
    plan = HomerModel.from_pretrained(
        model_dir("llama3"), CONFIG, device="cpu", dtype="float32"
    ).plan(*(len(part) for part in parts))
    across = Prompt.of("refused", plan, [part[None] for part in parts])
    # Half of the rows are on no worker that is asked.
    run_below_root(across, list(pair.values()), 0)
    with pytest.raises(grpc.RpcError, match="rows"):
        list(worker.stub.GenerateTokens(across.generate([], TOKENS), timeout=CALL_SECONDS))
    release(across, list(pair.values()))
    again = Prompt.of("after", plan, [part[None] for part in parts])
    assert run_across(again, [worker], 0, max_tokens=TOKENS).tokens
    release(again, [worker])


def test_weights_in_parts_answer_as_whole_ones_and_leaves_run_together(tmp_path: Path) -> None:
    parts = prompt(3, 150, 5)
    adapter = str(save_adapter("llama3", tmp_path))
    load = LoadOptions(device="cpu", dtype="float32", adapter=adapter, merge_adapter=True)
    model = HomerModel.from_pretrained(model_dir("llama3"), CONFIG, load=load)
    expected = model.generate(model.compress(*parts), max_new_tokens=TOKENS, ignore_eos=True)
    plan = model.plan(*map(len, parts))
    across = Prompt.of("parts", plan, [part[None] for part in parts])
    engine = ("--engine", "deepspeed-zero3", "--ranks", "2")
    options = (*engine, "--adapter", adapter, "--merge-adapter")
    with running_workers(model_dir("llama3"), *options) as (worker,):
        subtree = across.subtree(plan.root.id)
        events = list(worker.stub.RunSubtree(subtree, timeout=CALL_SECONDS))
        # Those that run together have even parts of the time.
        leaves = {event.compute_seconds for event in events if not event.node.height}
        assert len(leaves) == 1 < len(plan.leaves)
        answer = worker.stub.GenerateTokens(across.generate([], TOKENS), timeout=CALL_SECONDS)
        tokens = [event.token.token_id for event in answer if event.HasField("token")]
        assert tokens == expected.tolist()
        release(across, [worker])
        assert worker.holds_nothing()


def test_a_group_that_cannot_load_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--engine", "deepspeed-tp", "--ranks", "2")
    worker = WorkerProcess(model_dir("stablelm"), *options, log=log)
    with pytest.raises(RuntimeError, match="ended with status 2"):
        worker.wait_until_ready()
    assert "DeepSpeed does not split stablelm right" in log.read_text()
    assert "use engine transformers-tp" in log.read_text()


def test_no_rank_outlives_its_worker(pair: dict[str, WorkerProcess]) -> None:
    worker = pair["deepspeed"]
    (follower,) = followers(worker)
    worker.process.kill()
    worker.process.wait()
    eventually(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE)
