"""`redraft bench plan` on a finished run of the command: planned figures next to those of its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.core.folders import read_json
from tests.conftest import write_prompts

SETTINGS = ("general.guard=off", "regenerate.max_new_tokens=24", "train.method=body")
SETTINGS += ("train.epochs=2", "train.batch_tokens=256", "train.rollout=3", "measure.k=3")
SETTINGS += ("measure.eval_limit=6", "measure.heldout=4", "measure.eval_new_tokens=20")


def test_a_finished_run_is_held_against_its_plan(
    target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    prompts, out, record = (tmp_path / name for name in ("p.jsonl", "run", "plan.jsonl"))
    write_prompts(prompts, 40)
    command = ["adapt", "--target", str(target_folder), "--draft", str(draft_folder)]
    command += ["--prompts", str(prompts), "--out", str(out)]
    command += [each for setting in SETTINGS for each in ("--set", setting)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["bench", "plan", "--runs", str(out), "--record", str(record)])
    assert done.exit_code == 0, done.output
    (cell,) = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    train = read_json(out / "report.json")["train"]
    assert (cell["kind"], cell["method"]) == ("eagle3", "body")
    for name in ("target_flops", "draft_flops"):
        assert cell[name] == train[name]
        # rows are padded, and attention of the target is not counted on a CPU
        assert cell[f"{name}_planned"] == pytest.approx(
            train[name], rel=0.5 if name == "target_flops" else 0.25
        )
    assert cell["peak"] == train["peak_mb"]
    assert cell["peak_planned"] > 0
    assert cell["answer_seconds_planned"] > 0
    assert "measured" in done.output
