"""What was found of a fleet, as a page: one file, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..check.evidence import Interval
from ..core.files import write_text
from ..report.charts import Bar, Chart
from ..report.page import render
from .adapt import FleetAdapted
from .check import FleetCheck
from .member import PER
from .table import in_words, shown

PAGE = "fleet.html"
DRAWN = 24
ROW = tuple[str, int, Interval, Interval]
"""A member: its name, prompts, and the two taus that are drawn."""


def write_check_page(path: Path, found: FleetCheck) -> None:
    """Which adapters lost acceptance, those that cost the fleet most first."""
    needing = [row for row in found.members if row.needs]
    saved = sum(max(row.of_fleet, 0.0) for row in needing)
    about, *words = in_words(found)
    page = render(
        "fleet.html.j2",
        title=f"{len(needing)} of {len(found.members)} members lost acceptance",
        draft=found.draft,
        base=found.base,
        k=found.k,
        figures=[
            (
                "Passes lost",
                f"{saved:.0f}",
                f"of the target, per {PER:,} tokens of the fleet: what a draft as good as on the base would save.",
            )
        ],
        losses=(),
        first="the base, on the same prompts",
        second="the adapter",
        chart=_chart([(row.name, row.prompts, row.on_base, row.tau) for row in found.members]),
        headings=("adapter", "prompts", "tau", "on the base", "kept", "lost", "of all", "by", ""),
        rows=[
            (
                row.name,
                row.prompts,
                *(shown(figure) for figure in (row.tau, row.on_base, row.retention)),
                f"{row.lost:.0f}",
                f"{row.of_fleet:.0f}",
                row.cause,
                "adapt" if row.needs else "keep",
            )
            for row in found.members
        ],
        notes=[
            *words,
            f"{about}. Intervals are 95 %, over prompts (of a server: over groups of them).",
        ],
        versions=found.versions,
    )
    write_text(path, page)


def write_adapted_page(path: Path, found: FleetAdapted) -> None:
    """What one adapted draft brought each adapter and the base, those that gained most first."""
    before, after = found.passes
    worse = [row for row in found.members if row.lost_by_it]
    page = render(
        "fleet.html.j2",
        title=f"One draft for {len(found.members)} members: {before:.0f} → {after:.0f} passes per {PER:,} tokens",
        draft=found.draft,
        base=found.base,
        k=found.k,
        figures=[
            (
                "Passes of the target",
                f"{before:.0f} → {after:.0f}",
                f"per {PER:,} tokens of the fleet's traffic, with {found.unadapted} and with the adapted draft.",
            )
        ],
        losses=[f"{row.name} lost: {shown(row.change, '+')} of tau." for row in worse],
        first="the unadapted draft",
        second="the adapted draft",
        chart=_chart([(row.name, row.prompts, row.before, row.after) for row in found.members]),
        headings=("member", "prompts", "before", "after", "change", "lost before", "trained on"),
        rows=[
            (
                row.name,
                row.prompts,
                *(shown(figure) for figure in (row.before, row.after)),
                shown(row.change, "+"),
                f"{row.lost:.0f}",
                row.trained_on,
            )
            for row in found.members
        ],
        notes=[
            f"lost before: passes of the target per {PER:,} tokens that a member cost more than the base, by which the budget was "
            "split. Changes are on the same answers, intervals 95 %, over prompts."
        ],
        versions=found.versions,
    )
    write_text(path, page)


def _chart(rows: Sequence[ROW]) -> Chart:
    """Bars of the first members; the table has all."""
    groups = tuple(
        (
            f"{name}, {prompts} prompts",
            tuple(
                Bar(style, tau, f"{tau:.2f}", (low, high))
                for style, (tau, low, high) in (("before", first), ("after", second))
            ),
        )
        for name, prompts, first, second in rows[:DRAWN]
    )
    most = max(max(first[2], second[2]) for _, _, first, second in rows)
    title = "" if len(rows) <= DRAWN else f", the first {DRAWN} members"
    return Chart(f"tau, with 95 % intervals{title}", "tokens per pass of the target", groups, most)
