"""`python -m tests.chaos`: faults among questions, on links and in network namespaces.

Prints a table of what was injected and what became of the answers, and ends with 1 when an answer
was wrong or lost, or when a worker holds something at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

# Before anything imports gRPC: what is started here starts another program at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from rich.console import Console

from tests.chaos import namespaces
from tests.chaos.campaign import Outcome, run_campaign
from tests.chaos.faults import Fault, Kind, draw_faults
from tests.chaos.hosts import Host, LoopbackHost
from tests.chaos.report import from_json, show, to_json, together
from tests.chaos.traffic import LENGTHS, questions

WORKERS = 4
WIDTH = 120
# Of the faults, those in namespaces where there are any.
NETWORK_PART = 0.4
_ALWAYS = {Kind.KILL, Kind.KILL_TWO, Kind.PAUSE, Kind.HANG}


async def on_loopback(options: argparse.Namespace, log: Path) -> Outcome:
    """Workers behind links of this process."""
    draw = random.Random(options.seed)
    hosts: list[Host] = [LoopbackHost(f"worker-{n}", draw) for n in range(options.workers)]
    faults = drawn(options, LoopbackHost.kinds)
    with log.open("ab") as file:
        asked = questions(options.lengths)
        return await run_campaign(hosts, faults, asked, options.seed, file)


async def in_network(options: argparse.Namespace, log: Path) -> Outcome:
    """Workers on hosts of their own; one of them has two interfaces."""
    network = namespaces.Network()
    await network.open()
    hosts: list[Host] = [
        await network.add_host(f"worker-{n}", interfaces=2 if n == 0 else 1)
        for n in range(options.workers)
    ]
    faults = drawn(options, namespaces.NamespaceHost.kinds)
    with log.open("ab") as file:
        asked = questions(options.lengths)
        return await run_campaign(hosts, faults, asked, options.seed, file)


def drawn(options: argparse.Namespace, network: frozenset[Kind]) -> list[Fault]:
    """The faults of one part, of the kinds that its hosts know."""
    kinds = _ALWAYS | network
    return draw_faults(options.seed, options.faults, kinds & set(options.kinds or kinds))


def in_child(options: argparse.Namespace, where: str, faults: int, log: Path) -> Outcome:
    """One part of a campaign in a process of its own, where namespaces make one."""
    result = log.parent / f"{where}.json"
    command = [sys.executable, "-m", "tests.chaos", "--where", where, "--json", str(result)]
    command += ["--seed", str(options.seed), "--faults", str(faults), "--log", str(log)]
    command += ["--workers", str(options.workers)]
    command += ["--lengths", *map(str, options.lengths)]
    command += ["--kinds", *options.kinds] if options.kinds else []
    if where == "network":
        command = namespaces.inside(command)
    status = subprocess.run(command, check=False).returncode
    if not result.exists():
        raise SystemExit(f"the {where} part ended with status {status}; its log: {log}")
    return from_json(result.read_text())


def everywhere(options: argparse.Namespace, log: Path, console: Console) -> Outcome:
    """Both kinds of hosts, one after the other, where there can be both."""
    why_not = namespaces.missing()
    if why_not is not None:
        console.print(f"no network namespaces, so all faults come on loopback: {why_not}")
        return in_child(options, "loopback", options.faults, log)
    network = round(options.faults * NETWORK_PART)
    parts = {"loopback": options.faults - network, "network": network}
    return together([in_child(options, where, count, log) for where, count in parts.items()])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="by default a new one, which is printed")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--where", choices=["everywhere", "loopback", "network"])
    parser.add_argument("--kinds", type=Kind, nargs="+", help=f"of {[str(k) for k in Kind]}")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--log", type=Path, help="where the processes' own words go")
    parser.add_argument("--json", type=Path, help="write the outcome there, and print no table")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 16)
    return options


def main() -> int:
    options = parse()
    console = Console(width=WIDTH)
    log = options.log or Path(tempfile.mkdtemp(prefix="homer-chaos-")) / "log"
    logging.basicConfig(
        filename=log,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if options.where == "loopback":
        outcome = asyncio.run(on_loopback(options, log))
    elif options.where == "network":
        outcome = asyncio.run(in_network(options, log))
    else:
        console.print(f"seed {options.seed} (SEED={options.seed} repeats it), log {log}")
        outcome = everywhere(options, log, console)
    if options.json is not None:
        options.json.write_text(to_json(outcome))
    else:
        show(outcome, options.seed, console)
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
