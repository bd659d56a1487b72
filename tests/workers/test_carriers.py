"""One suite for every way in which tensors get from one process to another.

The other end is a real process, which sends, damages, stalls, or dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
import torch

from homer.v1 import tensor_pb2, worker_pb2, worker_pb2_grpc
from tests.workers.processes import eventually
from tests.workers.tensor_peer import BIG, Scenario
from workers.errors import (
    BrokenStreamError,
    DamagedStreamError,
    PeerError,
    TensorLimitError,
    TensorStreamError,
)
from workers.memory import resident_bytes
from workers.peer import ATTEMPTS, PeerPool, choose_outlet
from workers.shared_ring import RingInlet, RingOutlet, can_share, open_ring
from workers.tensor_stream import NamedTensor, Spec

T = TypeVar("T")
MIXED = [
    ("float32", [3, 5]),
    ("bfloat16", [2, 0, 4]),
    ("float16", [7]),
    ("int32", []),
    ("float8_e4m3fn", [11, 3]),
    ("float32", [(5 << 20) + 3]),
    ("bfloat16", [2, 9]),
]
CARRIERS = [
    "grpc",
    pytest.param("shared_memory", marks=pytest.mark.skipif(not can_share(), reason="not Linux")),
]


class Peer:
    """The other process."""

    def __init__(self, *before: str) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.workers.tensor_peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.address = f"127.0.0.1:{self.port}"
        self.stub = worker_pb2_grpc.WorkerStub(grpc.insecure_channel(self.address))

    def stats(self) -> worker_pb2.GetWorkerStatsResponse:
        return self.stub.GetWorkerStats(worker_pb2.GetWorkerStatsRequest(), timeout=30)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def a_peer(*before: str) -> Iterator[Peer]:
    peer = Peer(*before)
    try:
        yield peer
    finally:
        peer.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with a_peer() as one:
        yield one


class Pool:
    """A `PeerPool` whose peers are asked in one way, and what it told."""

    def __init__(self, carrier: str, stall_seconds: float = 30.0) -> None:
        self.received = 0
        self.transfers: list[tuple[str, str, int, float]] = []
        self.pool = PeerPool(
            self._count,
            lambda *told: self.transfers.append(told),
            stall_seconds=stall_seconds,
            share_memory=carrier == "shared_memory",
        )

    def _count(self, crossing_bytes: int) -> None:
        self.received += crossing_bytes

    async def pull(
        self, address: str, scenario: Scenario, seen: list[NamedTensor] | None = None
    ) -> list[NamedTensor]:
        out = [] if seen is None else seen
        pulling = self.pool.pull(
            address, "FetchState", scenario.request, scenario.limits, lambda specs: None
        )
        async with aclosing(pulling) as pulled:
            async for named in pulled:
                out.append(named)
        return out

    def run(self, use: Callable[[], Awaitable[T]]) -> T:
        async def all_of_it() -> T:
            try:
                return await use()
            finally:
                await self.pool.close()

        return asyncio.run(all_of_it())


def assert_all_came(received: list[NamedTensor], scenario: Scenario) -> None:
    assert [Spec.of(named) for named in received] == scenario.specs
    for named, expected in zip(received, scenario.make(), strict=True):
        left, right = (t.reshape(-1).view(torch.uint8) for t in (named.tensor, expected))
        assert torch.equal(left, right)


def shared_rings(process_id: int) -> list[str]:
    """Rings that a process has open or mapped."""
    found = [
        line
        for line in Path(f"/proc/{process_id}/maps").read_text().splitlines()
        if "homer-ring" in line
    ]
    for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
        try:
            found += [name for name in [str(descriptor.readlink())] if "homer-ring" in name]
        except FileNotFoundError:
            continue
    return found


def in_dev_shm() -> set[str]:
    """What we, or Python's own shared memory, might leave there; others use it too."""
    names = (path.name for path in Path("/dev/shm").iterdir())
    return {name for name in names if "homer" in name or name.startswith("psm_")}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_all_types_and_sizes_come_as_they_are(peer: Peer, carrier: str) -> None:
    scenario, pool = Scenario(MIXED), Pool(carrier)
    before = peer.stats().sent_bytes
    received = pool.run(lambda: pool.pull(peer.address, scenario))
    assert_all_came(received, scenario)
    total = sum(spec.nbytes for spec in scenario.specs)
    assert total < pool.received <= 1.05 * total
    assert peer.stats().sent_bytes - before == pool.received
    ((address, name, told_bytes, seconds),) = pool.transfers
    assert (address, name, told_bytes) == (peer.address, carrier, pool.received)
    assert seconds > 0


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("fault", ["damage", "stall", "cut"])
def test_a_stream_that_breaks_once_is_asked_for_again(peer: Peer, carrier: str, fault: str) -> None:
    scenario = Scenario(BIG[:2], fault, times=1, key=f"once/{carrier}/{fault}")
    pool = Pool(carrier, stall_seconds=1.0 if fault == "stall" else 30.0)
    received = pool.run(lambda: pool.pool.retried(lambda: pool.pull(peer.address, scenario)))
    assert_all_came(received, scenario)
    assert len(pool.transfers) == 2


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("damage", DamagedStreamError, "checksum"),
        ("stall", BrokenStreamError, r"sent nothing of FetchState for 0\.3 s"),
        ("cut", DamagedStreamError, "cut short"),
    ],
)
def test_a_stream_that_always_breaks_fails_cleanly(
    peer: Peer, carrier: str, fault: str, error: type[Exception], says: str
) -> None:
    scenario = Scenario(BIG[:2], fault, times=99, key=f"always/{carrier}/{fault}")
    pool = Pool(carrier, stall_seconds=0.3 if fault == "stall" else 30.0)
    started, before = time.monotonic(), len(shared_rings(os.getpid()))
    with pytest.raises(error, match=says):
        pool.run(lambda: pool.pool.retried(lambda: pool.pull(peer.address, scenario)))
    assert time.monotonic() - started < 20
    assert len(pool.transfers) == ATTEMPTS
    assert len(shared_rings(os.getpid())) == before


@pytest.mark.parametrize("carrier", CARRIERS)
def test_damage_is_noticed_before_any_damaged_tensor_is_given_out(peer: Peer, carrier: str) -> None:
    scenario = Scenario(BIG[:2], "damage", times=1, key=f"seen/{carrier}")
    pool, seen = Pool(carrier), list[NamedTensor]()
    with pytest.raises(DamagedStreamError):
        pool.run(lambda: pool.pull(peer.address, scenario, seen))
    assert not seen


@pytest.mark.parametrize("carrier", CARRIERS)
def test_more_than_the_limit_is_refused_at_the_header(peer: Peer, carrier: str) -> None:
    scenario, pool = Scenario(BIG), Pool(carrier)

    async def pull() -> list[NamedTensor]:
        pulling = pool.pool.pull(
            peer.address, "FetchState", scenario.request, Scenario(BIG[:1]).limits, lambda _: None
        )
        return [named async for named in pulling]

    with pytest.raises(TensorLimitError):
        pool.run(lambda: pool.pool.retried(pull))
    assert len(pool.transfers) == 1
    assert pool.received < 1 << 12


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_slow_receiver_makes_the_sender_wait(peer: Peer, carrier: str) -> None:
    scenario, pool = Scenario(BIG), Pool(carrier, stall_seconds=2.0)
    total = sum(spec.nbytes for spec in scenario.specs)

    async def take_slowly() -> list[NamedTensor]:
        before, here = await asyncio.to_thread(peer.stats), resident_bytes()
        received: list[NamedTensor] = []
        pulling = pool.pool.pull(
            peer.address, "FetchState", scenario.request, scenario.limits, lambda specs: None
        )
        async with aclosing(pulling) as pulled:
            async for named in pulled:
                received.append(named)
                if len(received) == 1:
                    now = await asyncio.to_thread(until_it_waits)
                    # Three tensors of sixteen, and what the way itself holds.
                    assert now.sent_bytes - before.sent_bytes < total // 4
                    assert now.resident_bytes - before.resident_bytes < total // 4
                    assert resident_bytes() - here < total // 4
        return received

    def until_it_waits() -> worker_pb2.GetWorkerStatsResponse:
        """The sender's statistics when it has sent nothing for longer than a stall may last."""
        last, since = peer.stats(), time.monotonic()
        while time.monotonic() - since < 2.2:
            time.sleep(0.05)
            now = peer.stats()
            if now.sent_bytes != last.sent_bytes:
                last, since = now, time.monotonic()
        return last

    assert_all_came(pool.run(take_slowly), scenario)


@pytest.mark.skipif(not can_share(), reason="not Linux")
def test_shared_memory_takes_less_of_the_processor_than_messages(peer: Peer) -> None:
    scenario, least = Scenario(BIG), {"grpc": math.inf, "shared_memory": math.inf}
    # The least of a few runs: what else the machine does only adds to them.
    for carrier in (*least, *least, *least, *least):
        pool = Pool(carrier)
        started = time.process_time()
        assert len(pool.run(lambda pool=pool: pool.pull(peer.address, scenario))) == len(BIG)  # type: ignore[misc]
        least[carrier] = min(least[carrier], time.process_time() - started)
    # A fifth to a half of it.
    assert least["shared_memory"] < 0.9 * least["grpc"]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_sender_that_is_killed_leaves_nothing(carrier: str) -> None:
    files, pool = in_dev_shm(), Pool(carrier)
    before = len(shared_rings(os.getpid()))
    with a_peer() as victim:
        scenario = Scenario(BIG, "die", times=1, key="die")
        with pytest.raises(PeerError, match=victim.address):
            pool.run(lambda: pool.pool.retried(lambda: pool.pull(victim.address, scenario)))
    assert len(shared_rings(os.getpid())) == before
    assert in_dev_shm() == files


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_receiver_that_is_killed_leaves_nothing(peer: Peer, carrier: str) -> None:
    files = in_dev_shm()
    command = [sys.executable, "-m", "tests.workers.tensor_peer", "--receive", str(peer.port)]
    if carrier == "shared_memory":
        command.append("--share-memory")
    victim = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "first\n"
        assert bool(shared_rings(peer.process.pid)) == (carrier == "shared_memory")
    finally:
        victim.kill()
        victim.communicate()
    eventually(lambda: not shared_rings(peer.process.pid))
    assert in_dev_shm() == files


@pytest.mark.skipif(not can_share(), reason="not Linux")
def test_a_peer_in_another_namespace_sends_messages_and_is_not_offered_memory_again() -> None:
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make namespaces")
    scenario, pool = Scenario(MIXED), Pool("shared_memory")

    async def twice() -> list[list[NamedTensor]]:
        return [await pool.pull(elsewhere.address, scenario) for _ in range(2)]

    with a_peer(*apart) as elsewhere:
        for received in pool.run(twice):
            assert_all_came(received, scenario)
    assert [name for _, name, _, _ in pool.transfers] == ["grpc", "grpc"]


def offer(inlet: RingInlet) -> tensor_pb2.SharedRing:
    options = tensor_pb2.TransferOptions()
    inlet.offer(options)
    return options.shared_ring


@pytest.mark.skipif(not can_share(), reason="not Linux")
def test_only_a_ring_that_holds_the_nonce_is_opened(tmp_path: Path) -> None:
    inlet = RingInlet()
    ring = offer(inlet)
    assert isinstance(open_ring(ring), RingOutlet)

    def changed(**fields: object) -> tensor_pb2.SharedRing:
        other = tensor_pb2.SharedRing()
        other.CopyFrom(ring)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    file = (tmp_path / "file").open("wb+")
    file.truncate(os.fstat(ring.descriptor).st_size)
    bare = os.memfd_create("homer-ring", os.MFD_ALLOW_SEALING)
    os.ftruncate(bare, os.fstat(ring.descriptor).st_size)
    os.pwrite(bare, ring.nonce, 0)
    for wrong in (
        changed(nonce=bytes(32)),
        changed(nonce=b""),
        changed(slots=ring.slots + 1),
        changed(slots=0),
        changed(slot_bytes=1 << 40),
        changed(process_id=0),
        changed(process_id=4_000_000),
        changed(descriptor=file.fileno()),
        # Its owner could cut this one off while it is written to.
        changed(descriptor=bare),
    ):
        assert open_ring(wrong) is None
        assert choose_outlet(tensor_pb2.TransferOptions(shared_ring=wrong)).pack is not None
    os.close(bare)
    file.close()
    inlet.close()
    assert open_ring(ring) is None


@pytest.mark.skipif(not can_share(), reason="not Linux")
def test_a_ring_cannot_be_cut_off_under_the_other_end() -> None:
    inlet = RingInlet()
    descriptor = offer(inlet).descriptor
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    inlet.close()


@pytest.mark.skipif(not can_share(), reason="not Linux")
def test_a_piece_that_does_not_fit_its_slot_is_refused() -> None:
    inlet = RingInlet()
    shared = tensor_pb2.SharedPiece(bytes=offer(inlet).slot_bytes + 1)
    with pytest.raises(TensorStreamError, match="slot"):
        inlet.open(tensor_pb2.TensorFrame(shared=shared).SerializeToString())
    inlet.close()
