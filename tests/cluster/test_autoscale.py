"""When a pool grows and shrinks, at times that the test sets."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.autoscale import Autoscaler, Decision
from cluster.job import SchedulerLoad
from cluster.options import ServeOptions

NOTHING = Decision()


def autoscaler(fewest: int = 1, most: int = 8) -> Autoscaler:
    return Autoscaler(
        ServeOptions(
            model="",
            cpu=True,
            workers=fewest,
            min_workers=fewest,
            max_workers=most,
            grow_after_seconds=10,
            idle_seconds=100,
        )
    )


def load(
    busy: Sequence[str] = (),
    idle: Sequence[str] = (),
    running: int = 0,
    queued: int = 0,
    growing: int = 0,
) -> SchedulerLoad:
    return SchedulerLoad(
        running_jobs=running,
        queued_jobs=queued,
        queued_tokens=1000 * queued,
        busy_workers=tuple(busy),
        idle_workers=tuple(idle),
        draining_workers=(),
        growing_jobs=growing,
    )


def test_it_grows_when_all_have_been_busy_for_long() -> None:
    scaler, busy = autoscaler(), load(busy=["a"], running=1)
    assert scaler.decide(0, busy, ["a"], 0) == NOTHING
    assert scaler.decide(9, busy, ["a"], 0) == NOTHING
    assert scaler.decide(10, busy, ["a"], 0) == Decision(ask=1)
    # And again only after as long.
    assert scaler.decide(11, busy, ["a"], 0) == NOTHING
    assert scaler.decide(20, busy, ["a"], 0) == Decision(ask=1)


def test_it_grows_for_what_needs_more_memory_than_all_have() -> None:
    scaler, wanting = autoscaler(), load(idle=["a"], queued=1, growing=1)
    assert scaler.decide(0, wanting, ["a"], 0) == NOTHING
    assert scaler.decide(10, wanting, ["a"], 0) == Decision(ask=1)
    assert scaler.decide(500, wanting, ["a"], 1) == NOTHING


def test_a_moment_of_rest_begins_the_time_anew() -> None:
    scaler, busy = autoscaler(), load(busy=["a"], running=1)
    scaler.decide(0, busy, ["a"], 0)
    scaler.decide(9, load(idle=["a"]), ["a"], 0)
    assert scaler.decide(10, busy, ["a"], 0) == NOTHING
    assert scaler.decide(20, busy, ["a"], 0) == Decision(ask=1)


def test_a_long_queue_doubles_the_pool_and_never_more() -> None:
    names = ["a", "b", "c"]
    scaler, busy = autoscaler(), load(busy=names, running=3, queued=50)
    scaler.decide(0, busy, names, 0)
    assert scaler.decide(10, busy, names, 0) == Decision(ask=3)


def test_it_asks_once_for_what_does_not_come() -> None:
    scaler, busy = autoscaler(), load(busy=["a"], running=1, queued=1)
    scaler.decide(0, busy, ["a"], 0)
    assert scaler.decide(10, busy, ["a"], 0).ask == 1
    assert scaler.decide(100, busy, ["a"], 1) == NOTHING


def test_it_stops_at_the_most() -> None:
    names = [f"w{n}" for n in range(6)]
    scaler, busy = autoscaler(most=8), load(busy=names, running=9, queued=90)
    scaler.decide(0, busy, names, 0)
    assert scaler.decide(10, busy, names, 0) == Decision(ask=2)
    assert scaler.decide(20, busy, names, 2) == NOTHING


def test_it_gives_back_the_youngest_that_had_nothing_to_do() -> None:
    names = ["a", "b", "c"]
    scaler = autoscaler()
    assert scaler.decide(0, load(busy=["a"], idle=["b", "c"], running=1), names, 0) == NOTHING
    scaler.decide(50, load(busy=["b"], idle=["a", "c"], running=1), names, 0)
    scaler.decide(60, load(idle=names), names, 0)
    assert scaler.decide(99, load(idle=names), names, 0) == NOTHING
    assert scaler.decide(100, load(idle=names), names, 0) == Decision(give_back=("c",))
    assert scaler.decide(160, load(idle=["a", "b"]), ["a", "b"], 0) == Decision(give_back=("b",))
    # The least stay, however long.
    assert scaler.decide(999, load(idle=["a"]), ["a"], 0) == NOTHING


def test_what_was_asked_for_and_is_not_needed_any_more_is_withdrawn() -> None:
    scaler, busy = autoscaler(), load(busy=["a"], running=1)
    scaler.decide(0, busy, ["a"], 2)
    assert scaler.decide(5, load(idle=["a"]), ["a"], 2) == NOTHING
    assert scaler.decide(105, load(idle=["a"]), ["a"], 2) == Decision(withdraw=2)


def test_a_lost_worker_of_the_least_is_not_withdrawn() -> None:
    scaler = autoscaler(fewest=2)
    scaler.decide(0, load(idle=["a"]), ["a"], 1)
    assert scaler.decide(500, load(idle=["a"]), ["a"], 1) == NOTHING
