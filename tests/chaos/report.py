"""What a campaign came to, as a table and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from tests.chaos.campaign import Outcome
from tests.chaos.faults import Fault, Kind, Phase, Role
from tests.chaos.inject import Injected


def to_json(outcome: Outcome) -> str:
    # Of a counter `asdict` makes one of its own pairs.
    return json.dumps({**asdict(outcome), "retries": dict(outcome.retries)})


def from_json(text: str) -> Outcome:
    """The inverse of `to_json`."""
    fields = json.loads(text)
    fields["retries"] = Counter(fields["retries"])
    fields["injected"] = [
        Injected(
            Fault(
                **{
                    **one["fault"],
                    "kind": Kind(one["fault"]["kind"]),
                    "phase": Phase(one["fault"]["phase"]),
                    "role": Role(one["fault"]["role"]),
                }
            ),
            Phase(one["phase"]),
            tuple(one["victims"]),
        )
        for one in fields["injected"]
    ]
    return Outcome(**fields)


def together(outcomes: list[Outcome]) -> Outcome:
    """One outcome of several, one after the other."""
    return Outcome(
        injected=[fault for one in outcomes for fault in one.injected],
        right=sum(one.right for one in outcomes),
        wrong=[text for one in outcomes for text in one.wrong],
        lost=[text for one in outcomes for text in one.lost],
        left=[text for one in outcomes for text in one.left],
        retries=sum((one.retries for one in outcomes), Counter()),
        restarts=sum(one.restarts for one in outcomes),
        readmissions=sum(one.readmissions for one in outcomes),
        slowest_seconds=max(one.slowest_seconds for one in outcomes),
        seconds=sum(one.seconds for one in outcomes),
    )


def show(outcome: Outcome, seed: int, console: Console) -> None:
    """Print faults by kind and phase, and what became of the answers."""
    counts = Counter((one.fault.kind, one.phase) for one in outcome.injected)
    phases = list(Phase)
    table = Table(title=f"{len(outcome.injected)} faults, seed {seed}")
    table.add_column("fault")
    for phase in (*phases, "all"):
        table.add_column(str(phase), justify="right")
    for kind in Kind:
        row = [counts[kind, phase] for phase in phases]
        if any(row):
            table.add_row(kind, *(str(count or "") for count in row), str(sum(row)))
    sums = [sum(counts[kind, phase] for kind in Kind) for phase in phases]
    table.add_section()
    table.add_row("all", *map(str, sums), str(sum(sums)))
    console.print(table)
    again = ", ".join(f"{count} {cause}" for cause, count in sorted(outcome.retries.items()))
    console.print(
        f"{outcome.right} answers right, {len(outcome.wrong)} wrong, {len(outcome.lost)} lost; "
        f"the slowest took {outcome.slowest_seconds:.1f} s\n"
        f"nodes run again: {again or 'none'}\n"
        f"workers started again: {outcome.restarts}, taken back: {outcome.readmissions}\n"
        f"{outcome.seconds:.0f} s"
    )
    for name in ("wrong", "lost", "left"):
        for text in getattr(outcome, name):
            console.print(f"[red]{name}[/red]: {text}", markup=True, highlight=False)
