"""`redraft bench compare`: does the regression behind `redraft check` earn its place?

The same recommendation rule judges every calibration run by runs of other kinds, fed by the regression and by
simpler estimates. The rule for keeping the regression was fixed before the figures were read: over all runs it
is clearly better than an alternative if the paired difference in speed lost has a 95 % interval below 0, or if
an exact McNemar test on right recommendations favours it with p < 0.05. It stays if it is clearly better than
both the constant recovery and the closed form with an offset.

Shapes: N drafts, A predicted actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import binomtest

from redraft.check.calibration_runs import ADAPT, KEEP, SCRATCH, CalibrationRun, Checked
from redraft.check.prediction import (
    FEWEST_KINDS,
    PREDICTED,
    Estimate,
    outcomes,
    regression,
    tau_of,
    z_of,
)

from .calibration import Figures, Interval, Judged, figures, judge, over_kinds, recovery_of

POLICIES = {"always adapt": ADAPT, "never adapt": KEEP, "always from scratch": SCRATCH}


@dataclass(frozen=True)
class Paired:
    """The regression against another estimate on the same runs: recommendations that only the one got right,
    the exact McNemar p, and over kinds the differences in the share that is right and in speed lost (negative: the
    regression loses less)."""

    only_regression: int
    only_other: int
    p_value: float
    right: Interval
    lost: Interval

    @property
    def clearly_better(self) -> bool:
        return self.lost[2] < 0 or (self.p_value < 0.05 and self.only_regression > self.only_other)


def paired(regressed: Sequence[Judged], others: Sequence[Judged]) -> Paired:
    """Both judged the same runs, in the same order."""
    right = [
        (a.action == a.right, b.action == b.right) for a, b in zip(regressed, others, strict=True)
    ]
    only, other = right.count((True, False)), right.count((False, True))
    p_value = float(binomtest(only, only + other).pvalue) if only + other else 1.0
    lost = [a.lost(a.action) - b.lost(b.action) for a, b in zip(regressed, others, strict=True)]
    more = over_kinds(regressed, [float(a) - float(b) for a, b in right])
    return Paired(only, other, p_value, more, over_kinds(regressed, lost))


@dataclass(frozen=True)
class Row:
    """One way to decide, on one group of runs. A fixed policy predicts nothing; the regression has no pair."""

    group: str
    name: str
    runs: int
    right: int
    lost: Interval
    figures: Figures | None = None
    pair: Paired | None = None


def compare(runs: Sequence[CalibrationRun], apart: str = "kind") -> dict[str, list[Judged]]:
    """All runs judged, by the name of the estimate, the regression first."""
    return {name: judge(runs, apart, estimate) for name, estimate in ESTIMATES.items()}


def rows_of(found: dict[str, list[Judged]]) -> list[Row]:
    """All figures, for all runs, the greedy and the sampled ones; a group without a gap to recover is left out."""
    rows = []
    for group, sampled in (("all", (False, True)), ("greedy", (False,)), ("sampled", (True,))):
        some = {
            name: [j for j in judged if bool(j.run.temperature) in sampled]
            for name, judged in found.items()
        }
        if all(math.isnan(j.recovery) for j in some["regression"]):
            continue
        rows += _group(group, some)
    return rows


def _group(group: str, some: dict[str, list[Judged]]) -> list[Row]:
    regressed = some["regression"]
    rows = []
    for name, judged in some.items():
        f = figures(judged)
        pair = None if judged is regressed else paired(regressed, judged)
        rows.append(Row(group, name, f.runs, f.right, f.lost, f, pair))
    for name, action in POLICIES.items():
        right = sum(j.right == action for j in regressed)
        lost = over_kinds(regressed, [j.lost(action) for j in regressed])
        rows.append(Row(group, name, len(regressed), right, lost))
    return rows


HEADINGS = (
    "fed by",
    "recovery off by",
    "tau adapted off by",
    "rank correlation",
    "recoveries in 95 %",
    "right",
    "speed lost",
    "only regression right : only this",
    "McNemar p",
    "right, regression minus this",
    "speed lost, regression minus this",
)


def cells_of(row: Row) -> list[str]:
    """A row as text, one cell for each heading."""
    f, pair = row.figures, row.pair
    off = [_interval(f.recovery_error), _interval(f.tau_error)] if f else ["-", "-"]
    ranks = [f"{f.spearman:.2f}", f"{f.coverage:.0%}"] if f else ["-", "-"]
    against = ["-"] * 4
    if pair:
        counts = f"{pair.only_regression} : {pair.only_other}"
        against = [counts, f"{pair.p_value:.2g}", _points(pair.right, "+"), _points(pair.lost, "+")]
    return [row.name, *off, *ranks, f"{row.right} of {row.runs}", _points(row.lost), *against]


def _interval(found: Interval) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def _points(found: Interval, sign: str = "") -> str:
    middle, low, high = (f"{100 * value:{sign}.1f}" for value in found)
    return f"{middle} % [{low}, {high}]"


def print_comparison(rows: Sequence[Row], out: Console | None = None) -> None:
    """A block for each row: the figures have long names."""
    out = out or Console(highlight=False)
    for row in rows:
        out.print(f"{row.group}: {row.name}")
        for heading, cell in list(zip(HEADINGS, cells_of(row), strict=True))[1:]:
            if cell != "-":
                out.print(f"  {heading:<34} {cell}")


def with_tau_on_base(
    runs: Sequence[CalibrationRun], drafts: Sequence[Checked], names: Sequence[str]
) -> Any:
    """The regression of before, which also read the draft's tau on its base."""
    return regression(runs, drafts, [*names, "on_base"] if "closed_form" in names else names)


def constant_recovery(
    runs: Sequence[CalibrationRun], drafts: Sequence[Checked], names: Sequence[str]
) -> Any:
    """The mean recovery and the mean tau from scratch of runs decoded alike."""
    gaps = [run for run in runs if not math.isnan(recovery_of(run))]
    found = []
    for draft in drafts:
        recovery = np.mean([recovery_of(run) for run in alike(gaps, draft.temperature)])
        scratch = tau_of(outcomes(alike(runs, draft.temperature))[:, 1].mean(), draft.k)
        keep = draft.predictors["unadapted"]
        adapt = keep + recovery * max(scratch - keep, 0.0)
        found.append([z_of(float(tau), draft.k) for tau in (adapt, scratch)])
    return np.array(found)


def closed_form_with_offset(
    runs: Sequence[CalibrationRun], drafts: Sequence[Checked], names: Sequence[str]
) -> Any:
    """z after the closed form (without one: of the unadapted draft) plus the mean rise of runs decoded alike."""
    found = []
    for draft in drafts:
        same = alike(runs, draft.temperature)
        rise_CA = outcomes(same) - np.array([[_start(run, names)] for run in same])
        found.append(_start(draft, names) + rise_CA.mean(0))
    return np.array(found)


def closed_form_unchanged(
    runs: Sequence[CalibrationRun], drafts: Sequence[Checked], names: Sequence[str]
) -> Any:
    """The closed form's tau as that after adapting; from scratch, the mean of runs decoded alike."""
    return np.array(
        [
            [_start(draft, names), outcomes(alike(runs, draft.temperature))[:, 1].mean()]
            for draft in drafts
        ]
    ).reshape(-1, len(PREDICTED))


def alike(runs: Sequence[CalibrationRun], temperature: float) -> Sequence[CalibrationRun]:
    """The runs at this temperature; where these are of too few kinds, all greedy or all sampled ones; else all."""
    for some in (
        [run for run in runs if run.temperature == temperature],
        [run for run in runs if bool(run.temperature) == bool(temperature)],
    ):
        if len({run.kind for run in some}) >= FEWEST_KINDS:
            return some
    return runs


def _start(draft: Checked, names: Sequence[str]) -> float:
    name = "closed_form" if "closed_form" in names else "unadapted"
    return z_of(draft.predictors[name], draft.k)


ESTIMATES: dict[str, Estimate] = {
    "regression": regression,
    "regression with tau on the base": with_tau_on_base,
    "constant recovery": constant_recovery,
    "closed form with an offset": closed_form_with_offset,
    "closed form unchanged": closed_form_unchanged,
}
