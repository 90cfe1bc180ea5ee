"""Has acceptance fallen? A sequential test on looks at a server's counters, with a stated rate of false alarms.

    R_t              accepted tokens per step in look t, tau - 1
    before           R_t is around R0, the expected one, with variance s_t^2 = v / n_t + b^2
    after a fall     around R1 = R0 - drop * (R0 + 1): tau lost the share `drop`
    S_t              max(0, S_(t-1) + (R0 - R1) / s_t^2 * ((R0 + R1) / 2 - R_t)), the evidence (Page 1954)
    alarm            at S_t > h = log(looks between false alarms)

The evidence is the log likelihood ratio of "fallen since some look" to "as before", so e^h is a lower bound of the mean number
of looks until a false alarm (Lorden 1971), however many steps each look holds. v is the variance of a step's accepted tokens;
b^2 is what looks vary by beyond it, because requests differ: learned on the first looks as the upper end of a one-sided 95 %
interval of their variance. R0 is the lower end of what was recorded, or else of the mean of the looks that were learned on.

The bound holds for looks that are independent. Traffic whose kind changes over the day is not, and is what an alarm may mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2
from scipy.stats import t as student

from ..core.errors import UserError

LEARNING, STEADY, FALLEN = "learning", "steady", "fallen"
MOST = 2.0
"""Times the threshold: evidence gathers no further, so that a tau that is back is soon seen to be."""


@dataclass(frozen=True)
class Look:
    """What a server counted since the look before: `at` is the time of reading (Unix seconds); `per_position[j]` are
    the accepted tokens at position j of a chain."""

    at: float
    drafts: int
    accepted: int
    per_position: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """Accepted tokens per step, tau - 1."""
        return self.accepted / self.drafts


@dataclass(frozen=True)
class Seen:
    """A look and what was concluded: `expected` is the tau before a fall (None while it is learned); tau has fallen where
    `evidence` is above `threshold`, and the present evidence began to gather at `since`."""

    look: Look
    tau: float
    state: str
    expected: float | None
    evidence: float
    threshold: float
    since: float | None


class Drift:
    """The test. `expected` is the tau that was recorded elsewhere, at its lower end; None: that of the first looks."""

    def __init__(self, *, expected: float | None, drop: float, between_alarms: float, learn: int):
        """`drop` is the share of tau whose loss matters, `between_alarms` the looks from one false alarm to the next in the
        mean, `learn` the looks that are learned on. Raises UserError for an expected tau that leaves nothing to lose.
        """
        self.drop, self.learn, self.threshold = drop, learn, math.log(between_alarms)
        self.recorded = expected
        self.learned: list[Look] = []
        self.rate = 0.0 if expected is None else self._checked(expected - 1)
        self.step_variance = self.between = 0.0
        self.evidence = 0.0
        self.since: float | None = None
        self.state = LEARNING

    def add(self, look: Look) -> Seen:
        """Take a look into account. It holds a step at least."""
        if self.state == LEARNING:
            self.learned.append(look)
            if len(self.learned) == self.learn:
                self._learn()
            return self._seen(look)
        low = self.rate - self.drop * (1 + self.rate)
        variance = self.step_variance / look.drafts + self.between
        gained = (self.rate - low) / variance * ((self.rate + low) / 2 - look.rate)
        if self.evidence + gained <= 0:
            self.evidence, self.since = 0.0, None
        else:
            self.since = look.at if self.since is None else self.since
            self.evidence = min(self.evidence + gained, MOST * self.threshold)
        self.state = FALLEN if self.evidence > self.threshold else STEADY
        return self._seen(look)

    def _learn(self) -> None:
        rates, steps = (
            np.array([getattr(look, name) for look in self.learned]) for name in ("rate", "drafts")
        )
        n = len(rates)
        self.step_variance = max(step_variance(self.learned), 1e-9)
        seen = float(rates.var(ddof=1)) * (n - 1) / float(chi2.ppf(0.05, n - 1))
        self.between = max(seen - self.step_variance * float((1 / steps).mean()), 0.0)
        if self.recorded is None:
            error = float(rates.std(ddof=1)) / math.sqrt(n)
            self.rate = self._checked(
                float(rates.mean()) + float(student.ppf(0.025, n - 1)) * error
            )
        self.state = STEADY

    def _checked(self, rate: float) -> float:
        if rate <= self.drop * (1 + rate):
            raise UserError(
                f"a tau of {1 + rate:.2f} cannot fall by {self.drop:.0%}: 1 is plain decoding. The draft is hardly of use; "
                "see redraft check"
            )
        return rate

    def _seen(self, look: Look) -> Seen:
        expected = None if self.state == LEARNING and self.recorded is None else 1 + self.rate
        return Seen(
            look, 1 + look.rate, self.state, expected, self.evidence, self.threshold, self.since
        )


def step_variance(looks: Sequence[Look]) -> float:
    """The variance of a step's accepted tokens, from the counts by position; without those, of a geometric number."""
    steps, accepted = sum(look.drafts for look in looks), sum(look.accepted for look in looks)
    mean = accepted / steps
    if not all(look.per_position for look in looks):
        return mean * (1 + mean)
    counts = np.sum([look.per_position for look in looks], axis=0)
    # P(accepted >= j) = counts[j - 1] / steps, and E[A^2] is the sum of (2 j - 1) P(A >= j).
    square = float(np.sum((2 * np.arange(1, len(counts) + 1) - 1) * counts) / steps)
    return square - mean**2
