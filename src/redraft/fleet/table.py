"""What was found of a fleet, as tables on the terminal."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ..check.evidence import Interval
from ..core.visible import visible
from .adapt import FleetAdapted
from .bank import Bank, BankCheck
from .check import ANSWERS, BOTH, STATES, FleetCheck
from .member import PER
from .verify import FleetServed


def print_fleet(found: FleetCheck, out: Console | None = None) -> None:
    """A line for each adapter, those that lost most of the fleet's passes first."""
    out = out or Console(highlight=False)
    table = _table(
        f"{found.draft} on {found.base}: tau at K={found.k}",
        ("adapter", "n", "tau", "on the base", "kept [95 %]", "lost", "of all", ""),
    )
    for row in found.members:
        table.add_row(
            visible(row.name),
            str(row.prompts),
            f"{row.tau[0]:.2f}",
            f"{row.on_base[0]:.2f}",
            shown(row.retention),
            f"{row.lost:.0f}",
            f"{row.of_fleet:.0f}",
            "adapt" if row.needs else "keep",
        )
    out.print(table)
    for line in in_words(found):
        out.print(line, markup=False, soft_wrap=True)


CAUSES = {
    ANSWERS: "the loss comes from the answers, which cost as much where the base reads them: train on such answers",
    STATES: "the loss comes from the states that the draft reads: redraft check --base says what a fit in closed form would bring",
    BOTH: "the loss comes from the answers and from the states that the draft reads",
}


def in_words(found: FleetCheck) -> list[str]:
    """What the table's columns are, and which adapters need something, by what their loss comes from."""
    needing = [row for row in found.members if row.needs]
    lines = [
        f"lost: further passes of the target per {PER:,} tokens of the adapter, of all: of the fleet. adapt: the interval of what is "
        "kept leaves out 1",
        f"{len(needing)} of {len(found.members)} members lost acceptance",
    ]
    for cause, text in CAUSES.items():
        names = [visible(row.name) for row in needing if row.cause == cause]
        if names:
            lines.append(f"{', '.join(names)}: {text}")
    return lines


def print_adapted(found: FleetAdapted, out: Console | None = None) -> None:
    """A line for each adapter and the base, those that gained most first."""
    out = out or Console(highlight=False)
    table = _table(
        f"{found.unadapted} adapted for all, on {found.base}: tau at K={found.k} [95 %]",
        ("adapter", "n", "before", "after", "change", "lost", "trained on", ""),
    )
    for row in found.members:
        table.add_row(
            visible(row.name),
            str(row.prompts),
            *(shown(figure) for figure in (row.before, row.after)),
            shown(row.change, sign="+"),
            f"{row.lost:.0f}",
            str(row.trained_on),
            "worse" if row.lost_by_it else "",
        )
    out.print(table)
    before, after = found.passes
    out.print(
        f"passes of the target per {PER:,} tokens of the fleet: {before:.0f} before, {after:.0f} after. lost: those that the adapter "
        f"cost more than the base before. One draft for all: {found.draft}",
        markup=False,
        soft_wrap=True,
    )


def print_served(found: FleetServed, out: Console | None = None) -> None:
    """A line for each member, as served."""
    out = out or Console(highlight=False)
    table = _table(
        f"{found.draft} on {found.base}, {found.adapters} adapters in vLLM {found.engine_version} ({found.dtype}, K={found.k})",
        (
            "adapter",
            "n",
            "same outputs",
            "at near-ties",
            "compared",
            "steps",
            "accepted",
            "tau",
            "by redraft",
            "",
        ),
    )
    for row in found.members:
        table.add_row(
            visible(row.name),
            str(row.outputs.prompts),
            str(row.outputs.identical),
            str(row.outputs.excused),
            str(row.compared),
            f"{row.counted.drafts:,}",
            f"{row.counted.accepted:,}",
            f"{row.counted.tau:.3f}",
            f"{row.own.tau:.3f}",
            row.problem,
        )
    out.print(table)
    out.print(found.conclusion, markup=False, soft_wrap=True)


def print_bank(found: Bank, out: Console | None = None) -> None:
    """A line for each adapter."""
    out = out or Console(highlight=False)
    table = _table(
        f"{found.path}: adapters of draft {found.draft_hash}",
        ("adapter", "method", "parameters", "MB", "held-out tau", "target"),
    )
    for row in found.adapters.values():
        tau = "" if row.heldout_tau is None else "{:.2f} to {:.2f}".format(*row.heldout_tau)
        size = f"{row.bytes / 1e6:.2f}"
        table.add_row(
            visible(row.name), row.method, f"{row.parameters:,}", size, tau, visible(row.target)
        )
    out.print(table)


def print_bank_check(found: BankCheck, out: Console | None = None) -> None:
    """What is wrong, or that nothing is."""
    out = out or Console(highlight=False)
    lines = [f"{name}: {problem}" for name, problem in found.problems.items()]
    if found.unnamed:
        lines.append(
            f"{len(found.unnamed)} folders that no name stands for; the next change removes them"
        )
    if not found.problems:
        lines.append(
            f"{found.adapters} adapters, {found.bytes / 1e6:.1f} MB: all as they were added"
        )
    for line in lines:
        out.print(visible(line), markup=False, soft_wrap=True)


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=visible(title), box=box.SIMPLE_HEAD)
    for heading in headings:
        left = heading in ("adapter", "method", "target", "")
        side: Literal["left", "right"] = "left" if left else "right"
        table.add_column(heading, justify=side, overflow="fold")
    return table


def shown(figure: Interval, sign: str = "") -> str:
    """A figure with its interval."""
    return "{} [{}, {}]".format(*(f"{number:{sign}.2f}" for number in figure))
