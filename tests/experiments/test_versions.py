"""Versions of a model: both drafts of a version are trained on the same answers, and every figure is of the draft it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from redraft.checkpoints.load import read_draft
from redraft.generation.answer_file import read_answers
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft_experiments import versions
from tests.conftest import SHAPE, save_target, write_prompts

SMALL = {
    "general.guard": "off",
    "regenerate.max_new_tokens": 16,
    "train.epochs": 1,
    "train.batch_tokens": 256,
    "train.rollout": 2,
    "train.precision": "fp32",
    "measure.k": 3,
    "measure.eval_limit": 5,
    "measure.heldout": 4,
    "measure.eval_new_tokens": 12,
}


@pytest.fixture
def suite(
    target_folder: Path, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Base and draft of the tests, and prompts of each domain."""
    folder = tmp_path / "suite"
    shutil.copytree(target_folder, folder / "base")
    shutil.copytree(draft_folder, folder / "draft")
    for at, domain in enumerate(versions.TRAFFIC):
        place = folder / ("safety" if domain == "safety" else "prompts")
        place.mkdir(exist_ok=True)
        write_prompts(place / f"{domain}-adapt.jsonl", 10, 20 * at)
    write_prompts(folder / "prompts" / "chat-eval.jsonl", 5, 200)
    monkeypatch.setattr(versions, "SETTINGS", SMALL)
    monkeypatch.setattr(versions, "ASKED", 24)
    monkeypatch.setenv("REDRAFT_DATA", str(tmp_path))

    def made(name: str, seed: int) -> None:
        save_target(tmp_path / "out" / "models" / name, LlamaConfig(**SHAPE), seed)

    monkeypatch.setattr(versions, "_tune", lambda *_: made("v1", 1))
    monkeypatch.setattr(versions, "_prefer", lambda *_: made("v2", 2))
    monkeypatch.setattr(versions, "_round", lambda *_: made("v3", 3))
    return folder


def test_every_draft_is_measured_on_every_version(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cells = versions.bench_versions(suite, out)
    drafts = ["unadapted", "v1-base", "v2-base", "v2-last", "v3-base", "v3-last"]
    assert [(c.version, c.draft) for c in cells] == [
        (version, draft) for version in ("v0", "v1", "v2", "v3") for draft in drafts
    ]
    for version in ("v2", "v3"):
        ways = [out / "runs" / f"{version}-{start}" / "answers" for start in ("base", "last")]
        for name in ("adapt", "heldout", "eval"):
            one, other = (read_answers(way / f"{name}.jsonl") for way in ways)
            assert one == other
    by_name = {(c.version, c.draft): c for c in cells}
    target = load_target(str(out / "models" / "v3"))
    answers = read_answers(out / "runs" / "v3-base" / "answers" / "eval.jsonl")
    for draft, folder in (("unadapted", suite / "draft"), ("v2-last", out / "runs/v2-last/draft")):
        found = replay(target, read_draft(str(folder)).build(target), answers, 3)
        tau = pooled_tau([trace for trace in found if trace.accepted])
        assert by_name["v3", draft].tau == pytest.approx(tau)
    assert by_name["v3", "unadapted"].change == 0
    record = json.loads((out / "runs" / "v3-last" / "run.json").read_text())
    assert record["shared"] == str(out / "runs" / "v2-last" / "draft")
    assert by_name["v1", "v3-last"].trained_on == 15
    versions.print_cells(cells)
    assert "v2-last" in capsys.readouterr().out
    before = (out / "counts.json").stat().st_mtime_ns
    assert versions.bench_versions(suite, out) == cells
    assert (out / "counts.json").stat().st_mtime_ns == before


def test_the_service_is_asked_its_domains_in_turn(suite: Path) -> None:
    asked = [json.loads(line) for line in versions._prompts(suite).splitlines()]
    files = [versions.prompts_of(suite, domain, "adapt") for domain in versions.TRAFFIC]
    first = [json.loads(file.read_text().splitlines()[0]) for file in files]
    assert asked[:3] == first
    assert len(asked) == 24
