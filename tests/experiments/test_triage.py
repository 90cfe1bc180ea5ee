"""The triage bench: cells that resume, and the figures of a calibration by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from redraft.check import evidence
from redraft.check.cost_estimate import Plan
from redraft.check.prediction import ACTIONS, Case, read_cases
from redraft.check.recommendation import DEARNESS, WORTH
from redraft.checkpoints.load import read_draft
from redraft.cli.app import app
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.generation.answer_file import read_answers
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.training.train import train
from redraft_experiments import own_case
from redraft_experiments import triage as bench
from redraft_experiments.calibration import calibration, judge, policies, right_action
from redraft_experiments.suite import suite_prompts
from redraft_experiments.triage import bench_triage, print_cases
from tests.check.conftest import made_up_cases
from tests.conftest import write_prompts

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def family(
    target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A family of random models with two members, in the shape of a built one: the base by
    itself, and the base with all weights moved."""
    folder = tmp_path_factory.mktemp("family")
    shutil.copytree(target_folder, folder / "base")
    shutil.copytree(target_folder, folder / "members" / "int8")
    moved = load_target(str(target_folder))
    for weight in moved.model.parameters():
        weight.data += 0.02 * weight.std().nan_to_num(0.0)
    moved.model.save_pretrained(folder / "members" / "sft")
    moved.tokenizer.save_pretrained(folder / "members" / "sft")
    shutil.copytree(draft_folder, folder / "draft")
    (folder / "prompts").mkdir()
    for split, count in {"heldout": 16, "eval": 12, "adapt": 24}.items():
        write_prompts(folder / "prompts" / f"math-{split}.jsonl", count)
    members = {name: {"domain": "math", "kind": name} for name in ("int8", "sft")}
    about = {"size": "tiny", "seed": 0, "members": members, "general_domains": ["dialogue"]}
    (folder / "suite.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench, own_case):
        monkeypatch.setattr(module, "PLANS", {"adapt": Plan(12, 1.0), "retrain": Plan(20, 1.0)})
        monkeypatch.setattr(module, "EVALUATED", 12)
        monkeypatch.setattr(module, "HELDOUT", 4)
        monkeypatch.setattr(module, "CHECKED", 16)
    monkeypatch.setattr(bench, "LONGEST", 12)


@pytest.mark.usefixtures("small")
def test_a_case_per_member_that_is_run_once(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "cases.json"
    cases = bench_triage([family], tmp_path / "out", record=table)
    assert [case.name for case in cases] == ["int8", "sft"]
    assert read_cases(table) == cases
    same, moved = cases
    assert same.signs["reused"] == pytest.approx(same.signs["native"]), "the base is its own parent"
    assert set(moved.signs) == {"reused", "entropy", "native", "words", "refreshed"}
    assert set(moved.taus) == set(moved.intervals) == set(ACTIONS)
    assert {name: len(quantiles) for name, quantiles in moved.seen.items()} == {
        "keep": 40,
        "refresh": 40,
    }
    # tau as kept is that of a replay of the answers on disk, which the check did not see
    target = load_target(str(family / "members" / "sft"))
    work = tmp_path / "out" / "answers" / "tiny" / "sft"
    answers = [a for a in read_answers(work / "eval.jsonl") if a.length >= 2]
    traces = replay(target, read_draft(str(family / "draft")).build(target), answers, bench.K)
    assert moved.taus["keep"] == pytest.approx(pooled_tau([t for t in traces if t.accepted]))
    monkeypatch.setattr(bench, "_Bench", None)
    assert bench_triage([family], tmp_path / "out") == cases
    out = Console(width=80, record=True)
    print_cases(cases, out)
    shown = out.export_text()
    assert f"{moved.taus['adapt']:.2f}" in shown
    assert "tiny/int8" in shown
    assert "…" not in shown, "nothing is cut on a narrow screen"
    with pytest.raises(UserError, match="has no member 'sfft'"):
        bench_triage([family], tmp_path / "out", ["sfft"])


@pytest.mark.usefixtures("small")
def test_a_check_sees_what_the_known_cases_were_seen_by(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signs of a check are those of the cell of the same fine-tune, the closed form's too; by another
    loss that one would be another."""
    (case,) = bench_triage([family], tmp_path / "out", ["sft"])
    models = ["--target", str(family / "members" / "sft"), "--base", str(family / "base")]
    asked = ["check", *models, "--draft", str(family / "draft"), "--json", "--max-new-tokens", "12"]
    asked += ["--prompts", str(family / "prompts" / "math-heldout.jsonl"), "--most", "16"]

    def rise() -> float:
        run = CliRunner().invoke(app, asked)
        assert run.exit_code == 0, run.output
        seen = json.loads(run.stdout)["evidence"]
        assert seen["reused"]["tau"] == pytest.approx(case.signs["reused"])
        return float(seen["refreshed"]["tau"] - seen["refreshed"]["reused"])

    known = pytest.approx(case.signs["refreshed"] - case.signs["reused"])
    assert rise() == known
    with monkeypatch.context() as patched:
        patched.setattr(evidence, "TRAINING", TrainConfig(loss="kl", batch_tokens=512))
        assert rise() != known


@pytest.mark.usefixtures("small")
def test_a_case_at_a_temperature_stands_beside_the_greedy_one(family: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run = ["bench", "triage", "--family", str(family), "--out", out, "--members", "sft", "--json"]
    for more in ([], ["--temperature", "0.3"]):
        found = CliRunner().invoke(app, [*run, *more])
        assert found.exit_code == 0, found.output
    cases = [Case(**row) for row in json.loads(found.stdout)["cases"]]
    assert [(case.name, case.temperature) for case in cases] == [("sft", 0.0), ("sft", 0.3)]
    lines = Path(out, "answers", "tiny-0.3", "sft", "adapt.jsonl").read_text().splitlines()
    assert all(json.loads(line)["temperature"] == 0.3 for line in lines)


@pytest.mark.usefixtures("small")
def test_a_case_of_ones_own(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of prompts, split in its order: no prompt is in two parts, and a second run trains nothing."""
    prompts, table = write_prompts(tmp_path / "prompts.jsonl", 50), tmp_path / "mine.json"
    out = tmp_path / "out"
    target, base, draft = (str(family / p) for p in ("members/sft", "base", "draft"))
    run = ["bench", "case", "--target", target, "--draft", draft, "--base", base, "--kind", "odd"]
    run += ["--prompts", str(prompts), "--out", str(out), "--json", "--max-new-tokens", "12"]
    few = CliRunner().invoke(app, [*run[:-3], "--prompts", str(write_prompts(tmp_path / "f", 43))])
    assert "has 43 prompts of use, a case needs 44 at least" in str(few.exception)
    first = CliRunner().invoke(app, [*run, "--record", str(table)])
    assert first.exit_code == 0, first.output
    (case,) = read_cases(table)
    assert (case.name, case.family, case.kind) == ("sft", "base", "odd")
    assert set(case.taus) == set(ACTIONS)
    work = out / "answers" / "base" / "sft"
    parts = [
        {answer.id for file in work.glob(files) for answer in read_answers(file)}
        for files in ("check/answers-*.jsonl", "heldout.jsonl", "eval.jsonl", "adapt.jsonl")
    ]
    assert [len(part) for part in parts] == [16, 4, 12, 18]
    assert len(set.union(*parts)) == 50
    monkeypatch.setattr(bench, "_Bench", None)
    again = CliRunner().invoke(app, run)
    assert json.loads(again.stdout) == json.loads(first.stdout)
    for more, words in (
        (["--kind", "lora"], "a case base/sft with other kind; give this one another --name"),
        (["--target", base, "--name", "sft"], "with other target"),
        (["--max-new-tokens", "11"], "with other max_new_tokens"),
        (["--family", "org/base"], "--family 'org/base' has to do as the name of a file"),
    ):
        other = CliRunner().invoke(app, [*run, *more])
        assert words in str(other.exception)
    (work / "about.json").unlink()
    unsaid = CliRunner().invoke(app, run)
    assert "a case base/sft that does not say what it is of" in str(unsaid.exception)


@pytest.mark.usefixtures("small")
def test_answers_are_taken_in_the_order_of_the_prompts(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of answers have the short prompts first; adapting on a part of them must not."""
    turned = Path(shutil.copytree(family, tmp_path / "turned"))
    prompts = turned / "prompts" / "math-adapt.jsonl"
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join(reversed(lines)))  # the long ones first
    pools: list[list[str]] = []

    def watched(target: Any, draft: Any, pool: list[Any], *rest: Any, **more: Any) -> Any:
        pools.append([answer.id for answer in pool])
        return train(target, draft, pool, *rest, **more)

    monkeypatch.setattr(bench, "train", watched)
    bench_triage([turned], tmp_path / "out", ["sft"])
    target = load_target(str(turned / "members" / "sft"))
    asked = [p.id for p in suite_prompts(turned, target, ("math",), "adapt", 24)]
    answered = list(read_answers(tmp_path / "out" / "answers/tiny/sft/adapt.jsonl"))
    kept = [a.id for a in answered if a.length >= 2]
    first = [p for p in asked if p in kept][:12]
    assert kept[:12] != first, "the file is in another order"
    assert pools[0] == first


def two_families() -> list[Case]:
    ours, theirs = made_up_cases(20), made_up_cases(20, seed=3)
    return ours + [dataclasses.replace(case, family="other") for case in theirs]


def test_a_case_is_judged_by_what_is_apart_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table that each verdict rests on lacks the case's kind, or its family, and nothing else."""
    from redraft_experiments import calibration as module

    seen: list[list[Case]] = []
    true = module.outlook

    def watched(signs: Any, k: int, measured: Any, others: Any, temperature: float) -> Any:
        seen.append(list(others))
        assert temperature == 0.7
        return true(signs, k, measured, others, temperature)

    monkeypatch.setattr(module, "outlook", watched)
    cases = [
        dataclasses.replace(c, seen={"keep": [c.taus["keep"]]}, temperature=0.7)
        for c in two_families()
    ]
    for apart in ("kind", "family"):
        seen.clear()
        judge(cases, apart)
        for case, table in zip(cases, seen, strict=True):
            own = getattr(case, apart)
            assert table == [c for c in cases if getattr(c, apart) != own]


def test_the_figures_are_those_of_their_definitions() -> None:
    cases = [dataclasses.replace(c, seen={"keep": [c.taus["keep"]]}) for c in two_families()]
    judged = judge(cases)
    found = calibration(judged)
    told = [j for j in judged if j.recovery is not None]
    assert 0 < len(told) < len(cases), "some gaps are too small to tell a recovery"
    for j in told:
        t = j.case.taus
        assert j.recovery == pytest.approx((t["adapt"] - t["keep"]) / (t["retrain"] - t["keep"]))
    off = [abs(j.predicted[0] - j.recovery) for j in told if j.predicted and j.recovery is not None]
    assert (found.cases, found.error) == (len(told), pytest.approx(np.mean(off)))
    inside = [
        j.predicted[1] <= j.recovery <= j.predicted[2]
        for j in told
        if j.predicted and j.recovery is not None
    ]
    assert found.coverage == pytest.approx(np.mean(inside))
    others = [np.mean([o.recovery for o in told if o.case.kind != j.case.kind]) for j in told]
    naive = np.mean(
        [abs(o - j.recovery) for o, j in zip(others, told, strict=True) if j.recovery is not None]
    )
    assert found.naive == pytest.approx(naive)
    assert found.right == np.mean([j.verdict.action == j.right for j in judged])
    ways = {p.name: p for p in policies(judged)}
    best = np.mean([max(c.taus.values()) * c.plain / c.step for c in cases])
    kept = np.mean([c.taus["keep"] * c.plain / c.step for c in cases])
    assert ways["never adapt"].regret == pytest.approx(best - kept)
    assert ways["never adapt"].repairs == 0
    assert ways["the right action, known beforehand"].needless == 0
    assert ways["always retrain"].needless == sum(j.right != "retrain" for j in judged)


def test_the_right_action_climbs_by_each_step_of_the_price() -> None:
    case = made_up_cases()[0]
    bar = {name: 1 + WORTH * dearness for name, dearness in DEARNESS.items()}
    for lack, right in ((0.001, "adapt"), (-0.001, "retrain")):
        taus = {"keep": 1.5, "refresh": 1.5, "adapt": 2.0, "retrain": 2.0 * bar["retrain"] - lack}
        assert right_action(dataclasses.replace(case, taus=taus)) == right
    near = {"keep": 1.5, "refresh": 1.5 * bar["refresh"] + 0.001, "adapt": 1.7, "retrain": 1.7}
    assert right_action(dataclasses.replace(case, taus=near)) == "refresh"
