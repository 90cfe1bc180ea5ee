"""The log of a training: what is in it, that it goes on where the checkpoint does, and trackers on this machine."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redraft.config import TrainConfig, key_of, resolve
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.models.target import Target
from redraft.training.log import FILE, check_trackers
from redraft.training.train import train
from tests.conftest import fresh_draft

CONFIG = TrainConfig(epochs=3, batch_tokens=256, rollout=2, evaluations=3, precision="fp32")


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


@pytest.fixture
def trained(target: Target, answers: list[Answer]) -> Callable[..., Any]:
    def run(folder: Path, **changes: Any) -> Any:
        config = replace(CONFIG, **changes)
        draft = fresh_draft(target)
        return train(target, draft, answers, answers[:4], config, k=3, checkpoints=folder)

    return run


def test_each_step_and_each_evaluation_has_a_row(
    trained: Callable[..., Any], tmp_path: Path
) -> None:
    record = trained(tmp_path).record
    rows = read(tmp_path)
    taus = [(row["step"], row["heldout_tau"]) for row in rows if "heldout_tau" in row]
    assert taus == list(record.heldout_tau)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, record.steps + 1))
    assert steps[-1]["loss"] == record.final_loss
    assert all(row["tokens_per_second"] > 0 and row["memory_mb"] > 0 for row in steps)


def test_a_resumed_run_goes_on_after_its_checkpoint(
    trained: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redraft.core import failpoints

    def breaks(name: str) -> None:
        if name == "training: after a step":
            breaks.left -= 1  # type: ignore[attr-defined]
            if not breaks.left:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

    breaks.left = 7  # type: ignore[attr-defined]
    monkeypatch.setattr(failpoints, "armed", breaks)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken")
    monkeypatch.setattr(failpoints, "armed", None)
    with (tmp_path / "broken" / FILE).open("a") as stream:
        stream.write(
            '{"step": 99, "loss": 1.0}\n{"step": 3, "lo'
        )  # past the checkpoint, and cut off
    trained(tmp_path / "broken")
    trained(tmp_path / "whole")
    for name in ("loss", "heldout_tau", "lr"):
        found, expected = (
            [(row["step"], row[name]) for row in read(tmp_path / folder) if name in row]
            for folder in ("broken", "whole")
        )
        assert found == expected


@pytest.mark.skipif(
    not (importlib.util.find_spec("tensorboardX") or importlib.util.find_spec("tensorboard")),
    reason="no writer of TensorBoard's files is installed",
)
def test_a_tracker_gets_the_rows_and_no_stage_depends_on_it(
    trained: Callable[..., Any], tmp_path: Path
) -> None:
    record = trained(tmp_path, track="tensorboard").record
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    content = b"".join(file.read_bytes() for file in files)
    assert content.count(b"heldout_tau") >= len(record.heldout_tau)
    assert content.count(b"tokens_per_second") >= record.steps
    assert key_of(replace(CONFIG, track="tensorboard")) == key_of(CONFIG)


def test_unknown_and_missing_trackers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match="names the tracker 'tensorbord'; did you mean 'tensorboard'"
    ):
        resolve([("flag", {"train.track": "tensorbord"})])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package tensorboardX: pip install tensorboardX"):
        check_trackers(("tensorboard",))
    with pytest.raises(UserError, match="--track wandb needs the package wandb"):
        check_trackers(("wandb",))
