"""Recovery over several training seeds: seeds are resampled, then prompts.

Each resample draws seeds (for the draft and for its dedicated reference, which are trained apart)
and one set of prompts, which numerator and denominator share.

Shapes: S seeds, P prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Steps = Sequence[Sequence[tuple[int, int]]]
"""For each seed, (accepted, steps) of each prompt, prompts in one order."""
Ends = tuple[Steps, Steps, Steps]
"""Of an adapted draft, of the reused one and of the dedicated one."""
RESAMPLES = 2000
SMALLEST_GAP = 0.15
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def tau(steps: Steps, seed: int = 0) -> Interval:
    """Pooled tau of all seeds."""
    drawn = _drawn(_counts(steps), np.random.default_rng(seed), _prompts(steps, seed))
    return _interval(_pooled(steps), drawn)


def difference(one: Steps, other: Steps, seed: int = 0) -> Interval:
    """tau(one) - tau(other) on the same prompts."""
    prompts, rng = _prompts(one, seed), np.random.default_rng(seed)
    drawn = _drawn(_counts(one), rng, prompts) - _drawn(_counts(other), rng, prompts)
    return _interval(_pooled(one) - _pooled(other), drawn)


def recovery(adapted: Steps, reused: Steps, dedicated: Steps, seed: int = 0) -> Interval | None:
    """(adapted - reused) / (dedicated - reused).

    None when the denominator's interval reaches 0 or it does not exceed 0.15 tau: then only the
    difference in tau may be reported.
    """
    found = _recovered((adapted, reused, dedicated), seed)
    return found and _interval(*found)


def recovery_change(one: Ends, other: Ends, seed: int = 0) -> Interval | None:
    """recovery(*other) - recovery(*one), with the same prompts and seeds in each resample.

    The two may be other steps of the same answers, or another adapted draft between the same ends.
    None where one of them has no recovery.
    """
    a, b = _recovered(one, seed), _recovered(other, seed)
    return _interval(b[0] - a[0], b[1] - a[1]) if a and b else None


def _recovered(of: Ends, seed: int) -> tuple[float, Floats] | None:
    """Recovery, and that of each resample [R]."""
    prompts, rng = _prompts(of[0], seed), np.random.default_rng(seed)
    a, r, d = (_drawn(_counts(steps), rng, prompts) for steps in of)
    adapted, reused, dedicated = map(_pooled, of)
    gap = dedicated - reused
    if np.percentile(d - r, 2.5) <= 0 or gap <= SMALLEST_GAP:
        return None
    return (adapted - reused) / gap, (a - r) / (d - r)


def _counts(steps: Steps) -> Floats:
    """[S, P, 2]"""
    return np.array(steps, dtype=float)


def _pooled(steps: Steps) -> float:
    """Mean over seeds of the tau pooled over prompts."""
    accepted, taken = _counts(steps).sum(1).T
    return float((1 + accepted / taken).mean())


def _prompts(steps: Steps, seed: int) -> NDArray[np.int64]:
    count = len(steps[0])
    return np.random.default_rng(seed + 1).integers(0, count, (RESAMPLES, count))


def _drawn(counts: Floats, rng: np.random.Generator, prompts_RP: NDArray[np.int64]) -> Floats:
    """Tau of each resample [R]."""
    seeds = len(counts)
    per_seed = np.stack([c[prompts_RP].sum(1) for c in counts])  # [S, R, 2]
    tau_SR = 1 + per_seed[..., 0] / per_seed[..., 1]
    chosen_RS = rng.integers(0, seeds, (len(prompts_RP), seeds))
    drawn: Floats = np.take_along_axis(tau_SR.T, chosen_RS, 1).mean(1)
    return drawn


def _interval(value: float, drawn: Floats) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))
