"""`--budget auto`: answers in rounds until they stop paying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redraft.config import resolve
from redraft.core.errors import UserError
from redraft.core.folders import read_json
from redraft.core.records import Prompt
from redraft.generation.answer_file import read_answers
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.pipeline import auto_budget
from redraft.pipeline.auto_budget import Round, curve, in_order, pays, round_sizes
from redraft.report.terminal import print_report
from tests.conftest import write_prompts

SETTINGS: dict[str, Any] = {
    "select.budget": "auto",
    "regenerate.max_new_tokens": 12,
    "train.epochs": 1.0,
    "train.evaluations": 1,
    "measure.eval_limit": 6,
    "measure.heldout": 6,
    "measure.eval_new_tokens": 12,
}


def test_rounds_double_and_end_with_the_pool() -> None:
    assert round_sizes(40) == [40]
    assert round_sizes(500) == [64, 128, 256, 500]
    assert round_sizes(5000)[0] == 312
    assert round_sizes(5000)[-1] == 5000


def test_another_round_is_asked_for_by_a_share_of_tau() -> None:
    before = Round(64, 1000, 2.0)
    assert pays(before, Round(128, 2000, 2.04), 0.02)
    assert not pays(before, Round(128, 2000, 2.03), 0.02)
    assert not pays(before, Round(128, 2000, 1.9), 0.0)
    found = curve([Round(0, 0, 1.2), before], 256, 0.02)
    assert (found["prompts_saved"], found["tokens_saved"]) == (192, 3000)


def test_the_order_is_a_shuffle_that_names_decide() -> None:
    prompts = [Prompt(f"p{i}", (i,)) for i in range(30)]
    order = [p.id for p in in_order(prompts, 0)]
    assert sorted(order) == sorted(p.id for p in prompts)
    assert [p.id for p in in_order(prompts[::-1], 0)] == order
    assert [p.id for p in in_order(prompts, 1)] != order


@pytest.mark.parametrize(("least_gain", "asked"), [(0.0, 28), (9.0, 16)])
def test_prompts_are_answered_until_it_stops_paying(
    least_gain: float,
    asked: int,
    target: Target,
    draft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(auto_budget, "FIRST", 8)
    if not least_gain:  # whatever tau does, go on
        monkeypatch.setattr(auto_budget, "pays", lambda *_: True)
    prompts = str(write_prompts(tmp_path / "p.jsonl", 40))
    settings = {**SETTINGS, "select.least_gain": least_gain}

    def run(base: Target | None = None) -> pipeline.AdaptResult:
        config = resolve([("test", settings)])
        return pipeline.adapt(
            target, str(draft_folder), prompts, out=tmp_path / "run", config=config, base=base
        )

    result = run()
    found = result.report.cost["rounds"]
    assert [r["prompts"] for r in found["rounds"]] == [0, 8, 16, 28][: 4 if asked == 28 else 3]
    assert found["rounds"][0]["tokens"] == 0
    answered = read_answers(tmp_path / "run" / "answers" / "rounds.jsonl")
    assert len(answered) == len({a.id for a in answered}) == asked
    assert found["prompts_saved"] == 28 - asked
    cost = result.report.cost
    assert cost["supervised_tokens"] > result.report.train.supervised_tokens
    assert cost["unique_generated_tokens"] > sum(a.length for a in answered)  # held-out ones too
    taus = [r["heldout_tau"] for r in found["rounds"][1:]]
    best = 1 + taus.index(max(taus))
    kept = tmp_path / "run" / "adapter" / "model.safetensors"
    assert (
        kept.read_bytes()
        == (tmp_path / "run" / "rounds" / str(best) / "model.safetensors").read_bytes()
    )
    print_report(result.report)
    assert "answered in rounds (prompts: held-out tau): 0: " in capsys.readouterr().out
    assert not run().worked
    assert not run(base=target).worked, "the method does not read a base"
    (tmp_path / "run" / "rounds" / "2" / "model.safetensors").unlink()
    before = read_json(tmp_path / "run" / "rounds.json")
    assert run().worked
    assert read_json(tmp_path / "run" / "rounds.json") == before
    assert json.loads((tmp_path / "run" / "report.json").read_text())["cost"]["rounds"] == before


def test_a_budget_and_rounds_in_one_folder_keep_each_others_answers(
    target: Target, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_budget, "FIRST", 8)
    prompts = str(write_prompts(tmp_path / "p.jsonl", 40))
    paid: dict[str, bytes] = {}
    for budget in ("auto", "0.5", "auto", "0.5"):
        config = resolve([("test", {**SETTINGS, "select.budget": budget})])
        pipeline.adapt(target, str(draft_folder), prompts, out=tmp_path / "run", config=config)
        files = (tmp_path / "run" / "answers").glob("*.jsonl")
        now = {file.name: file.read_bytes() for file in files}
        assert now.items() >= {n: b for n, b in paid.items() if n != "rounds.jsonl"}.items()
        paid |= now


@pytest.mark.parametrize(
    ("setting", "left_out"),
    [
        ({"select.select": "flatness"}, "--select flatness"),
        ({"regenerate.answers": "original"}, "--answers"),
    ],
)
def test_what_rounds_cannot_do_is_said(
    setting: dict[str, str], left_out: str, target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = str(write_prompts(tmp_path / "p.jsonl", 40))
    config = resolve([("test", {**SETTINGS, **setting})])
    with pytest.raises(
        UserError, match=f"--budget auto asks prompts in a random order.*{left_out}"
    ):
        pipeline.adapt(target, str(draft_folder), prompts, out=tmp_path / "run", config=config)
