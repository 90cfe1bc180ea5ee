"""The recommendation: which action is worth it, how sure that is, and when its cost is won back. Pure.

Without a number of tokens to serve, it climbs: from the draft unchanged, each dearer action is taken if it is faster
than the one taken so far by its share of `worth` (see EFFORT). With such a number, it is the action that
takes the least time in all: its own, and that of serving. Either is decided in every draw of the prediction;
the recommendation is the action of most draws.

Shapes: A actions, N draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.records import StepCost
from .calibration_runs import ACTIONS, ADAPT, CLOSED_FORM, KEEP, SCRATCH
from .prediction import Prediction

WORTH = 0.1
"""The gain in speed from which adapting is worth the work."""
EFFORT = {KEEP: 0.0, CLOSED_FORM: 0.5, ADAPT: 1.0, SCRATCH: 2.5}
"""Multiples of that gain that each action has to bring: a closed form takes a minute; a draft from scratch takes
four times an adaptation's answers, and is one more whole draft to keep."""


@dataclass(frozen=True)
class Cost:
    """What an action costs here: tokens that the target has to write, and seconds in all (None: not known)."""

    tokens: int
    seconds: float | None


@dataclass(frozen=True)
class Pace:
    """What one unit of tau is worth: tokens per second, and speed-up over plain decoding (None: not known).

    Where the parts of a step were timed, 1 / (K c + v) and that times the plain tokens per second.
    """

    per_second: float
    speedup: float | None

    @staticmethod
    def of(cost: StepCost, k: int) -> Pace:
        relative = 1 / (k * cost.c + cost.v(k))
        return Pace(relative * cost.rows / cost.target, relative)


@dataclass(frozen=True)
class Option:
    """An action's prospects: tau and speed-up over plain decoding (median, 95 % interval), its cost, and
    the tokens to be served until its cost is won back (None: not known, never, or nothing to pay).
    `probability` is the share of draws in which it is the right one."""

    action: str
    tau: tuple[float, float, float]
    speedup: tuple[float, float, float] | None
    probability: float
    cost: Cost
    payback_tokens: int | None


@dataclass(frozen=True)
class Recommendation:
    """`error` is the probability that another action is the right one, under the prediction.
    `faster_plain`: even the best option is slower than plain decoding, which `action` and `error` leave aside."""

    action: str
    error: float
    options: tuple[Option, ...]
    faster_plain: bool


def recommend(
    prediction: Prediction,
    pace: Pace,
    costs: Mapping[str, Cost],
    worth: float = WORTH,
    serve: int | None = None,
) -> Recommendation:
    """`serve` are tokens that will be served; it needs the seconds of every cost."""
    names = list(prediction.draws)
    tau_AN = np.stack([prediction.draws[action] for action in names])
    rate_AN = tau_AN * pace.per_second
    if serve is None:
        chosen_N = climb(names, tau_AN, worth)
    else:
        seconds_A = np.array([costs[action].seconds for action in names], dtype=float)
        chosen_N = (seconds_A[:, None] + serve / rate_AN).argmin(0)
    share_A = np.bincount(chosen_N, minlength=len(names)) / len(chosen_N)
    now = rate_AN[names.index(KEEP)]
    options = tuple(
        Option(
            action,
            prediction.interval(action),
            _times(prediction.interval(action), pace.speedup) if pace.speedup else None,
            float(share_A[at]),
            costs[action],
            payback(costs[action].seconds, now, rate_AN[at]),
        )
        for at, action in enumerate(names)
    )
    best = int(share_A.argmax())
    speedups = [option.speedup[0] for option in options if option.speedup]
    slow = bool(speedups) and max(speedups) < 1
    return Recommendation(names[best], float(1 - share_A[best]), options, slow)


def right_action(taus: Mapping[str, float], worth: float = WORTH) -> str:
    """The action that climbing ends at where these taus are known."""
    names = [action for action in ACTIONS if action in taus]
    return names[int(climb(names, np.array([[taus[action]] for action in names]), worth)[0])]


def climb(names: Sequence[str], speed_AN: Any, worth: float) -> Any:
    """In each draw the index of the action that climbing ends at, int [N]; `names` from the cheapest on."""
    chosen_N = np.zeros(speed_AN.shape[1], dtype=int)
    for at in range(1, len(names)):
        so_far_N = np.take_along_axis(speed_AN, chosen_N[None], 0)[0]
        chosen_N[speed_AN[at] > so_far_N * (1 + worth * EFFORT[names[at]])] = at
    return chosen_N


def payback(seconds: float | None, now: Any, then: Any) -> int | None:
    """Tokens served until `seconds` are won back, at the median rates now and then, in tokens/s."""
    won = 1 / float(np.median(now)) - 1 / float(np.median(then))
    return round(seconds / won) if seconds and won > 0 else None


def _times(interval: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    middle, low, high = interval
    return middle * factor, low * factor, high * factor
