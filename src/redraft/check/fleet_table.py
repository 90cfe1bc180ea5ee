"""A fleet check as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..core.visible import visible
from .evidence import Interval
from .fleet import PER, FleetCheck, advice


def print_fleet(found: FleetCheck, out: Console | None = None) -> None:
    """A line for each adapter, those that lost most of the fleet's passes first."""
    out = out or Console(highlight=False)
    table = Table(title=visible(f"{found.draft} on {found.base}: tau at K={found.k} [95 %]"))
    for heading in ("adapter", "n", "tau", "on the base", "kept", "lost", "of all", ""):
        table.add_column(heading, justify="left" if heading in ("adapter", "") else "right")
    for row in found.members:
        table.add_row(
            visible(row.name),
            str(row.prompts),
            *(_shown(figure) for figure in (row.tau, row.on_base, row.retention)),
            f"{row.lost:.0f}",
            f"{row.of_fleet:.0f}",
            advice(row),
        )
    out.print(table)
    out.print(
        f"lost: further passes of the target per {PER:,} tokens of the adapter, of all: of the fleet. adapt: the interval of what is "
        "kept leaves out 1",
        markup=False,
        soft_wrap=True,
    )


def _shown(figure: Interval) -> str:
    value, low, high = figure
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
