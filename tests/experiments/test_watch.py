"""The simulation of a watch: real steps, resampled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft_experiments import watch
from redraft_experiments.watch import bench_watch


def write_run(folder: Path) -> Path:
    draw = np.random.default_rng(0)

    def steps(chance: float) -> list[list[int]]:
        return [
            [int(min(draw.geometric(1 - chance) - 1, 4)) for _ in range(int(draw.integers(5, 60)))]
            for _ in range(40)
        ]

    (folder / "measure").mkdir(parents=True)
    content = {"eval-before": steps(0.2), "eval-after": [*steps(0.5), []]}
    (folder / "measure" / "steps.json").write_text(json.dumps(content))
    return folder


def test_falls_are_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MONTH", 400)
    cells = bench_watch(write_run(tmp_path), 3)
    assert {(cell.requests, cell.fallen) for cell in cells} == {
        (requests, fallen) for requests in watch.REQUESTS for fallen in (0.0, *watch.FALLS)
    }
    for cell in cells:
        if cell.fallen == 0:
            assert cell.false_alarms == 0
            assert cell.after == cell.before
        elif cell.fallen == 1:
            assert cell.missed == 0
            assert cell.median is not None
            assert cell.median <= 20
    delays = {cell.requests: cell.median for cell in cells if cell.fallen == 1}
    assert delays[100] <= delays[5]
    assert all(a.after > b.after for a, b in zip(cells, cells[1:], strict=False) if b.fallen)


def test_what_is_not_found_counts_as_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A median of the found falls alone would look the better, the more are missed."""
    monkeypatch.setattr(watch, "MONTH", 50)
    monkeypatch.setattr(watch, "MOST", 3)
    cells = bench_watch(write_run(tmp_path), 1)
    (rare,) = (cell for cell in cells if (cell.requests, cell.fallen) == (5, 0.25))
    assert rare.missed is not None
    assert rare.missed > 5
    assert rare.median == 4
    assert watch.shown(rare.median) == "> 3"


def test_the_command_shows_each_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MONTH", 100)
    folder = write_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["bench", "watch", "--run", str(folder), "--simulations", "1"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("requests a look") == 12
    with pytest.raises(UserError, match="name a run folder"):
        bench_watch(tmp_path)
