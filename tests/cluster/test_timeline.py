"""Timelines: workers' times on one clock, whatever theirs say; what is kept, and for how long."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chrome_trace import chrome_trace
from cluster.clocks import Bounds, Clocks
from cluster.info_wire import trace_to_wire
from cluster.job import CacheReady, Job, MergeDone, NodeDone
from cluster.timeline import Timelines
from homer.plan import NodeId
from tests.cluster.fakes import make_job
from tests.trace_checks import check_trace


class Story:
    """Plays jobs on workers whose clocks are off, and tells `timelines` what arrives when.

    One thing at a time on each worker; `rng` draws how long messages and work take.
    """

    def __init__(self, seed: int, offsets: dict[str, float]) -> None:
        self.rng = random.Random(seed)
        self.offsets = offsets
        self.now = 1_000_000.0
        self.timelines = Timelines(Clocks(lambda: self.now))

    def step(self, most: float = 0.1) -> float:
        self.now += self.rng.uniform(1e-5, most)
        return self.now

    def play(self, job: Job, *, tokens: int = 3, ends: bool = True) -> None:
        timelines, plan = self.timelines, job.plan
        timelines.job_queued(job)
        self.step()
        timelines.job_started(job)
        for node in plan.nodes:
            worker = self.rng.choice(sorted(self.offsets))
            self.run(job, node.id, worker)
        worker = self.rng.choice(sorted(self.offsets))
        began = self.step()
        gather, refresh = self.rng.uniform(0, 0.1), self.rng.uniform(0, 0.1)
        self.now += gather + refresh
        self.step()
        ready = CacheReady(
            plan.kept_len,
            gather,
            refresh,
            1000,
            (),
            started_unix_seconds=began + self.offsets[worker],
        )
        timelines.cache_ready(job, worker, ready)
        for _ in range(tokens):
            self.step()
            timelines.token(job)
        if ends:
            self.step()
            timelines.job_ended(job, "finished", None)

    def run(self, job: Job, node_id: NodeId, worker: str) -> None:
        node, ahead = job.plan.by_id[node_id], self.offsets[worker]
        transfer_at = self.step()
        transfer = 0.0 if node.is_leaf else self.rng.uniform(0, 0.05)
        self.now += transfer
        began = self.step(0.001)
        seconds = self.rng.uniform(0.001, 1)
        self.now += seconds
        self.step()
        common: dict[str, Any] = {
            "node": node_id,
            "context_in": node.context_in,
            "context_out": node.context_out,
            "seconds": seconds,
            "started_unix_seconds": began + ahead,
        }
        done = (
            NodeDone(**common)
            if node.is_leaf
            else MergeDone(
                **common,
                transfer_seconds=transfer,
                received_bytes=5,
                context_indices=(),
                transfer_started_unix_seconds=transfer_at + ahead,
            )
        )
        self.timelines.node_done(job, worker, done, node_id.height)


@given(
    seed=st.integers(0, 10_000),
    skews=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=4),
    chunks=st.integers(1, 20),
)
def test_whatever_the_clocks_say_children_end_before_their_parents_start(
    seed: int, skews: list[float], chunks: int
) -> None:
    story = Story(seed, {f"worker-{n}": skew for n, skew in enumerate(skews)})
    job = make_job(11 * chunks)
    story.play(job)
    timeline = story.timelines.find("r")
    assert timeline is not None
    trace = chrome_trace(trace_to_wire(timeline, story.timelines.clocks))
    check_trace(trace, job.plan)


def test_clocks_that_agree_are_left_alone() -> None:
    story = Story(1, {"worker-0": 0.0, "worker-1": 0.0})
    job = make_job(200)
    story.play(job)
    timeline = story.timelines.find("r")
    assert timeline is not None
    told = [one.started for one in timeline.raw]
    shown = [one.started for one in timeline.slices(story.timelines.clocks) if one.kind != "decode"]
    assert shown == told


def test_a_round_trip_tells_how_far_a_clock_is_ahead() -> None:
    now = 100.0
    clocks = Clocks(lambda: now)
    assert clocks.bounds("w") == Bounds()
    now = 100.4
    clocks.answered("w", 100.0, 107.2)
    assert clocks.bounds("w").low == pytest.approx(6.8)
    assert clocks.bounds("w").high == pytest.approx(7.2)
    assert clocks.bounds("w").ahead == pytest.approx(7.0)
    # A faster answer tells more, an old one less and less.
    now = 101.0
    clocks.answered("w", 100.9, 107.95)
    assert clocks.bounds("w").ahead == pytest.approx(7.0, abs=0.051)
    assert clocks.bounds("w").high - clocks.bounds("w").low <= 0.1001
    now = 1101.0
    assert clocks.bounds("w").high - clocks.bounds("w").low == pytest.approx(0.3, abs=0.01)


def test_a_clock_that_was_set_is_measured_anew() -> None:
    now = 100.0
    clocks = Clocks(lambda: now)
    clocks.answered("w", 99.9, 99.95)
    assert clocks.bounds("w").ahead == 0
    clocks.answered("w", 99.9, 159.95)
    assert clocks.bounds("w").ahead == pytest.approx(60, abs=0.1)
    clocks.forget("w")
    assert clocks.bounds("w") == Bounds()


def test_a_node_that_ran_again_is_shown_twice_and_the_first_is_lost() -> None:
    story = Story(3, {"worker-0": 0.0})
    job = make_job(40)
    story.timelines.job_queued(job)
    story.timelines.job_started(job)
    leaf, merge = job.plan.leaves[0].id, job.plan.merges[0].id
    for node in (leaf, merge, leaf, merge):
        story.run(job, node, "worker-0")
    timeline = story.timelines.find("r")
    assert timeline is not None
    slices = timeline.slices(story.timelines.clocks)
    assert [(one.kind, one.lost) for one in slices] == [
        ("leaf", True),
        ("transfer", True),
        ("merge", True),
        ("leaf", False),
        ("transfer", False),
        ("merge", False),
    ]


def test_a_running_request_is_found_by_its_callers_name_and_has_a_stage() -> None:
    story = Story(4, {"worker-0": 0.0})
    job = make_job(40, request_id="mine-0123456789abcdef0123456789abcdef")
    timelines = story.timelines
    timelines.job_queued(job)
    timeline = timelines.find("mine")
    assert timeline is not None
    assert timeline is timelines.find(job.request_id)
    assert timeline.stage == "queued"
    timelines.job_ended(job, "cancelled", None)
    assert timelines.running == []
    story.play(job, ends=False, tokens=2)
    assert [one.stage for one in timelines.running] == ["decode"]
    running = timelines.find("mine")
    assert running is not None
    assert running is not timeline
    assert (running.outcome, running.generated_tokens) == (None, 2)
    trace = chrome_trace(trace_to_wire(running, timelines.clocks))
    assert trace["otherData"]["outcome"] == "running"
    check_trace(trace, job.plan)
    assert timelines.find("nobody") is None


def test_only_so_much_is_kept_and_no_prompt() -> None:
    story = Story(5, {"worker-0": 0.0})
    story.timelines = Timelines(story.timelines.clocks, kept_requests=3, kept_slices=10_000)
    for number in range(5):
        story.play(make_job(40, request_id=f"r{number}"))
    found = [story.timelines.find(f"r{number}") for number in range(5)]
    assert [one is not None for one in found] == [False, False, True, True, True]
    kept = found[-1]
    assert kept is not None
    assert not kept.job.context_ids
    assert not kept.job.prefix_ids
    assert not kept.job.suffix_ids
    few = Timelines(story.timelines.clocks, kept_requests=100, kept_slices=len(kept.raw))
    story.timelines = few
    story.play(make_job(40, request_id="a"))
    story.play(make_job(40, request_id="b"))
    assert few.find("a") is None
    assert few.find("b") is not None
