"""Bar charts as numbers: what page.html.j2 draws as SVG. Lengths are in units of a 360 wide drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from ..core.records import Acceptance
from ..core.report_record import AdaptReport
from .terminal import report_rows, tau

WIDTH = 360
BAR = 14
GAP = 3
LABEL = 18
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
    margin: int = 64  # for the text at a bar's end

    @property
    def ticks(self) -> list[float]:
        """From 0 to the first round number that is not below `most`."""
        most = self.most or 1.0
        least = most / 5
        power = 10 ** math.floor(math.log10(least))
        step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= least * (1 - 1e-9))
        return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Where each tick stands, and its number."""
        return [(self.x(tick), _short(tick)) for tick in self.ticks]

    def x(self, value: float) -> float:
        return 4 + (WIDTH - 4 - self.margin) * value / self.ticks[-1]

    @property
    def height(self) -> int:
        return sum(LABEL + (BAR + GAP) * len(bars) + 4 for _, bars in self.groups) + 36


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
    sides = {"before": report.before, "after": report.after}
    rates, conditional = [], []
    for j in range(report.after.k):
        shares = {when: acceptance_rates(m)[j] for when, m in sides.items()}
        bars = (Bar(when, 100 * share, f"{100 * share:.1f} %") for when, share in shares.items())
        rates.append((f"position {j + 1}", tuple(bars)))
        bars = (_conditional(when, m, j) for when, m in sides.items())
        conditional.append((f"position {j + 1}", tuple(bars)))
    return (
        Chart(
            "Acceptance rate by position",
            "% of all steps that accepted the token at this position",
            tuple(rates),
            100,
        ),
        Chart(
            "Conditional acceptance by position",
            "% of the steps that reached this position",
            tuple(conditional),
            100,
            112,
        ),
    )


def acceptance_rates(measured: Acceptance) -> tuple[float, ...]:
    """Accepted at each position over all steps, as vLLM counts; `per_position` is conditional."""
    return tuple(accumulate(measured.per_position, mul))


def _conditional(when: str, measured: Acceptance, j: int) -> Bar:
    reached = measured.steps * (1.0, *acceptance_rates(measured))[j]
    if reached < 0.5:
        return Bar(when, 0.0, "not reached")
    share = measured.per_position[j]
    return Bar(when, 100 * share, f"{100 * share:.1f} % of {reached:,.0f}")


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


def _short(number: float) -> str:
    """A round number for an axis: 12.5M, 500k, 0.5."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
