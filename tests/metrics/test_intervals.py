"""Intervals cover what they promise: simulated populations of prompts, closed forms, and the ends of the range.

A population is drawn once and large; its pooled figure is the truth. Samples of few prompts are drawn
from it many times. The bar is 95 % less three binomial standard errors. Percentile bootstraps of the same
samples miss it.

Shapes: Q prompts of a population, M samples, P prompts of a sample, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from redraft.metrics import intervals
from redraft.metrics.intervals import Interval

K = 4
SAMPLES = 2000
BAR = 0.95 - 3 * (0.95 * 0.05 / SAMPLES) ** 0.5
WIDEST = 0.98 + 3 * (0.98 * 0.02 / SAMPLES) ** 0.5
"""Coverage above this is needless width."""
POPULATIONS = {  # mean acceptance, concentration of its beta, spread of log lengths, longest
    "even": (0.5, 50, 0.4, 128),
    "low": (0.13, 5, 0.6, 128),
    "high": (0.85, 6, 0.6, 128),
    "long": (0.55, 5, 0.8, 1000),
}


def walked(rate_Q: Any, length_Q: Any, rng: np.random.Generator) -> Any:
    """Counts [Q, 2] of chains of K until each answer is as long as it should be."""
    accepted_Q, steps_Q, emitted_Q = (np.zeros(len(rate_Q)) for _ in range(3))
    while (going := emitted_Q < length_Q).any():
        found_Q = np.minimum(rng.geometric(1 - rate_Q) - 1, K) * going
        accepted_Q += found_Q
        steps_Q += going
        emitted_Q += found_Q + going
    return np.stack([accepted_Q, steps_Q], -1)


@cache
def population(name: str) -> Any:
    """[Q, 2]"""
    mean, concentration, spread, longest = POPULATIONS[name]
    rng = np.random.default_rng(1)
    rate_Q = rng.beta(mean * concentration, (1 - mean) * concentration, 10_000)
    length_Q = np.clip(60 * np.exp(spread * rng.normal(size=10_000)), 1, longest)
    return walked(np.minimum(rate_Q, 0.999), length_Q, rng)


@cache
def drafts() -> list[Any]:
    """Adapted, unadapted and from scratch, each [Q, 2]: a prompt that is hard for one is hard for all."""
    rng = np.random.default_rng(2)
    hard_Q = rng.normal(size=10_000)
    length_Q = np.clip(60 * np.exp(0.6 * rng.normal(size=10_000)), 1, 128)
    return [
        walked(expit(level + hard_Q + 0.4 * rng.normal(size=10_000)), length_Q, rng)
        for level in (0.0, -1.5, 1.0)
    ]


def pooled(counts_P2: Any) -> float:
    accepted, steps = counts_P2.sum(0)
    return float(1 + accepted / steps)


def samples(prompts: int, of: int) -> Any:
    """Indices [M, P]."""
    return np.random.default_rng(prompts).integers(0, of, (SAMPLES, prompts))


def covered(truth: float, found: list[Interval]) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def resampled(counts_MP2: Any, resamples: int = 499) -> Any:
    """Tau [M, B] of prompts drawn again, the same draws for each sample."""
    prompts = counts_MP2.shape[1]
    drawn_BP = np.random.default_rng(0).multinomial(prompts, np.ones(prompts) / prompts, resamples)
    return 1 + counts_MP2[..., 0] @ drawn_BP.T / (counts_MP2[..., 1] @ drawn_BP.T)


def percentile_covered(truth: float, drawn_MB: Any) -> float:
    low_M, high_M = np.percentile(drawn_MB, [2.5, 97.5], axis=1)
    return float(((low_M <= truth) & (truth <= high_M)).mean())


# -- coverage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [8, 16, 64])
@pytest.mark.parametrize("name", POPULATIONS)
def test_the_interval_of_tau_covers(name: str, prompts: int) -> None:
    counts_Q2 = population(name)
    sampled_MP2 = counts_Q2[samples(prompts, len(counts_Q2))]
    found = [intervals.tau(one[None], K) for one in sampled_MP2]
    assert BAR <= covered(pooled(counts_Q2), found) <= WIDEST
    if prompts <= 16:
        old = percentile_covered(pooled(counts_Q2), resampled(sampled_MP2))
        assert old < BAR, "a percentile bootstrap would pass"


@pytest.mark.parametrize("prompts", [8, 16, 64])
def test_differences_and_recoveries_cover(prompts: int) -> None:
    adapted, unadapted, scratch = drafts()
    a, u, s = map(pooled, (adapted, unadapted, scratch))
    index_MP = samples(prompts, len(adapted))
    picked = [each[index_MP] for each in (adapted, unadapted, scratch)]
    trios = list(zip(*(each[:, None] for each in picked), strict=True))
    rises = [intervals.difference(one, other, K) for one, other, _ in trios]
    shares = [intervals.recovery(*trio, K) for trio in trios]
    kept = [share for share in shares if share]
    assert len(kept) > 0.8 * SAMPLES
    assert BAR <= covered(a - u, rises) <= WIDEST
    assert BAR <= covered((a - u) / (s - u), kept) <= WIDEST
    if prompts <= 16:
        drawn = [resampled(each) for each in picked]
        gap_MB = drawn[2] - drawn[1]
        assert percentile_covered(a - u, drawn[0] - drawn[1]) < BAR
        assert percentile_covered((a - u) / (s - u), (drawn[0] - drawn[1]) / gap_MB) < BAR


@pytest.mark.parametrize("prompts", [8, 32])
def test_ratios_cover(prompts: int) -> None:
    one, other = population("high"), population("even")
    a, b = one[samples(prompts, 10_000)], other[samples(prompts, 10_000)[::-1]]
    found = [intervals.ratio(x[None], y[None], K) for x, y in zip(a, b, strict=True)]
    assert BAR <= covered(pooled(one) / pooled(other), found) <= WIDEST


@pytest.mark.parametrize("prompts", [8, 16, 64])
def test_paired_ratios_cover_and_are_narrower(prompts: int) -> None:
    """A prompt that is hard for one is hard for the other, so half of the spread is common."""
    adapted, unadapted, _ = drafts()
    index_MP = samples(prompts, len(adapted))
    pairs = [(adapted[at_P][None], unadapted[at_P][None]) for at_P in index_MP]
    found = [intervals.paired_ratio(one, other, K) for one, other in pairs]
    apart = [intervals.ratio(one, other, K) for one, other in pairs[:200]]
    assert BAR <= covered(pooled(adapted) / pooled(unadapted), found) <= WIDEST
    narrower = [a.high - a.low < b.high - b.low for a, b in zip(found, apart, strict=False)]
    assert np.mean(narrower) > 0.9
    (one, other), *_ = pairs
    assert found[0].value == pytest.approx(pooled(one[0]) / pooled(other[0]))
    assert intervals.paired_ratio(one, one, K).ends == (1.0, 1.0)
    with pytest.raises(ValueError, match="same prompts"):
        intervals.paired_ratio(one, other[:, 1:], K)


def test_a_ratio_that_all_prompts_share_is_not_certain() -> None:
    one, other = np.full((1, 4, 2), 3.0), np.tile([4.0, 3.0], (1, 4, 1))
    found = intervals.paired_ratio(one, other, K)
    assert found == intervals.ratio(one, other, K)
    assert found.low < found.value < found.high


def test_few_seeds_widen_the_interval() -> None:
    """Three seeds that move tau as much as the prompts do; a bootstrap over three seeds is too narrow."""
    rng = np.random.default_rng(3)
    steps_SP, prompts = np.full((3, 32), 40.0), 32
    found, old = [], []
    for _ in range(SAMPLES):
        rate_SP = 1.5 + rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.25, (1, prompts))
        counts_SP2 = np.stack([rate_SP * steps_SP, steps_SP], -1)
        found.append(intervals.tau(counts_SP2, K))
        drawn_B = rate_SP[rng.integers(0, 3, (300, 3)), :].mean(1)
        picked_BP = rng.integers(0, prompts, (300, prompts))
        old.append(1 + np.take_along_axis(drawn_B, picked_BP, 1).mean(1))
    assert BAR <= covered(2.5, found) <= WIDEST
    assert percentile_covered(2.5, np.array(old)) < BAR


# -- against other ways to compute it --------------------------------------------------------------


def even_counts(seed: int, prompts: int, steps: int = 20) -> Any:
    accepted_P = np.random.default_rng(seed).integers(5, 60, prompts)
    return np.stack([accepted_P, np.full(prompts, steps)], -1).astype(float)


def test_prompts_of_equal_length_give_students_interval() -> None:
    """Tau is then a mean over prompts, and a difference the paired t-test's."""
    one, other = even_counts(1, 12), even_counts(2, 12)
    rates, others = one[:, 0] / 20, other[:, 0] / 20
    expected = stats.ttest_rel(rates, others).confidence_interval(0.95)
    assert intervals.difference(one[None], other[None], K).ends == pytest.approx(tuple(expected))
    found = intervals.tau(one[None], K)
    half = stats.sem(rates) * stats.t.ppf(0.975, 11)
    share = rates.mean() / K
    reach = half / (K * share * (1 - share))
    expected = 1 + K * expit(stats.logistic.ppf(share) + np.array([-reach, reach]))
    assert found.ends == pytest.approx(tuple(expected))


def test_seeds_alone_give_students_interval_over_seeds() -> None:
    counts = [[(accepted, 20.0)] * 6 for accepted in (20.0, 22.0, 27.0)]
    expected = stats.ttest_1samp([2.0, 2.1, 2.35], 0).confidence_interval(0.95)
    low, high = intervals.difference(counts, [[(0.0, 20.0)] * 6], K).ends
    assert (low + 1, high + 1) == pytest.approx(tuple(expected))


def test_many_prompts_agree_with_a_bootstrap() -> None:
    some = population("low")[:400]
    reference = stats.bootstrap(
        (some[:, 0], some[:, 1]),
        lambda accepted, steps, axis: 1 + accepted.sum(axis) / steps.sum(axis),
        paired=True,
        n_resamples=4000,
        method="BCa",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    found = intervals.tau(some[None], K)
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.06 * width)
    assert found.high == pytest.approx(reference.high, abs=0.06 * width)


def test_long_prompts_count_for_few() -> None:
    """Two prompts of a thousand steps and six of ten have hardly more than two prompts' worth of freedom."""
    counts = even_counts(1, 8)
    counts[:2] *= 50
    even, uneven = (intervals._tau(c[None]).error()[1] for c in (even_counts(1, 8), counts))
    assert even == pytest.approx(7)
    assert 1 <= uneven < 2


# -- the ends of the range -------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [1, 2, 8, 64])
def test_where_no_prompt_differs_the_unseen_ones_decide(prompts: int) -> None:
    unseen = 1 - 0.025 ** (1 / prompts)
    for accepted, tau in ((0, 1.0), (10, 2.0), (40, 5.0)):
        found = intervals.tau([[(accepted, 10)] * prompts], K)
        assert found.value == tau
        assert found.ends == pytest.approx((tau - unseen * (tau - 1), tau + unseen * (5 - tau)))
    # Such a share of other prompts stays unseen in 2.5 % of samples.
    assert (1 - unseen) ** prompts == pytest.approx(0.025)


def test_one_prompt_shows_no_recovery_and_hardly_a_difference() -> None:
    one, other, best = ([[(accepted, 10)]] for accepted in (20, 10, 30))
    low, high = intervals.difference(one, other, K).ends
    assert low < -3.8
    assert high > 3.9
    assert intervals.recovery(one, other, best, K) is None


def test_intervals_hold_their_figure_and_stay_in_range() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        steps = rng.integers(1, 30, rng.integers(1, 12))
        accepted = rng.binomial(K * steps, rng.beta(0.3, 0.3))
        found = intervals.tau([list(zip(accepted.tolist(), steps.tolist(), strict=True))], K)
        assert 1 <= found.low <= found.value <= found.high <= K + 1


def test_no_gap_has_no_recovery() -> None:
    adapted, unadapted, scratch = (each[None, :40] for each in drafts())
    assert intervals.recovery(adapted, unadapted, unadapted, K) is None
    assert intervals.recovery(adapted, scratch, unadapted, K) is None
    found = intervals.recovery(scratch, unadapted, scratch, K)
    assert found
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_what_is_not_comparable_is_refused() -> None:
    one, other = even_counts(1, 8)[None], even_counts(2, 9)[None]
    with pytest.raises(ValueError, match=r"figures of the same prompts, found \[8, 9\]"):
        intervals.difference(one, other, K)
    with pytest.raises(ValueError, match="a tau between 1 and 2 at K=1, found 2.825"):
        intervals.tau(one, 1)


@pytest.mark.parametrize("level", [intervals.LEVEL, intervals.SEQUENTIAL_LEVEL])
def test_the_middle_of_the_draws_is_the_interval(
    level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 200_000)
    one, other = even_counts(1, 12)[None], even_counts(2, 12)[None]
    cases: list[tuple[Callable[..., Any], Callable[..., Interval], tuple[Any, ...]]] = [
        (intervals.tau_draws, intervals.tau, (one, K)),
        (intervals.tau_draws, intervals.tau, ([[(10, 10)] * 8], K)),
        (intervals.difference_draws, intervals.difference, (one, other, K)),
    ]
    for drawn, whole, given in cases:
        found = whole(*given, level)
        ends = np.percentile(drawn(*given, level), [2.5, 97.5])
        assert ends == pytest.approx(found.ends, abs=0.02 * (found.high - found.low))
