"""Recovery over several training seeds at K = 4: intervals over seeds and prompts.

Drafts that are compared share the prompts. The seeds of a draft and of its from-scratch reference are
trained apart. The intervals are those of `metrics/intervals.py`.
"""

from __future__ import annotations

from redraft.metrics import intervals
from redraft.metrics.intervals import Counts, Ends, Interval

__all__ = ["Ends", "Interval", "Steps", "difference", "recovery", "recovery_change", "tau"]

Steps = Counts
K = 4


def tau(steps: Steps) -> Interval:
    """Pooled tau, the mean over seeds."""
    return intervals.tau(steps, K)


def difference(one: Steps, other: Steps) -> Interval:
    """tau(one) - tau(other) on the same prompts."""
    return intervals.difference(one, other, K)


def recovery(adapted: Steps, unadapted: Steps, from_scratch: Steps) -> Interval | None:
    """(adapted - unadapted) / (from-scratch - unadapted); None where the gap is too small."""
    return intervals.recovery(adapted, unadapted, from_scratch, K)


def recovery_change(one: Ends, other: Ends) -> Interval | None:
    """recovery(*other) - recovery(*one), on the same prompts and seeds; None where one has none."""
    return intervals.recovery_change(one, other, K)
