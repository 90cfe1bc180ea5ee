"""Recommendations against a reading of the rule by hand, and their arithmetic against a clock."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.check.calibration_runs import ACTIONS
from redraft.check.prediction import Prediction
from redraft.check.recommendation import Cost, Pace, climb, payback, recommend
from redraft.core.records import StepCost

COST = StepCost(0.01, 0.002, (0.01, 0.011, 0.012, 0.013, 0.014), 2, 30, 5)
COSTS = {"keep": Cost(0, 0.0), "closed-form": Cost(0, 5.0), "adapt": Cost(9000, 60.0)}
COSTS["from-scratch"] = Cost(36000, 300.0)


def predicted(
    keep: list[float],
    closed_form: list[float] | None = None,
    adapt: list[float] | None = None,
    scratch: list[float] | None = None,
) -> Prediction:
    taus = zip(ACTIONS, (keep, closed_form, adapt, scratch), strict=True)
    return Prediction({name: np.array(draws) for name, draws in taus if draws}, 20)


def by_hand(speeds: dict[str, float]) -> str:
    """Upwards from the unchanged draft, at a worth of 10 %."""
    taken = "keep"
    for action, gain in (("closed-form", 1.05), ("adapt", 1.10), ("from-scratch", 1.25)):
        if action in speeds and speeds[action] >= gain * speeds[taken]:
            taken = action
    return taken


@pytest.mark.parametrize("names", [ACTIONS, ("keep", "adapt", "from-scratch")])
def test_climbing_pays_for_every_step(names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    speed_AN = rng.uniform(1, 1.6, (len(names), 500))
    found = [names[at] for at in climb(names, speed_AN, 0.1)]
    assert found == [by_hand(dict(zip(names, column, strict=True))) for column in speed_AN.T]
    assert set(found) == set(names)
    # the wrong rule, whatever is fastest however little it gains, differs
    fastest = [names[at] for at in speed_AN.argmax(0)]
    assert sum(a != b for a, b in zip(found, fastest, strict=True)) > 50


def test_four_fine_tunes_get_four_recommendations() -> None:
    pace = Pace.of(COST, 4)
    for expected, taus in {
        "keep": ([3.0], [3.1], [3.2], [3.7]),
        "closed-form": ([1.2], [3.0], [3.2], [3.7]),
        "adapt": ([1.2], [1.3], [3.0], [3.2]),
        "from-scratch": ([1.2], [1.3], [1.8], [3.2]),
    }.items():
        found = recommend(predicted(*taus), pace, COSTS)
        assert (found.action, found.error) == (expected, 0.0)
    without_base = recommend(predicted(keep=[1.2], adapt=[3.0], scratch=[3.2]), pace, COSTS)
    assert [option.action for option in without_base.options] == ["keep", "adapt", "from-scratch"]
    assert without_base.action == "adapt"


def test_the_error_is_the_share_of_draws_that_say_otherwise() -> None:
    taus = {"keep": [1.2] * 4, "adapt": [1.25, 3.0, 3.0, 3.0], "scratch": [1.3, 3.1, 3.1, 3.9]}
    recommendation = recommend(predicted(**taus), Pace.of(COST, 4), COSTS)
    assert [option.probability for option in recommendation.options] == [0.25, 0.5, 0.25]
    assert (recommendation.action, recommendation.error) == ("adapt", 0.5)


def test_speed_and_payback() -> None:
    recommendation = recommend(predicted(keep=[1.2], adapt=[3.0]), Pace.of(COST, 4), COSTS)
    keep, adapt = recommendation.options
    # a step is four drafts of 2 ms and a reading of 14 ms, for two rows
    assert keep.speedup is not None
    assert keep.speedup[0] == pytest.approx((1.2 / 0.022) / (1 / 0.01))
    now, then = 2 * 1.2 / 0.022, 2 * 3.0 / 0.022
    assert adapt.payback_tokens is not None
    tokens = adapt.payback_tokens
    assert 60.0 + tokens / then == pytest.approx(tokens / now, rel=1e-3)
    assert keep.payback_tokens is None
    assert payback(60.0, [100.0], [90.0]) is None
    assert payback(None, [100.0], [190.0]) is None
    assert recommendation.faster_plain is False
    slow = recommend(predicted(keep=[1.2], adapt=[1.9]), Pace.of(COST, 4), COSTS)
    assert slow.faster_plain
    unknown = recommend(predicted(keep=[1.2], adapt=[1.9]), Pace(50.0, None), COSTS)
    assert unknown.options[0].speedup is None
    assert not unknown.faster_plain


def test_few_tokens_to_serve_pay_for_nothing() -> None:
    taus = predicted(keep=[1.2], closed_form=[1.3], adapt=[3.0], scratch=[3.3])
    pace = Pace.of(COST, 4)
    chosen = {}
    for serve in (100, 5000, 50_000, 5_000_000):
        seconds = {
            action: COSTS[action].seconds + serve / (taus.draws[action][0] * pace.per_second)
            for action in ACTIONS
        }
        chosen[serve] = recommend(taus, pace, COSTS, serve=serve).action
        assert chosen[serve] == min(seconds, key=lambda action: seconds[action])
    assert chosen[100] == "keep"
    assert chosen[50_000] == "adapt"
    assert chosen[5_000_000] == "from-scratch"
