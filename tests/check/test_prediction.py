"""Predictions: the line is found, and the stated error is that of kinds never seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student
from sklearn.linear_model import BayesianRidge

from redraft.check import prediction as module
from redraft.check.prediction import (
    PREDICTED,
    Case,
    as_json,
    outlook,
    predict,
    read_cases,
    tau_of,
    z_of,
)
from redraft.core.errors import UserError
from tests.check.conftest import made_up_cases


def test_tau_and_its_place_on_the_line() -> None:
    for k in (1, 4, 8):
        for acceptance in (0.1, 0.5, 0.9):
            tau = 1 + sum(acceptance**j for j in range(1, k + 1))
            # the same at every K: a draft of equal acceptance has one place
            assert z_of(tau, k) == pytest.approx(np.log(acceptance / (1 - acceptance)), abs=1e-6)
            assert tau_of(z_of(tau, k), k) == pytest.approx(tau)
    assert z_of(1.0, 4) == pytest.approx(z_of(1.001, 4))
    assert np.isfinite(z_of(5.0, 4))


def test_a_prediction_means_the_same_at_another_k(cases: list[Case]) -> None:
    places = {}
    for k in (2, 4, 8):
        signs = {n: tau_of(z_of(t, 4), k) for n, t in cases[0].signs.items() if n != "entropy"}
        signs["entropy"] = cases[0].signs["entropy"]
        places[k] = predict(signs, k, cases)[0]
    assert places[2] == pytest.approx(places[4], abs=1e-6)
    assert places[8] == pytest.approx(places[4], abs=1e-6)


def test_what_was_measured_is_drawn_together(cases: list[Case]) -> None:
    keep = np.linspace(1.2, 2.2, 50)
    seen = outlook(cases[0].signs, 4, {"keep": keep, "refresh": keep + 0.1}, cases)
    np.testing.assert_allclose(seen.draws["refresh"] - seen.draws["keep"], 0.1)


def test_a_line_is_found(cases: list[Case]) -> None:
    exact = made_up_cases(noise=0.0)
    signs = {"reused": 1.5, "refreshed": 2.0, "native": 3.0, "entropy": 1.0}
    middle, errors, *_ = predict(signs, 4, exact)
    true = 0.5 * z_of(1.5, 4) + 0.3 * z_of(2.0, 4) + 0.4
    assert middle["adapt"] == pytest.approx(true, abs=0.01)
    assert middle["retrain"] == pytest.approx(true + 0.5, abs=0.01)
    assert np.abs(errors).max() < 0.05
    assert np.abs(predict(signs, 4, cases)[1]).max() > 0.1


def by_hand(cases: list[Case], skip_own_kind: bool) -> np.ndarray:
    """The errors on each case by a model that did (or did not) see its kind, one case at a time."""
    names = ("reused", "entropy", "native", "refreshed")

    def signs(case: Case) -> list[float]:
        return [case.signs[n] if n == "entropy" else z_of(case.signs[n], 4) for n in names]

    errors = []
    for case in cases:
        seen = [c for c in cases if not skip_own_kind or c.kind != case.kind]
        x = np.array([signs(c) for c in seen])
        middle, spread = x.mean(0), x.std(0)
        row = []
        for action in PREDICTED:
            y = [z_of(c.taus[action], 4) for c in seen]
            model = BayesianRidge().fit((x - middle) / spread, y)
            guess = model.predict((np.array([signs(case)]) - middle) / spread)[0]
            row.append(z_of(case.taus[action], 4) - guess)
        errors.append(row)
    return np.array(errors)


def test_errors_are_those_on_kinds_left_out(cases: list[Case]) -> None:
    errors = predict(cases[0].signs, 4, cases).errors
    np.testing.assert_allclose(errors, by_hand(cases, True), atol=1e-6)
    # an error that is told on the cases it was fitted on flatters itself, and is told apart
    flattering = by_hand(cases, False)
    assert np.abs(flattering).mean() < np.abs(errors).mean()
    assert not np.allclose(flattering, errors, atol=1e-3)


def test_intervals_hold_what_they_say() -> None:
    """On new cases of the same making, 95 % intervals hold that many outcomes; halved ones do not."""
    known, new = made_up_cases(40), made_up_cases(60, seed=9)
    held = narrow = 0
    for case in new:
        seen = outlook(case.signs, 4, {"keep": [1.0]}, known)
        middle, low, high = seen.interval("adapt")
        held += low <= case.taus["adapt"] <= high
        narrow += abs(case.taus["adapt"] - middle) <= (high - low) / 8
    assert held / len(new) >= 0.93
    assert narrow / len(new) < 0.7


def test_draws_are_as_wide_as_the_errors_and_wider_at_their_ends(cases: list[Case]) -> None:
    """Against the quantiles of Student's t: as sure as five kinds allow, not as 25 cases would."""
    signs = cases[0].signs
    middle, errors, kinds, *_ = predict(signs, 4, cases)
    assert kinds == 5
    drawn = outlook(signs, 4, {"keep": [1.5]}, cases, draws=40_000).draws
    z = np.array([[z_of(t, 4) for t in drawn[a][:15000]] for a in PREDICTED])
    off = z - np.array([[middle[a]] for a in PREDICTED])
    rms = np.sqrt((errors**2).mean(0))
    for at in range(len(PREDICTED)):
        for p in (0.025, 0.5, 0.975):
            wanted = rms[at] * student.ppf(p, kinds - 1)
            assert np.quantile(off[at], p) == pytest.approx(wanted, abs=0.15 * rms[at])
        too_sure = rms[at] * student.ppf(0.975, len(errors) - 1)
        assert np.quantile(off[at], 0.975) > 1.1 * too_sure
    together = np.corrcoef(errors.T)[0, 1]
    assert np.corrcoef(off)[0, 1] == pytest.approx(together, abs=0.15)


def test_a_private_part_is_not_worse_than_the_draft_it_starts_from(cases: list[Case]) -> None:
    signs = {**cases[0].signs, "reused": 1.1, "refreshed": 1.1}
    seen = outlook(signs, 4, {"keep": [3.5, 3.6]}, cases)
    assert (seen.draws["adapt"] >= seen.draws["keep"]).all()
    assert seen.draws["retrain"].min() < 3.5


def test_what_no_case_had_is_named(cases: list[Case]) -> None:
    signs = {n: float(np.median([c.signs[n] for c in cases])) for n in cases[0].signs}
    assert predict(signs, 4, cases).outside == ()
    far = {**signs, "entropy": 9.0, "native": 1.01}
    assert outlook(far, 4, {"keep": [1.5]}, cases).outside == ("entropy", "native")
    high = {n: float(np.quantile([c.signs[n] for c in cases], 0.9)) for n in signs}
    taus = {n: float(tau_of(z_of(high[n], 4), 8)) for n in ("reused", "native", "refreshed")}
    assert all(taus[n] > max(c.signs[n] for c in cases) for n in taus)
    assert predict({**high, **taus}, 8, cases).outside == (), "a tau of K = 8 is larger, not far"
    assert predict({**high, **taus}, 4, cases).outside == ("reused", "native", "refreshed")


def test_temperature_moves_the_prediction() -> None:
    """A shift of every outcome with temperature is found, taken in proportion between, and named beyond."""
    greedy, drop = made_up_cases(noise=0.0), 0.6
    warm = [
        dataclasses.replace(
            case,
            temperature=0.8,
            taus={a: float(tau_of(z_of(t, 4) - drop, 4)) for a, t in case.taus.items()},
        )
        for case in made_up_cases(noise=0.0, seed=3)
    ]
    signs = greedy[0].signs
    cold = predict(signs, 4, [*greedy, *warm])
    for temperature, share in ((0.4, 0.5), (0.8, 1.0)):
        seen = predict(signs, 4, [*greedy, *warm], temperature)
        for action in PREDICTED:
            fell = cold.middle[action] - seen.middle[action]
            assert fell == pytest.approx(share * drop, abs=0.03)
        assert seen.outside == ()
    assert predict(signs, 4, [*greedy, *warm], 1.0).outside == ("temperature",)
    blind = predict(signs, 4, greedy, 0.8)
    assert blind.middle == pytest.approx(predict(signs, 4, greedy).middle, abs=1e-9)
    assert blind.outside == ("temperature",), "no case was sampled"
    alone = [dataclasses.replace(case, temperature=0.7) for case in made_up_cases(24)]
    for temperature in (0.0, 1.0):
        far = predict(signs, 4, alone, temperature).middle
        assert far == pytest.approx(predict(signs, 4, alone, 0.7).middle, abs=1e-9)
    forgotten = [dataclasses.replace(case, temperature=0.0) for case in warm]
    wrong = predict(signs, 4, [*greedy, *forgotten], 0.8)
    for action in PREDICTED:
        assert cold.middle[action] - wrong.middle[action] < 0.7 * drop, (
            "a table without temperatures"
        )


def test_intervals_are_as_wide_as_errors_on_cases_decoded_alike() -> None:
    greedy = made_up_cases(noise=0.3)
    warm = [dataclasses.replace(c, temperature=0.7) for c in made_up_cases(noise=0.01, seed=3)]
    signs = greedy[0].signs
    both = [*greedy, *warm]
    wide, narrow = (predict(signs, 4, both, temperature) for temperature in (0.0, 0.7))
    assert (len(wide.errors), len(narrow.errors), wide.cases) == (25, 25, 50)
    assert np.abs(wide.errors).mean() > 3 * np.abs(narrow.errors).mean()
    assert outlook(signs, 4, {"keep": [1.5]}, both).cases == 50
    assert len(predict(signs, 4, both, 0.05).errors) == 50, "nearly greedy is not sampled"
    few = predict(signs, 4, [*greedy, *warm[:7]], 0.7)
    assert len(few.errors) == 32, "seven are too few to go by alone"


def test_the_signs_that_are_there_are_used(cases: list[Case]) -> None:
    signs = dict(cases[0].signs)
    widths = []
    for names in (("reused", "entropy", "native", "refreshed"), ("reused",)):
        seen = outlook({n: signs[n] for n in names}, 4, {"keep": [1.2, 1.3]}, cases)
        assert set(seen.draws) == {"keep", "adapt", "retrain"}
        assert set(np.round(seen.draws["keep"], 6)) == {1.2, 1.3}
        _, low, high = seen.interval("adapt")
        widths.append(high - low)
    assert widths[1] > widths[0], "knowing less must not look surer"


def test_tables_that_say_too_little(cases: list[Case], tmp_path: Path) -> None:
    for few in (cases[:5], [c for c in cases if c.kind in ("sft", "lora")]):
        with pytest.raises(UserError, match="a prediction needs 8 known cases of three kinds"):
            predict(cases[0].signs, 4, few)
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(as_json(cases)))
    again = read_cases(file)
    assert again == cases
    file.write_text("{}")
    with pytest.raises(UserError, match="no table of known cases"):
        read_cases(file)


def test_a_sign_that_too_few_cases_have_is_not_used(cases: list[Case]) -> None:
    """The next set of signs is taken: what is there of the others is not thrown away."""
    signs = cases[0].signs
    bare = [
        dataclasses.replace(c, signs={n: c.signs[n] for n in ("reused", "entropy", "native")})
        for c in cases
    ]
    seen = predict(signs, 4, [*cases[:7], *bare[7:]])
    assert seen.middle == predict(signs, 4, bare).middle
    assert seen.middle != predict(signs, 4, cases).middle


def test_the_table_that_comes_with_redraft() -> None:
    known = read_cases(module.SHIPPED)
    assert len(known) >= module.FEWEST
    assert len({case.kind for case in known}) >= 3
    predict(known[0].signs, known[0].k, known)
