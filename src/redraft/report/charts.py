"""Bar charts as numbers: what page.html.j2 draws as SVG. Lengths are in units of a 360 wide drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from ..core.records import Acceptance
from ..core.report_record import AdaptReport
from .terminal import report_rows, tau

WIDTH = 360
BAR = 14
LABEL = 17
STAGES = {
    "regenerate": "answers",
    "select": "selection",
    "train": "training",
    "export": "export",
    "measure": "measuring",
}
"""What the first word of a stage's name counts as."""


@dataclass(frozen=True)
class Bar:
    """One bar: before, after or plain; its text stands at its end. `ends` are those of an interval."""

    style: str
    value: float
    text: str
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """Groups of bars below their labels, with an axis from 0 on."""

    title: str
    axis: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    most: float  # the axis reaches at least this far
    room: int = 64  # for the text at a bar's end

    @property
    def ticks(self) -> list[float]:
        """From 0 to the first round number that is not below `most`."""
        most = self.most or 1.0
        least = most / 5
        power = 10 ** math.floor(math.log10(least))
        step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= least * (1 - 1e-9))
        return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]

    def x(self, value: float) -> float:
        return 4 + (WIDTH - 4 - self.room) * value / self.ticks[-1]

    @property
    def height(self) -> int:
        return sum(LABEL + (BAR + 2) * len(bars) + 4 for _, bars in self.groups) + 36


def tau_chart(report: AdaptReport) -> Chart:
    """Tau of each measured set with its interval."""
    groups = tuple(
        (
            f"{row.name}, {row.after.prompts} prompts",
            tuple(
                Bar(when, m.tau, tau(m), m.ci)
                for when, m in (("before", row.before), ("after", row.after))
            ),
        )
        for row in report_rows(report)
    )
    axis = "tokens per target pass (tau), with the 95 % interval"
    return Chart("Mean acceptance length", axis, groups, report.after.k + 1, 104)


def position_charts(report: AdaptReport) -> tuple[Chart, Chart]:
    """Acceptance rate by position, then conditional acceptance."""
    return (
        _positions(
            "Acceptance rate by position",
            "% of all steps that accepted the token at this position",
            report,
            acceptance_rates(report.before),
            acceptance_rates(report.after),
        ),
        _positions(
            "Conditional acceptance by position",
            "% of the steps that reached this position",
            report,
            report.before.per_position,
            report.after.per_position,
        ),
    )


def acceptance_rates(measured: Acceptance) -> tuple[float, ...]:
    """Accepted at each position over all steps, as vLLM counts; `per_position` is conditional."""
    return tuple(accumulate(measured.per_position, mul))


def _positions(
    title: str, axis: str, report: AdaptReport, before: Sequence[float], after: Sequence[float]
) -> Chart:
    groups = tuple(
        (
            f"position {position}",
            (
                Bar("before", 100 * was, f"{100 * was:.1f} %"),
                Bar("after", 100 * now, f"{100 * now:.1f} %"),
            ),
        )
        for position, (was, now) in enumerate(zip(before, after, strict=True), 1)
    )
    return Chart(title, axis, groups, 100)


def cost_charts(report: AdaptReport) -> list[Chart]:
    """Seconds, tokens, memory and parameters."""
    seconds: dict[str, float] = {}
    for name, spent in report.cost["seconds"].items():
        stage = STAGES.get(name.split()[0], name)
        seconds[stage] = seconds.get(stage, 0.0) + spent
    t, cost = report.train, report.cost
    return [
        _plain("Time by stage", "seconds", seconds, "{:,.1f} s"),
        _plain(
            "Tokens",
            "tokens",
            {
                "written by the target": cost["unique_generated_tokens"],
                "trained on, all passes": cost["supervised_tokens"],
            },
            "{:,.0f}",
        ),
        _plain(
            "Peak memory of training",
            "MB",
            {"measured": t.peak_mb, "predicted": t.predicted_peak_mb},
            "{:,.0f} MB",
        ),
        _plain(
            "Parameters",
            "parameters",
            {"trained": t.trained_parameters, "of the draft": t.draft_parameters},
            "{:,.0f}",
        ),
    ]


def _plain(title: str, axis: str, values: dict[str, float], form: str) -> Chart:
    groups = tuple((n, (Bar("plain", v, form.format(v)),)) for n, v in values.items())
    return Chart(title, axis, groups, max(values.values(), default=0.0), 84)
