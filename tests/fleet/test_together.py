"""`redraft fleet adapt` by several processes: answers, split and measures of one process, its tensors within rounding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from redraft.checkpoints.load import stored
from redraft.core.folders import read_json
from redraft.models.target import Target
from tests.conftest import fresh_draft
from tests.ranks.test_together import ROOT, environment, far, run

SETTINGS = (
    *("regenerate.max_new_tokens=24", "measure.eval_new_tokens=24", "measure.heldout=4"),
    *("measure.eval_limit=5", "measure.k=3", "general.tolerance=0.9", "train.epochs=20"),
    *("train.precision=fp32", "train.lr=0.01", "train.batch_tokens=256"),
)


@pytest.mark.bench
@pytest.mark.parametrize("count", [3])
def test_a_fleet_is_shared_out(
    count: int, fleet: Path, target: Target, target_folder: Path, tmp_path: Path
) -> None:
    stored(fresh_draft(target), target).save(tmp_path / "draft")
    words = ["fleet", "adapt", "--target", str(target_folder), "--draft", str(tmp_path / "draft")]
    words += ["--fleet", str(fleet / "fleet.yaml"), *(f"--set={one}" for one in SETTINGS)]
    alone = [sys.executable, "-m", "redraft", *words, "--out", str(tmp_path / "one")]
    subprocess.run(alone, check=True, capture_output=True, cwd=ROOT, env=environment())
    ended = run(count, "job", *words, "--out", str(tmp_path / "some"))
    assert ended.returncode == 0, ended.stderr
    for name in ("still", "loud", "base"):
        for what in ("heldout", "eval", "adapt"):
            files = [tmp_path / run / "answers" / name / f"{what}.jsonl" for run in ("one", "some")]
            assert files[0].is_file() == files[1].is_file()
            if files[0].is_file():
                assert files[0].read_text() == files[1].read_text()
    one, some = (read_json(tmp_path / name / "fleet.json") for name in ("one", "some"))
    assert one["passes"] == pytest.approx(some["passes"], rel=0.02)
    assert [m["trained_on"] for m in one["members"]] == [m["trained_on"] for m in some["members"]]
    tensors = [tmp_path / name / "adapter" / "model.safetensors" for name in ("one", "some")]
    assert far(*map(load_file, tensors)) < 1e-4
