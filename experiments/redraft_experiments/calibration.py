"""How well a check predicts: every known case judged by a table that lacks its whole kind, or its family.

Truth and verdict go by the same rule (`check/recommendation.py`), once on what was measured, once on what was
predicted from a few prompts. Regret is what a policy leaves on the table, in tokens per second of plain decoding
measured next to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from redraft.check.prediction import (
    ACTIONS,
    ADAPT,
    KEEP,
    REFRESH,
    RETRAIN,
    Case,
    Outlook,
    outlook,
)
from redraft.check.recommendation import WORTH, Bill, Pace, Verdict, climb, decide

LEAST_GAP = 0.15
"""Recovery is told where a draft trained anew gains at least this much tau."""
FREE = dict.fromkeys(ACTIONS, Bill(0, 0.0))


@dataclass(frozen=True)
class Judged:
    """A case with the outlook that others give it, the verdict on that, and the right one.

    `recovery` is measured, `predicted` with a 95 % interval; None where the gap is too small. `mean` is
    the mean recovery of the others that were decoded alike, greedily or sampled.
    """

    case: Case
    seen: Outlook
    verdict: Verdict
    right: str
    recovery: float | None
    predicted: tuple[float, float, float] | None
    mean: float


@dataclass(frozen=True)
class Calibration:
    """Over the cases with a recovery: mean absolute error, that of predicting the others' mean, rank
    correlation, and the share of 95 % intervals that hold the measured recovery. Over all: the share of right
    verdicts, and the mean of their stated error probabilities."""

    cases: int
    error: float
    naive: float
    spearman: float
    coverage: float
    right: float
    stated: float


@dataclass(frozen=True)
class Policy:
    """Mean speed under a policy, its mean shortfall from the best action (tokens/s, and as a share), and how
    many of the cases it repairs, and repairs though a cheaper action was close."""

    name: str
    speed: float
    regret: float
    share: float
    repairs: int
    needless: int


def judge(cases: Sequence[Case], apart: str = "kind") -> list[Judged]:
    """Every case by those of other kinds (or, with `apart` "family", of other families).

    Raises UserError where those are too few to predict from.
    """
    found = []
    for case in cases:
        others = [other for other in cases if getattr(other, apart) != getattr(case, apart)]
        seen = outlook(case.signs, case.k, case.seen, others, case.temperature)
        pace = Pace(case.plain / case.step, 1 / case.step)
        verdict = decide(seen, pace, FREE, WORTH)
        recovery = recovery_of(case)
        predicted = None if recovery is None else _predicted(seen)
        same = [o for o in others if bool(o.temperature) == bool(case.temperature)]
        told = [r for r in map(recovery_of, same) if r is not None]
        found.append(
            Judged(
                case,
                seen,
                verdict,
                right_action(case),
                recovery,
                predicted,
                float(np.mean(told)) if told else math.nan,
            )
        )
    return found


def recovery_of(case: Case) -> float | None:
    """The share of the way from kept to trained anew that adapting went; None for a small gap."""
    gap = case.taus[RETRAIN] - case.taus[KEEP]
    return (case.taus[ADAPT] - case.taus[KEEP]) / gap if gap > LEAST_GAP else None


def right_action(case: Case) -> str:
    """The action that a verdict would end at, had it seen what was measured."""
    names = [action for action in ACTIONS if action in case.taus]
    taus = np.array([[case.taus[action]] for action in names])
    return names[int(climb(names, taus, WORTH)[0])]


def calibration(judged: Sequence[Judged]) -> Calibration:
    """The figures of all cases together."""
    told = [j for j in judged if j.predicted is not None]
    if not told:
        raise ValueError("none of the cases has a gap to recover")
    measured = np.array([j.recovery for j in told], dtype=float)
    middle, low, high = np.array([j.predicted for j in told]).T
    naive = np.abs(np.array([j.mean for j in told]) - measured)
    return Calibration(
        len(told),
        float(np.abs(middle - measured).mean()),
        float(naive.mean()),
        float(spearmanr(middle, measured).statistic),
        float(((low <= measured) & (measured <= high)).mean()),
        float(np.mean([j.verdict.action == j.right for j in judged])),
        float(np.mean([j.verdict.error for j in judged])),
    )


def policies(judged: Sequence[Judged]) -> list[Policy]:
    """The verdict against doing always the same, and against knowing the right action."""
    ways: dict[str, Callable[[Judged], str]] = {
        "the verdict": lambda j: j.verdict.action,
        "never adapt": lambda j: KEEP,
        "always refresh": lambda j: REFRESH if REFRESH in j.case.taus else KEEP,
        "always adapt": lambda j: ADAPT,
        "always retrain": lambda j: RETRAIN,
        "the right action, known beforehand": lambda j: j.right,
    }
    return [_policy(name, way, judged) for name, way in ways.items()]


def _policy(name: str, way: Callable[[Judged], str], judged: Sequence[Judged]) -> Policy:
    per_tau = np.array([j.case.plain / j.case.step for j in judged])
    got = per_tau * np.array([j.case.taus[way(j)] for j in judged])
    best = per_tau * np.array([max(j.case.taus.values()) for j in judged])
    repaired = [j for j in judged if way(j) != KEEP]
    return Policy(
        name,
        float(got.mean()),
        float((best - got).mean()),
        float(((best - got) / best).mean()),
        len(repaired),
        sum(ACTIONS.index(way(j)) > ACTIONS.index(j.right) for j in repaired),
    )


def _predicted(seen: Outlook) -> tuple[float, float, float]:
    """Median and 95 % interval of recovery over the outlook's draws."""
    keep, adapt, retrain = (seen.draws[action] for action in (KEEP, ADAPT, RETRAIN))
    gap: Any = np.maximum(retrain - keep, LEAST_GAP)
    low, middle, high = np.percentile((adapt - keep) / gap, [2.5, 50, 97.5])
    return float(middle), float(low), float(high)
