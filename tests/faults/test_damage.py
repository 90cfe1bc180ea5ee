"""Files of a run folder damaged afterwards: made again, set aside, or named; never silently wrong."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft import cli
from redraft.core.console import set_quiet
from redraft.core.errors import UserError
from redraft.models.target import Target
from tests.faults.crashes import Bomb, Crash, Job, armed, differences


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit near the end, where tensors and the last line lie."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("answers/adapt.jsonl", "regenerate adapt"),
        ("answers/eval.jsonl", "regenerate eval"),
        ("selection.jsonl", "select"),
        ("adapter/model.safetensors", "train"),
        ("adapter/adapter.json", "train"),
        ("draft/model.safetensors", "export"),
        ("draft/config.json", "export"),
        ("measure/eval-after.json", "measure"),
    ],
)
def test_a_damaged_output_is_noticed_and_made_again(
    job: Job,
    target: Target,
    whole: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    name: str,
    stage: str,
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    harm(out / name)
    assert set(differences(out, expected)) - {"report.json"} == {name}  # which names the copied run
    set_quiet(False)
    try:
        assert job.run(target, out).worked
    finally:
        set_quiet(True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{stage}: {name.split('/')[0]}" in said
    assert "is not as this stage left it; doing it again" in said
    paid = name.startswith("answers/") and harm is not Path.unlink
    assert differences(out, expected) == ([f"{name}.damaged"] if paid else [])


@pytest.mark.parametrize("harm", [cut, flip])
def test_a_damaged_checkpoint_is_set_aside(
    job: Job,
    target: Target,
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
) -> None:
    out = tmp_path / "run"
    with armed(Bomb(2, counts=lambda name: name.startswith("training"))), pytest.raises(Crash):
        job.run(target, out)
    harm(out / "checkpoints" / "checkpoint.safetensors")
    set_quiet(False)
    try:
        job.run(target, out)
    finally:
        set_quiet(True)
    said = " ".join(capsys.readouterr().err.split())
    assert "set aside as checkpoint.safetensors.damaged, training starts over" in said
    assert differences(out, expected) == ["checkpoints/checkpoint.safetensors.damaged"]


@pytest.mark.parametrize("text", ["", "{", '{"train": {"done"', "[]", '{"select": 3}', "\x00\xff"])
def test_a_damaged_state_loses_no_answer(
    job: Job,
    target: Target,
    whole: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    text: str,
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "state.json").write_text(text, encoding="latin-1")
    kept = [out / "answers/adapt.jsonl", out / "checkpoints/checkpoint.safetensors"]
    times = [path.stat().st_mtime_ns for path in kept]
    # A crash right after the damage was found must not lose them either.
    with armed(Bomb(9)), pytest.raises(Crash):
        job.run(target, out)
    job.run(target, out)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert differences(out, expected) == ["state.json.damaged"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "training.json is not valid JSON.*"),
        ('{"method": 1}', "training.json: missing or unknown .*seconds.*"),
        ("[1]", "training.json: expected a JSON object, found a list"),
        (None, "expected a file training.json, found adapter.json, model.safetensors"),
    ],
)
def test_a_damaged_training_record_is_named_and_the_remedy_helps(
    job: Job,
    target: Target,
    whole: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    content: str | None,
    message: str,
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    record = out / "adapter" / "training.json"
    record.unlink() if content is None else record.write_text(content)
    with pytest.raises(UserError, match=f"{message}; remove {out}/adapter and train again"):
        job.run(target, out)
    shutil.rmtree(out / "adapter")
    job.run(target, out)
    assert differences(out, expected) == []


def test_a_mixed_adapter_folder_is_refused(
    job: Job, whole: Path, other: Path, tmp_path: Path
) -> None:
    from redraft.checkpoints.adapter_folder import load_adapter

    mixed = Path(shutil.copytree(whole / "adapter", tmp_path / "adapter"))
    shutil.copy(other / "adapter" / "model.safetensors", mixed)
    with pytest.raises(UserError, match="is not what its card adapter.json describes"):
        load_adapter(mixed)


@pytest.mark.parametrize("content", ["{}", "[]", '{"before": 3}'])
def test_a_damaged_report_is_named(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    (tmp_path / "report.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["redraft", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "report.json" in capsys.readouterr().err
