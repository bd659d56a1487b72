"""Faults are what they say: drawn alike for one seed, and felt by who they are meant for."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.chaos import namespaces
from tests.chaos.faults import Kind, Phase, draw_faults
from tests.chaos.fleet import REPOSITORY
from tests.chaos.link import DAMAGED_PIECE_BYTES, LOOPBACK, Link
from tests.chaos.namespaces import SLOW_BITS_PER_SECOND, SLOW_BURST_BITS
from tests.chaos.probe import PIECE_BYTES, PIECES

PATIENCE_SECONDS = 0.3


def test_the_same_seed_draws_the_same_faults() -> None:
    kinds = set(Kind)
    assert draw_faults(7, 60, kinds) == draw_faults(7, 60, kinds)
    assert draw_faults(7, 60, kinds) != draw_faults(8, 60, kinds)


def test_every_phase_and_every_kind_has_its_turn() -> None:
    faults = draw_faults(1, 63, set(Kind))
    phases = Counter(fault.phase for fault in faults if fault.kind is not Kind.DAMAGE)
    assert set(phases) == set(Phase)
    assert min(phases.values()) >= 6
    assert {fault.kind for fault in faults} == set(Kind)
    assert {fault.kind for fault in draw_faults(1, 63, {Kind.KILL, Kind.CUT})} == {
        Kind.KILL,
        Kind.CUT,
    }


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A link to an echo, and a connection through it."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, LOOPBACK, 0)
    link = Link(server.sockets[0].getsockname()[1], random.Random(1))
    host, port = (await link.open()).split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield link, reader, writer
    finally:
        writer.close()
        await link.close()
        server.close()


def test_what_a_cut_holds_back_comes_late_and_whole() -> None:
    async def check() -> None:
        async with linked() as (link, reader, writer):
            link.cut()
            writer.write(b"late")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(4), PATIENCE_SECONDS)
            link.heal()
            assert await asyncio.wait_for(reader.readexactly(4), 10) == b"late"

    asyncio.run(check())


def test_damage_turns_over_one_bit_of_what_comes_back() -> None:
    async def check() -> None:
        async with linked() as (link, reader, writer):
            sent = bytes(2 * DAMAGED_PIECE_BYTES)
            link.damage(1)
            writer.write(sent)
            got = await asyncio.wait_for(reader.readexactly(len(sent)), 10)
            assert sum(byte.bit_count() for byte in got) == 1
            writer.write(sent)
            assert await asyncio.wait_for(reader.readexactly(len(sent)), 10) == sent

    asyncio.run(check())


def test_a_slow_link_takes_its_time_and_a_reset_ends_connections() -> None:
    async def check() -> None:
        async with linked() as (link, reader, writer):
            link.slow(50_000)
            started = time.monotonic()
            writer.write(bytes(10_000))
            await asyncio.wait_for(reader.readexactly(10_000), 10)
            assert time.monotonic() - started > 0.3
            link.reset()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 10)

    asyncio.run(check())


@pytest.fixture(scope="module")
def network_works() -> None:
    if why_not := namespaces.missing():
        pytest.skip(why_not)


@pytest.mark.usefixtures("network_works")
def test_faults_of_namespaces_are_felt_by_those_that_they_are_meant_for() -> None:
    command = namespaces.inside([sys.executable, "-m", "tests.chaos.probe"])
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    through = {fault: {who for who, came in to.items() if came} for fault, to in seen.items()}
    everybody = {"coordinator", "worker"}
    assert through.pop("whole") == everybody
    assert through.pop(Kind.CUT) == through.pop(Kind.BLINK) == set()
    assert through.pop(Kind.CUT_PEERS) == {"coordinator"}
    # What is left gets through, also all that was healed.
    assert all(who == everybody for who in through.values()), seen
    # At the slow rate, all but what the queue lets through at once.
    least = (PIECES * PIECE_BYTES * 8 - SLOW_BURST_BITS) / SLOW_BITS_PER_SECOND
    for who in everybody:
        assert min(seen[Kind.SLOW][who]) > least > min(seen["whole"][who]), seen
        # A lost piece is sent again after 0.2 seconds or more, and some of so many are lost.
        assert sum(seen[Kind.LOSSY][who]) > 0.4, seen
        assert sum(seen[Kind.LOSSY][who]) > 3 * min(seen["whole"][who]), seen


@pytest.mark.usefixtures("network_works")
def test_nothing_is_left_of_a_network_whose_process_is_killed() -> None:
    code = """
import asyncio, time
from tests.chaos.namespaces import Network
from tests.chaos.probe import _SERVER, python
async def main():
    network = Network()
    await network.open()
    host = await network.add_host("left-behind")
    await python(host.prefix, _SERVER, host.address)
    print("up", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    command = namespaces.inside([sys.executable, "-c", code])
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        children = descendants(process.pid)
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)
    devices = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "lan-2" not in devices
    assert not Path("/run/netns/left-behind").exists()


def descendants(pid: int) -> list[int]:
    """Process ids of all that a process has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found
