"""How well a check predicts: every calibration run judged by runs of other kinds alone, or of other families.

Truth and recommendation go by the same rule (`check/recommendation.py`), once on what was measured, once on what was
predicted from a few prompts. Means weigh each kind the same; their 95 % intervals are Student's t over kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr, ttest_1samp

from redraft.check.calibration_runs import ACTIONS, ADAPT, KEEP, SCRATCH, CalibrationRun
from redraft.check.prediction import Estimate, Prediction, predict, regression
from redraft.check.recommendation import Cost, Pace, recommend, right_action
from redraft.metrics.intervals import SMALLEST_GAP

FREE = dict.fromkeys(ACTIONS, Cost(0, 0.0))
Interval = tuple[float, float, float]
"""A figure and its 95 % interval."""


@dataclass(frozen=True)
class Judged:
    """A run with the prediction and the recommendation that others give it, and the right one.

    `recovery` is measured, `predicted` with a 95 % interval; both are nan where the gap is too small. `error`
    is the error probability that the recommendation states.
    """

    run: CalibrationRun
    prediction: Prediction
    action: str
    error: float
    right: str
    recovery: float
    predicted: Interval

    def lost(self, action: str) -> float:
        """How far an action ends below the best speed, as a share of it."""
        taus = self.run.taus
        return 1 - taus.get(action, taus[KEEP]) / max(taus.values())


@dataclass(frozen=True)
class Figures:
    """Mean absolute errors of recovery and of tau after adapting; the rank correlation of predicted with
    measured recovery and the share of 95 % intervals that hold it, over the runs with a gap to recover;
    right recommendations, the mean error that they state, and the share of the best speed that they lose."""

    runs: int
    gaps: int
    recovery_error: Interval
    tau_error: Interval
    spearman: float
    coverage: float
    right: int
    stated: float
    lost: Interval


def judge(
    runs: Sequence[CalibrationRun], apart: str = "kind", estimate: Estimate = regression
) -> list[Judged]:
    """Every run by those of other kinds (or, with `apart` "family", of other families).

    Raises UserError where those are too few to predict from.
    """
    found = []
    for run in runs:
        others = [other for other in runs if getattr(other, apart) != getattr(run, apart)]
        prediction = predict(run, run.quantiles, others, estimate)
        said = recommend(prediction, Pace(1.0, 1 / run.step), FREE)
        recovery = recovery_of(run)
        predicted = (math.nan,) * 3 if math.isnan(recovery) else _recovery(prediction)
        right = right_action(run.taus)
        found.append(Judged(run, prediction, said.action, said.error, right, recovery, predicted))
    return found


def recovery_of(run: CalibrationRun) -> float:
    """The share of the way from kept to from scratch that adapting went; nan for a small gap."""
    gap = run.taus[SCRATCH] - run.taus[KEEP]
    return (run.taus[ADAPT] - run.taus[KEEP]) / gap if gap > SMALLEST_GAP else math.nan


def figures(judged: Sequence[Judged]) -> Figures:
    """The figures of all runs together. Raises ValueError where none has a gap to recover."""
    gaps = [j for j in judged if not math.isnan(j.recovery)]
    if not gaps:
        raise ValueError("none of the runs has a gap to recover")
    measured = np.array([j.recovery for j in gaps])
    middle, low, high = np.array([j.predicted for j in gaps]).T
    tau_error = [abs(j.prediction.interval(ADAPT)[0] - j.run.taus[ADAPT]) for j in judged]
    return Figures(
        len(judged),
        len(gaps),
        over_kinds(gaps, np.abs(middle - measured)),
        over_kinds(judged, tau_error),
        float(spearmanr(middle, measured).statistic),
        float(((low <= measured) & (measured <= high)).mean()),
        sum(j.action == j.right for j in judged),
        float(np.mean([j.error for j in judged])),
        over_kinds(judged, [j.lost(j.action) for j in judged]),
    )


def over_kinds(judged: Sequence[Judged], values: Any) -> Interval:
    """The mean over kinds of their means, with Student's t interval over kinds."""
    by_kind: dict[str, list[float]] = {}
    for j, value in zip(judged, values, strict=True):
        by_kind.setdefault(j.run.kind, []).append(float(value))
    means = [float(np.mean(some)) for some in by_kind.values()]
    ends = ttest_1samp(means, 0.0).confidence_interval()
    return float(np.mean(means)), float(ends.low), float(ends.high)


def _recovery(prediction: Prediction) -> Interval:
    """Median and 95 % interval of recovery over the draws."""
    keep, adapt, scratch = (prediction.draws[action] for action in (KEEP, ADAPT, SCRATCH))
    shares: Any = (adapt - keep) / np.maximum(scratch - keep, SMALLEST_GAP)
    low, middle, high = np.percentile(shares, [2.5, 50, 97.5])
    return float(middle), float(low), float(high)
