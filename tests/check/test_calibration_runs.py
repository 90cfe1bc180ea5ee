"""Files of calibration runs: today's, those of before, and those that are none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from redraft.check.calibration_runs import SHIPPED, CalibrationRun, as_text, read_runs
from redraft.check.prediction import check_enough, predict
from redraft.core.errors import UserError


def test_one_run_a_line_comes_back(runs: list[CalibrationRun], tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(as_text(runs))
    assert read_runs(file) == runs
    assert len(file.read_text().splitlines()) == len(runs) + 2
    assert json.loads(file.read_text())["runs"][3]["name"] == runs[3].name


def test_a_file_of_before_is_read(runs: list[CalibrationRun], tmp_path: Path) -> None:
    old_signs = {"unadapted": "reused", "on_base": "native", "base_states": "words"}
    old_signs |= {"closed_form": "refreshed", "entropy": "entropy"}
    old_actions = {"keep": "keep", "closed-form": "refresh", "adapt": "adapt"}
    old_actions["from-scratch"] = "retrain"
    rows = []
    for run in runs:
        row = dataclasses.asdict(run) | {"plain": 120.0}
        row["signs"] = {old_signs[n]: v for n, v in row.pop("predictors").items()}
        row["taus"] = {old_actions[a]: tau for a, tau in row["taus"].items()}
        row["seen"] = row.pop("quantiles")
        rows.append(row)
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"cases": rows}, indent=1))
    assert read_runs(file) == runs


def test_a_damaged_or_foreign_file_ends_in_a_sentence(
    runs: list[CalibrationRun], tmp_path: Path
) -> None:
    good = json.loads(as_text(runs))["runs"]

    def with_first(**changes: object) -> str:
        return json.dumps({"runs": [good[0] | changes, *good[1:]]})

    file = tmp_path / "runs.json"
    for text in (
        "{}",
        "[1, 2]",
        "null",
        '{"runs": 5}',
        '{"runs": [7]}',
        as_text(runs)[:-40],
        "[" * 100_000,
        with_first(extra=1),
        with_first(k="4"),
        with_first(k=0),
        with_first(k=10**9),
        with_first(step=10**400),
        with_first(kind=["sft"]),
        with_first(predictors={"entropy": 1.0}),
        with_first(predictors=[1.0]),
        with_first(taus={"keep": 1.5}),
        with_first(taus={"keep": 1.5, "adapt": "2", "from-scratch": 3.0}),
        with_first(taus={"keep": 1.5, "adapt": float("nan"), "from-scratch": 3.0}),
        with_first(temperature=-1.0),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="holds no calibration runs") as failed:
            read_runs(file)
        assert "\n" not in str(failed.value)
        assert len(str(failed.value)) < 400
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path / "absent.json", tmp_path):
        with pytest.raises(UserError, match="holds no calibration runs"):
            read_runs(path)


def test_the_runs_that_come_with_redraft() -> None:
    known = read_runs()
    assert SHIPPED.read_text(encoding="utf-8") == as_text(known), "as the bench records them"
    check_enough(known)
    assert predict(known[0], known[0].quantiles, known).outside == ()
