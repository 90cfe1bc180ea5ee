"""Predictions: the line is found, and the stated error is that of kinds never seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.stats import t as student
from sklearn.linear_model import BayesianRidge

from redraft.check.calibration_runs import CalibrationRun, Checked
from redraft.check.prediction import (
    PREDICTED,
    PREDICTORS,
    Prediction,
    errors_of,
    predict,
    regression,
    tau_of,
    usable,
    z_of,
)
from redraft.core.errors import UserError
from tests.check.conftest import made_up_runs


def draft(predictors: Mapping[str, float], k: int = 4, temperature: float = 0.0) -> Checked:
    return Checked(predictors=dict(predictors), k=k, temperature=temperature)


def middle(checked: Checked, runs: Sequence[CalibrationRun]) -> dict[str, float]:
    """z by action, as a check predicts it."""
    names, some = usable(checked, runs)
    return dict(zip(PREDICTED, regression(some, [checked], names)[0].tolist(), strict=True))


def errors(checked: Checked, runs: Sequence[CalibrationRun]) -> tuple[np.ndarray, int]:
    names, some = usable(checked, runs)
    return errors_of(checked, some, names, regression)


def kept(checked: Checked, runs: Sequence[CalibrationRun], *taus: float) -> Prediction:
    return predict(checked, {"keep": list(taus) or [1.5]}, runs)


def test_tau_and_its_place_on_the_line() -> None:
    for k in (1, 4, 8):
        for acceptance in (0.1, 0.5, 0.9):
            tau = 1 + sum(acceptance**j for j in range(1, k + 1))
            # the same at every K: a draft of equal acceptance has one place
            assert z_of(tau, k) == pytest.approx(np.log(acceptance / (1 - acceptance)), abs=1e-6)
            assert tau_of(z_of(tau, k), k) == pytest.approx(tau)
    assert z_of(1.0, 4) == pytest.approx(z_of(1.001, 4))
    assert np.isfinite(z_of(5.0, 4))


def test_a_prediction_means_the_same_at_another_k(runs: list[CalibrationRun]) -> None:
    places = {}
    for k in (2, 4, 8):
        taus = {n: tau_of(z_of(t, 4), k) for n, t in runs[0].predictors.items() if n != "entropy"}
        taus["entropy"] = runs[0].predictors["entropy"]
        places[k] = middle(draft(taus, k), runs)
    assert places[2] == pytest.approx(places[4], abs=1e-6)
    assert places[8] == pytest.approx(places[4], abs=1e-6)


def test_what_was_measured_is_drawn_together(runs: list[CalibrationRun]) -> None:
    keep = np.linspace(1.2, 2.2, 50)
    seen = predict(runs[0], {"keep": keep, "closed-form": keep + 0.1}, runs)
    np.testing.assert_allclose(seen.draws["closed-form"] - seen.draws["keep"], 0.1)
    assert list(seen.draws) == ["keep", "closed-form", "adapt", "from-scratch"]


def test_runs_of_much_smaller_targets_predict_nothing(runs: list[CalibrationRun]) -> None:
    keep = np.linspace(1.2, 2.2, 50)
    measured = {"keep": keep, "adapt": keep + 0.3}
    sized = [dataclasses.replace(run, parameters=1000) for run in runs]
    for parameters, count in ((10_000, len(runs)), (10_001, 0)):
        new = dataclasses.replace(draft(runs[0].predictors), parameters=parameters)
        found = predict(new, measured, sized)
        assert found.runs == count
        assert (list(found.draws) == ["keep", "adapt"]) == (count == 0)
    np.testing.assert_allclose(found.draws["adapt"] - found.draws["keep"], 0.3)
    unknown = predict(new, measured, [*sized[:10], *runs[10:]])
    assert unknown.runs == len(runs) - 10, "runs of an unknown size count"
    larger = [dataclasses.replace(run, parameters=10**6, temperature=0.7) for run in runs[:12]]
    for temperature, count in ((0.0, 0), (0.7, 12)):  # the larger ones were all sampled
        new = dataclasses.replace(
            draft(runs[0].predictors), parameters=50_000, temperature=temperature
        )
        assert predict(new, measured, [*larger, *sized[12:]]).runs == count


def test_a_line_is_found(runs: list[CalibrationRun]) -> None:
    exact = made_up_runs(noise=0.0)
    new = draft({"unadapted": 1.5, "closed_form": 2.0, "entropy": 1.0})
    true = 0.5 * z_of(1.5, 4) + 0.3 * z_of(2.0, 4) + 0.4
    assert middle(new, exact)["adapt"] == pytest.approx(true, abs=0.01)
    assert middle(new, exact)["from-scratch"] == pytest.approx(true + 0.5, abs=0.01)
    assert np.abs(errors(new, exact)[0]).max() < 0.05
    assert np.abs(errors(new, runs)[0]).max() > 0.1
    assert np.isfinite(kept(new, exact).draws["adapt"]).all(), "errors of 0 have draws"


def by_hand(runs: list[CalibrationRun], skip_own_kind: bool) -> np.ndarray:
    """The errors on each run by a model that did (or did not) see its kind, one run at a time."""

    def inputs(run: CalibrationRun) -> list[float]:
        return [
            run.predictors[n] if n == "entropy" else z_of(run.predictors[n], 4) for n in PREDICTORS
        ]

    found = []
    for run in runs:
        seen = [c for c in runs if not skip_own_kind or c.kind != run.kind]
        x = np.array([inputs(c) for c in seen])
        centre, spread = x.mean(0), x.std(0)
        row = []
        for action in PREDICTED:
            y = [z_of(c.taus[action], 4) for c in seen]
            model = BayesianRidge().fit((x - centre) / spread, y)
            guess = model.predict((np.array([inputs(run)]) - centre) / spread)[0]
            row.append(z_of(run.taus[action], 4) - guess)
        found.append(row)
    return np.array(found)


def test_errors_are_those_on_kinds_left_out(runs: list[CalibrationRun]) -> None:
    found, kinds = errors(runs[0], runs)
    assert kinds == 5
    np.testing.assert_allclose(found, by_hand(runs, True), atol=1e-6)
    # an error on the runs that were fitted flatters itself, and differs
    flattering = by_hand(runs, False)
    assert np.abs(flattering).mean() < np.abs(found).mean()
    assert not np.allclose(flattering, found, atol=1e-3)


def test_intervals_hold_what_they_promise() -> None:
    """On new runs of the same making, 95 % intervals hold that many outcomes; halved ones do not."""
    known, new = made_up_runs(40), made_up_runs(60, seed=9)
    held = narrow = 0
    for run in new:
        centre, low, high = kept(run, known, 1.0).interval("adapt")
        held += low <= run.taus["adapt"] <= high
        narrow += abs(run.taus["adapt"] - centre) <= (high - low) / 8
    assert held / len(new) >= 0.93
    assert narrow / len(new) < 0.7


def test_draws_are_as_wide_as_the_errors_and_wider_at_their_ends(
    runs: list[CalibrationRun],
) -> None:
    """Against the quantiles of Student's t: as sure as five kinds allow, not as 25 runs would."""
    found, kinds = errors(runs[0], runs)
    drawn = predict(runs[0], {"keep": [1.01]}, runs, draws=40_000).draws
    z = np.array([[z_of(t, 4) for t in drawn[action][:15000]] for action in PREDICTED])
    off = z - np.array([[place] for place in middle(runs[0], runs).values()])
    rms = np.sqrt((found**2).mean(0))
    for at in range(len(PREDICTED)):
        for p in (0.025, 0.5, 0.975):
            wanted = rms[at] * student.ppf(p, kinds - 1)
            assert np.quantile(off[at], p) == pytest.approx(wanted, abs=0.15 * rms[at])
        too_sure = rms[at] * student.ppf(0.975, len(found) - 1)
        assert np.quantile(off[at], 0.975) > 1.1 * too_sure
    together = np.corrcoef(found.T)[0, 1]
    assert np.corrcoef(off)[0, 1] == pytest.approx(together, abs=0.15)


def test_adapting_is_not_worse_than_the_draft_it_starts_from(runs: list[CalibrationRun]) -> None:
    low = draft({**runs[0].predictors, "unadapted": 1.1, "closed_form": 1.1})
    seen = kept(low, runs, 3.5, 3.6)
    assert (seen.draws["adapt"] >= seen.draws["keep"]).all()
    assert seen.draws["from-scratch"].min() < 3.5


def test_what_no_run_had_is_named(runs: list[CalibrationRun]) -> None:
    usual = {n: float(np.median([c.predictors[n] for c in runs])) for n in runs[0].predictors}
    assert kept(draft(usual), runs).outside == ()
    far = draft({**usual, "entropy": 9.0, "closed_form": 1.01})
    assert kept(far, runs).outside == ("entropy", "closed_form")
    high = {n: float(np.quantile([c.predictors[n] for c in runs], 0.9)) for n in usual}
    taus = {n: float(tau_of(z_of(high[n], 4), 8)) for n in ("unadapted", "closed_form")}
    assert all(taus[n] > max(c.predictors[n] for c in runs) for n in taus)
    assert kept(draft({**high, **taus}, 8), runs).outside == (), "a tau of K = 8 is larger, not far"
    assert kept(draft({**high, **taus}), runs).outside == ("unadapted", "closed_form")


def test_temperature_shifts_the_prediction() -> None:
    """A shift of every outcome with temperature is found, taken in proportion between, and named beyond."""
    greedy, drop = made_up_runs(noise=0.0), 0.6
    warm = [
        dataclasses.replace(
            run,
            temperature=0.8,
            taus={a: float(tau_of(z_of(t, 4) - drop, 4)) for a, t in run.taus.items()},
        )
        for run in made_up_runs(noise=0.0, seed=3)
    ]
    both, given = [*greedy, *warm], greedy[0].predictors
    cold = middle(draft(given), both)
    for temperature, share in ((0.4, 0.5), (0.8, 1.0)):
        new = draft(given, temperature=temperature)
        for action in PREDICTED:
            fell = cold[action] - middle(new, both)[action]
            assert fell == pytest.approx(share * drop, abs=0.03)
        assert kept(new, both).outside == ()
    assert kept(draft(given, temperature=1.0), both).outside == ("temperature",)
    blind = draft(given, temperature=0.8)
    assert middle(blind, greedy) == pytest.approx(middle(draft(given), greedy), abs=1e-9)
    assert kept(blind, greedy).outside == ("temperature",), "no run was sampled"
    forgotten = [dataclasses.replace(run, temperature=0.0) for run in warm]
    wrong = middle(blind, [*greedy, *forgotten])
    assert all(cold[action] - wrong[action] < 0.7 * drop for action in PREDICTED)


def test_intervals_are_as_wide_as_errors_on_runs_decoded_alike() -> None:
    greedy = made_up_runs(noise=0.3)
    warm = [dataclasses.replace(c, temperature=0.7) for c in made_up_runs(noise=0.01, seed=3)]
    both, given = [*greedy, *warm], greedy[0].predictors
    wide, narrow = (errors(draft(given, temperature=t), both)[0] for t in (0.0, 0.7))
    assert (len(wide), len(narrow)) == (25, 25)
    assert np.abs(wide).mean() > 3 * np.abs(narrow).mean()
    assert kept(draft(given), both).runs == 50
    nearly = errors(draft(given, temperature=0.05), both)[0]
    assert len(nearly) == 50, "nearly greedy is not sampled"
    few = errors(draft(given, temperature=0.7), [*greedy, *warm[:7]])[0]
    assert len(few) == 32, "seven are too few to go by alone"


def test_knowing_less_does_not_look_surer(runs: list[CalibrationRun]) -> None:
    widths = []
    for names in (PREDICTORS, ("unadapted",)):
        seen = kept(draft({n: runs[0].predictors[n] for n in names}), runs, 1.2, 1.3)
        assert set(seen.draws) == {"keep", "adapt", "from-scratch"}
        assert set(np.round(seen.draws["keep"], 6)) == {1.2, 1.3}
        _, low, high = seen.interval("adapt")
        widths.append(high - low)
    assert widths[1] > widths[0]


def test_too_few_runs_or_kinds(runs: list[CalibrationRun]) -> None:
    for few in (runs[:5], [c for c in runs if c.kind in ("sft", "lora")]):
        with pytest.raises(UserError, match="a prediction needs 8 calibration runs of three kinds"):
            kept(runs[0], few)
    with pytest.raises(UserError, match="neither the draft nor enough calibration runs have"):
        kept(draft({"entropy": 1.0, "on_base": 2.0}), [without(c, "entropy") for c in runs])


def without(run: CalibrationRun, name: str) -> CalibrationRun:
    return dataclasses.replace(
        run, predictors={n: v for n, v in run.predictors.items() if n != name}
    )


def test_a_predictor_that_too_few_runs_have_is_not_used(runs: list[CalibrationRun]) -> None:
    bare = [without(c, "closed_form") for c in runs]
    mixed = [*runs[:7], *bare[7:]]
    assert usable(runs[0], mixed) == (["unadapted", "entropy"], mixed)
    assert middle(runs[0], mixed) == middle(runs[0], bare) != middle(runs[0], runs)
