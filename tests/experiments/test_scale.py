"""The bench of processes and long rows: real trainings of a tiny target, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.core.errors import UserError
from redraft.generation.answer_file import read_answers
from redraft_experiments import datasets, scale
from redraft_experiments.scale import bench_scale


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHORT": 48, "SHORT_ROWS": 4, "STEPS": 2, "HELDOUT_TOKENS": 24}.items():
        monkeypatch.setattr(scale, name, value)


@pytest.mark.bench
def test_every_training_is_a_cell_and_is_run_once(
    target_folder: Path, draft_folder: Path, novels: str, tmp_path: Path
) -> None:
    out = tmp_path / "scale"
    models = (target_folder, draft_folder, out, novels)
    first = bench_scale(*models, [96], [2], 1)
    trained = out.glob("trained/*/training.json")
    times = {path: path.stat().st_mtime_ns for path in trained}
    cells = bench_scale(*models, [96, 192], [2], 1)
    assert cells[:2] == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    shapes = [(c.tokens, c.rows, c.steps, c.processes) for c in cells]
    assert shapes == [(48, 4, 2, 2), (96, 1, 2, 1), (192, 1, 2, 1)]
    assert cells[0].threads <= cells[1].threads
    for cell in cells:
        assert cell.tokens_per_second > 0
        assert cell.peak_mb > 100
        assert cell.trained_parameters == cells[0].trained_parameters > 0
    rows = read_answers(out / "rows-192-2.jsonl")
    assert {len(row.prompt) + row.length for row in rows} == {192}
    assert len({row.tokens for row in rows}) == 2


def test_mistakes_are_named(
    target_folder: Path,
    draft_folder: Path,
    novels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(draft: Path, length: int, data: str | None = novels) -> None:
        bench_scale(target_folder, draft, tmp_path / "scale", data, [length], [1], 1)

    with pytest.raises(UserError, match=r"--lengths 257: .* reads rows of at most 256 tokens"):
        ask(draft_folder, 257)
    with pytest.raises(UserError, match="novels are too short for 2 rows of 200"):
        monkeypatch.setattr(datasets, "texts", lambda *_: ["only a few words"])
        monkeypatch.setattr(scale, "SHORT", 200)
        monkeypatch.setattr(scale, "SHORT_ROWS", 1)
        ask(draft_folder, 200)
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(UserError, match="name a folder of real data"):
        ask(draft_folder, 128, None)


@pytest.mark.bench
def test_a_training_that_fails_leaves_what_it_said(
    target_folder: Path, novels: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"exit code 2; what it said is in .*\.log"):
        bench_scale(target_folder, tmp_path / "nothing", tmp_path / "scale", novels, [96], [1], 1)
    (log,) = (tmp_path / "scale").glob("trained/*.log")
    assert "nothing" in log.read_text()
