"""A fall of acceptance is found soon, and one that is none rarely: against the likelihood itself, and by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from redraft.core.errors import UserError
from redraft.metrics.drift import FALLEN, LEARNING, STEADY, Drift, Look, step_variance

K = 4
LEARN = 20


def looks(
    draw: np.random.Generator,
    count: int,
    *,
    rate: float = 0.55,
    spread: float = 0.0,
    steps: int = 900,
) -> list[Look]:
    """Looks at requests that accept with chances of their own around `rate`."""
    found = []
    for at in range(count):
        chance = np.clip(rate + spread * draw.standard_normal(), 0.02, 0.98)
        n = int(draw.integers(steps // 2, 2 * steps))
        reached, counts = n, []
        for _ in range(K):
            reached = int(draw.binomial(reached, chance))
            counts.append(reached)
        found.append(Look(float(at), n, sum(counts), tuple(counts)))
    return found


def run(drift: Drift, some: list[Look]) -> list[Any]:
    return [drift.add(look) for look in some]


def test_the_evidence_is_the_likelihood_ratio_of_the_best_time_of_change() -> None:
    draw = np.random.default_rng(0)
    drift = Drift(expected=None, drop=0.1, between_alarms=1e9, learn=LEARN)
    run(drift, looks(draw, LEARN, spread=0.02))
    fallen = looks(draw, 12, rate=0.53, spread=0.02)
    high, low = drift.rate, drift.rate - 0.1 * (1 + drift.rate)
    gained: list[float] = []
    for look in fallen:
        seen = drift.add(look)
        scale = math.sqrt(drift.step_variance / look.drafts + drift.between)
        ratio = norm.logpdf(look.rate, low, scale) - norm.logpdf(look.rate, high, scale)
        gained.append(float(ratio))
        best = max(sum(gained[begin:]) for begin in range(len(gained) + 1))
        assert seen.evidence == pytest.approx(best, abs=1e-9)
    assert max(gained) > 0


def test_a_steps_variance_is_that_of_its_tokens() -> None:
    draw = np.random.default_rng(1)
    accepted = np.minimum(draw.geometric(0.4, 5000) - 1, K)
    counts = tuple(int((accepted >= j).sum()) for j in range(1, K + 1))
    look = Look(0.0, len(accepted), int(accepted.sum()), counts)
    assert step_variance([look]) == pytest.approx(float(accepted.var()))
    halves = [Look(0.0, 100, 90, ()), Look(0.0, 300, 110, ())]
    assert step_variance(halves) == pytest.approx(0.5 * 1.5)


def first_alarms(
    simulations: int, most: int, spread: float, between: float, ignore_spread: bool = False
) -> NDArray[np.float64]:
    """Looks until the first false alarm after learning, at most `most`."""
    found = []
    for seed in range(simulations):
        draw = np.random.default_rng(seed)
        drift = Drift(expected=None, drop=0.1, between_alarms=between, learn=LEARN)
        run(drift, looks(draw, LEARN, spread=spread))
        if ignore_spread:
            drift.between = 0.0
        at = most
        for number, look in enumerate(looks(draw, most, spread=spread)):
            if drift.add(look).state == FALLEN:
                at = number + 1
                break
        found.append(at)
    return np.array(found, dtype=float)


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.08])
def test_false_alarms_are_as_rare_as_was_asked_for(spread: float) -> None:
    between = 60.0
    found = first_alarms(60, 240, spread, between)
    assert found.mean() >= between  # cut at 240, so a lower bound of the mean


def test_without_the_spread_between_looks_there_would_be_more() -> None:
    assert first_alarms(30, 240, 0.08, 60.0, ignore_spread=True).mean() < 30


@pytest.mark.parametrize("spread", [0.0, 0.03])
def test_a_fall_is_found_soon(spread: float) -> None:
    delays = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        drift = Drift(expected=None, drop=0.1, between_alarms=43200.0, learn=LEARN)
        assert run(drift, looks(draw, LEARN, spread=spread))[-1].state == STEADY
        seen = run(drift, looks(draw, 40, rate=0.42, spread=spread))
        alarms = [at for at, one in enumerate(seen) if one.state == FALLEN]
        assert alarms
        assert seen[alarms[0]].since is not None
        delays.append(alarms[0] + 1)
        back = run(drift, looks(draw, 40, spread=spread))
        assert back[-1].state == STEADY
    assert np.median(delays) <= 8


def test_a_recorded_tau_is_held_against_from_the_first_look() -> None:
    draw = np.random.default_rng(3)
    drift = Drift(expected=2.4, drop=0.1, between_alarms=100.0, learn=8)
    seen = run(drift, looks(draw, 8, rate=0.45))
    assert [one.state for one in seen] == [LEARNING] * 7 + [STEADY]
    assert seen[0].expected == 2.4
    assert run(drift, looks(draw, 30, rate=0.45))[-1].state == FALLEN


def test_a_draft_with_nothing_to_lose_is_refused() -> None:
    with pytest.raises(UserError, match=r"a tau of 1\.05 cannot fall by 10%"):
        Drift(expected=1.05, drop=0.1, between_alarms=100.0, learn=8)
