"""The figures of a calibration, and the comparison of estimates, by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student
from typer.testing import CliRunner

from redraft.check.calibration_runs import CalibrationRun, as_text
from redraft.check.prediction import outcomes, tau_of, z_of
from redraft.check.recommendation import EFFORT, WORTH, right_action
from redraft.cli.app import app
from redraft_experiments import calibration as module
from redraft_experiments.calibration import Judged, figures, judge, over_kinds
from redraft_experiments.comparison import (
    Paired,
    alike,
    closed_form_unchanged,
    closed_form_with_offset,
    constant_recovery,
    paired,
)
from tests.check.conftest import made_up_runs

pytestmark = pytest.mark.bench


def with_quantiles(runs: list[CalibrationRun]) -> list[CalibrationRun]:
    return [dataclasses.replace(c, quantiles={"keep": [c.taus["keep"]]}) for c in runs]


def two_families() -> list[CalibrationRun]:
    theirs = [dataclasses.replace(run, family="other") for run in made_up_runs(20, seed=3)]
    return with_quantiles([*made_up_runs(20), *theirs])


def test_a_run_is_judged_by_what_is_apart_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs behind each recommendation lack the run's kind, or its family, and nothing else."""
    seen: list[list[CalibrationRun]] = []
    true = module.predict

    def watched(draft: Any, measured: Any, others: Any, estimate: Any) -> Any:
        seen.append(list(others))
        return true(draft, measured, others, estimate)

    monkeypatch.setattr(module, "predict", watched)
    runs = two_families()
    for apart in ("kind", "family"):
        seen.clear()
        judge(runs, apart)
        for run, others in zip(runs, seen, strict=True):
            own = getattr(run, apart)
            assert others == [c for c in runs if getattr(c, apart) != own]


def test_the_figures_are_those_of_their_definitions() -> None:
    runs = two_families()
    judged = judge(runs)
    found = figures(judged)
    gaps = [j for j in judged if not math.isnan(j.recovery)]
    assert 0 < len(gaps) < len(runs), "some gaps are too small for a recovery"
    for j in gaps:
        keep, adapt, scratch = (j.run.taus[a] for a in ("keep", "adapt", "from-scratch"))
        assert j.recovery == pytest.approx((adapt - keep) / (scratch - keep))
    off: dict[str, list[float]] = {}
    for j in gaps:
        off.setdefault(j.run.kind, []).append(abs(j.predicted[0] - j.recovery))
    means = [np.mean(some) for some in off.values()]
    reach = student.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
    wanted = (np.mean(means), np.mean(means) - reach, np.mean(means) + reach)
    assert (found.runs, found.gaps) == (len(runs), len(gaps))
    assert found.recovery_error == pytest.approx(wanted)
    inside = [j.predicted[1] <= j.recovery <= j.predicted[2] for j in gaps]
    assert found.coverage == pytest.approx(np.mean(inside))
    assert found.right == sum(j.action == j.right for j in judged)
    lost = [1 - j.run.taus[j.action] / max(j.run.taus.values()) for j in judged]
    assert found.lost == pytest.approx(over_kinds(judged, lost))


def decided(runs: list[CalibrationRun], actions: list[str], right: str) -> list[Judged]:
    judged = judge(runs)
    return [
        dataclasses.replace(j, action=action, right=right)
        for j, action in zip(judged, actions, strict=True)
    ]


def test_pairs_count_what_only_one_got_right() -> None:
    runs = with_quantiles(made_up_runs(10))
    ours = decided(runs, ["adapt"] * 9 + ["keep"], "adapt")
    theirs = decided(runs, ["adapt"] + ["keep"] * 8 + ["adapt"], "adapt")
    found = paired(ours, theirs)
    assert (found.only_regression, found.only_other) == (8, 1)
    tail = sum(math.comb(9, n) for n in (0, 1)) / 2**9
    assert found.p_value == pytest.approx(2 * tail)
    assert found.clearly_better
    assert found.right[0] == pytest.approx(0.7)
    back = paired(theirs, ours)
    assert back.p_value == found.p_value
    assert not back.clearly_better, "the worse of two is not better, however sure that is"
    assert back.lost == pytest.approx((-found.lost[0], -found.lost[2], -found.lost[1]))
    assert not paired(ours, ours).clearly_better
    assert Paired(0, 0, 1.0, (0.0, 0.0, 0.0), (-0.1, -0.2, -0.01)).clearly_better


def test_simple_estimates_are_means_of_runs_decoded_alike() -> None:
    greedy = made_up_runs(12)
    warm = [dataclasses.replace(run, temperature=0.7) for run in made_up_runs(12, seed=4)]
    hot = [dataclasses.replace(run, temperature=1.0) for run in made_up_runs(2, seed=5)]
    runs, names = [*greedy, *warm, *hot], ["unadapted", "entropy", "closed_form"]
    assert alike(runs, 0.0) == greedy
    assert alike(runs, 0.7) == warm
    assert alike(runs, 1.0) == [*warm, *hot], "two kinds at 1 are too few"
    assert alike(hot, 0.0) == hot
    new = made_up_runs(1, seed=8)[0]
    start = z_of(new.predictors["closed_form"], 4)
    z = outcomes(greedy)
    rise = z - np.array([[z_of(run.predictors["closed_form"], 4)] for run in greedy])
    np.testing.assert_allclose(closed_form_with_offset(runs, [new], names)[0], start + rise.mean(0))
    np.testing.assert_allclose(
        closed_form_unchanged(runs, [new], names)[0], [start, z[:, 1].mean()]
    )
    adapt, scratch = tau_of(constant_recovery(runs, [new], names)[0], 4)
    keep = new.predictors["unadapted"]
    shares = [module.recovery_of(run) for run in greedy]
    assert (adapt - keep) / max(scratch - keep, 1e-9) == pytest.approx(np.nanmean(shares), rel=1e-3)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(as_text(with_quantiles(made_up_runs(20))))
    run = ["bench", "compare", "--calibration", str(file)]
    found = CliRunner().invoke(app, [*run, "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["rows"]
    assert {row["group"] for row in rows} == {"all", "greedy"}, "no run was sampled"
    by_name = {row["name"]: row for row in rows if row["group"] == "all"}
    assert by_name["regression"]["right"] == by_name["regression"]["figures"]["right"]
    assert by_name["never adapt"]["figures"] is None
    shown = CliRunner().invoke(app, run)
    assert "all: constant recovery" in shown.output
    assert "McNemar p" in shown.output


def test_the_right_action_climbs_by_each_step_of_the_price() -> None:
    bar = {name: 1 + WORTH * effort for name, effort in EFFORT.items()}
    for lack, right in ((0.001, "adapt"), (-0.001, "from-scratch")):
        taus = {"keep": 1.5, "closed-form": 1.5, "adapt": 2.0}
        assert right_action(taus | {"from-scratch": 2.0 * bar["from-scratch"] - lack}) == right
    near = {"keep": 1.5, "closed-form": 1.5 * bar["closed-form"] + 0.001, "adapt": 1.7}
    assert right_action(near | {"from-scratch": 1.7}) == "closed-form"
