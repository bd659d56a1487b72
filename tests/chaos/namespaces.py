"""Several hosts on one machine: network namespaces with cables to a switch.

All of it lives in private mount, network and process namespaces of one process (`inside`), so
that nothing of it is seen from outside, and nothing is left when that process ends, in whatever
way. Being root is not needed where the system gives namespaces to everybody.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.faults import Kind

_TOOLS = ("unshare", "ip", "tc", "nft", "mount")
_PRIVATE = ("--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
SUBNET = "10.77.0"
OTHER_SUBNET = "10.78.0"
SLOW_BITS_PER_SECOND = 1_000_000
SLOW_BURST_BITS = 16 * 1024 * 8
LOST_PERCENT = 15
_TABLE = "inet homer_chaos"


def inside(command: Sequence[str]) -> list[str]:
    """`command` in namespaces of its own, as their root."""
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *mapped, *_PRIVATE, *command]


def missing() -> str | None:
    """Why there can be no namespaces here, or None where there can."""
    # The system's own tools are not on every user's path.
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: util-linux, iproute2, nftables, mount)"
    # A switch, a cable, a drop rule and a slow queue: what a run needs of the kernel.
    script = """
        set -e
        mount -t tmpfs tmpfs /run && mkdir -p /run/netns
        ip netns add probe-host && ip link add probe-switch type bridge
        ip link add probe-cable type veth peer name eth0 netns probe-host
        ip link set probe-cable master probe-switch up
        tc qdisc add dev probe-cable root tbf rate 1mbit burst 32kb latency 400ms
        nft 'add table inet t; add chain inet t i { type filter hook input priority 0; };
             add rule inet t i numgen random mod 100 < 10 drop'
    """
    tried = subprocess.run(
        inside(["sh", "-c", script]), capture_output=True, text=True, timeout=30, check=False
    )
    if tried.returncode:
        return f"network namespaces do not work here: {tried.stderr.strip() or 'no reason given'}"
    return None


class Network:
    """A switch in the namespace of this process, which has the first address on it."""

    address = f"{SUBNET}.1"

    def __init__(self) -> None:
        self.hosts: list[NamespaceHost] = []

    async def open(self) -> None:
        """Make the switch. Only in a process that was started by `inside`."""
        if os.getpid() != 1:
            raise RuntimeError("not in namespaces of its own: start the command with inside()")
        await do("mount", "-t", "tmpfs", "tmpfs", "/run")
        Path("/run/netns").mkdir()
        await do("ip", "link", "set", "lo", "up")
        for switch, address in (("switch", f"{SUBNET}.1/24"), ("other", None)):
            await do("ip", "link", "add", switch, "type", "bridge")
            await do("ip", "link", "set", switch, "up")
            if address:
                await do("ip", "address", "add", address, "dev", switch)

    async def add_host(self, name: str, *, interfaces: int = 1) -> NamespaceHost:
        """A host with its own address, or with a second one on a network that few are on."""
        number = len(self.hosts) + 2
        host = NamespaceHost(name, number)
        self.hosts.append(host)
        await do("ip", "netns", "add", name)
        await do("ip", "-n", name, "link", "set", "lo", "up")
        # The network of few comes first, as it does where cards are counted by slot.
        if interfaces > 1:
            await self._plug(host, "eth0", "other", f"{OTHER_SUBNET}.{number}/24")
        await self._plug(host, "lan", "switch", f"{SUBNET}.{number}/24")
        return host

    async def _plug(self, host: NamespaceHost, device: str, switch: str, address: str) -> None:
        cable = f"{device}-{host.number}"
        await do(
            *("ip", "link", "add", cable, "type", "veth"),
            *("peer", "name", device, "netns", host.name),
        )
        await do("ip", "link", "set", cable, "master", switch, "up")
        await do("ip", "-n", host.name, "address", "add", address, "dev", device)
        await do("ip", "-n", host.name, "link", "set", device, "up")


class NamespaceHost:
    """A host of a `Network`."""

    kinds = frozenset({Kind.BLINK, Kind.CUT, Kind.CUT_PEERS, Kind.SLOW, Kind.LOSSY})

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.address = f"{SUBNET}.{number}"
        # Which of its interfaces, it finds out by itself.
        self.listen = f"{SUBNET}.0/24"
        # With processes of its own too: what other hosts have in memory cannot be reached from it.
        self.inside = ["ip", "netns", "exec", name]
        self.prefix = [*self.inside, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._cable = f"lan-{number}"

    async def expose(self, port: int) -> tuple[str, str]:
        address = f"{self.address}:{port}"
        return address, address

    async def fail(self, kind: Kind) -> None:
        match kind:
            case Kind.BLINK | Kind.CUT:
                await do("ip", "link", "set", self._cable, "down")
            case Kind.CUT_PEERS:
                others = f"{{ {SUBNET}.2-{SUBNET}.254 }}"
                await self._filter(f"ip saddr {others} drop")
            case Kind.LOSSY:
                await self._filter(f"numgen random mod 100 < {LOST_PERCENT} drop")
            case Kind.SLOW:
                rate = ("rate", f"{SLOW_BITS_PER_SECOND}bit", "burst", f"{SLOW_BURST_BITS // 8}")
                slow = ("root", "tbf", *rate, "latency", "500ms")
                await do("tc", "qdisc", "replace", "dev", self._cable, *slow)
                await do(*self.inside, "tc", "qdisc", "replace", "dev", "lan", *slow)
            case _:
                raise ValueError(f"no network fails by {kind}")

    async def heal(self) -> bool:
        await do("ip", "link", "set", self._cable, "up")
        await do(*self.inside, "nft", f"add table {_TABLE}; delete table {_TABLE}")
        await do("tc", "qdisc", "replace", "dev", self._cable, "root", "pfifo")
        await do(*self.inside, "tc", "qdisc", "replace", "dev", "lan", "root", "pfifo")
        return True

    async def close(self) -> None:
        """Nothing: it goes with the network."""

    async def _filter(self, rule: str) -> None:
        await do(
            *self.inside,
            "nft",
            f"add table {_TABLE}; add chain {_TABLE} in "
            "{ type filter hook input priority 0; }; "
            f"add rule {_TABLE} in {rule}",
        )


async def do(*command: str) -> None:
    """Run a command of the system.

    Raises
    ------
    RuntimeError
        What it said when it failed.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.decode().strip()}")
