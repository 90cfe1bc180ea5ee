"""The triage bench: cells that resume, and calibration runs of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from redraft.check import evidence
from redraft.check.calibration_runs import ACTIONS, CalibrationRun, read_runs
from redraft.check.cost_estimate import Plan
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
from redraft_experiments.suite import suite_prompts
from redraft_experiments.triage import bench_triage, print_runs
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
        monkeypatch.setattr(
            module, "PLANS", {"adapt": Plan(12, 1.0), "from-scratch": Plan(20, 1.0)}
        )
        monkeypatch.setattr(module, "EVALUATED", 12)
        monkeypatch.setattr(module, "HELDOUT", 4)
        monkeypatch.setattr(module, "CHECKED", 16)
    monkeypatch.setattr(bench, "LONGEST", 12)


@pytest.mark.usefixtures("small")
def test_a_run_per_member_that_is_made_once(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "runs.json"
    runs = bench_triage([family], tmp_path / "out", record=table)
    assert [run.name for run in runs] == ["int8", "sft"]
    assert read_runs(table) == runs
    same, moved = runs
    assert same.predictors["unadapted"] == pytest.approx(same.predictors["on_base"]), (
        "the base is its own parent"
    )
    assert set(moved.predictors) == {
        "unadapted",
        "entropy",
        "on_base",
        "base_states",
        "closed_form",
    }
    assert set(moved.taus) == set(moved.intervals) == set(ACTIONS)
    assert {name: len(quantiles) for name, quantiles in moved.quantiles.items()} == {
        "keep": 20,
        "closed-form": 20,
    }
    # tau as kept is that of a replay of the answers on disk, which the check did not see
    target = load_target(str(family / "members" / "sft"))
    work = tmp_path / "out" / "answers" / "tiny" / "sft"
    answers = [a for a in read_answers(work / "eval.jsonl") if a.length >= 2]
    traces = replay(target, read_draft(str(family / "draft")).build(target), answers, bench.K)
    assert moved.taus["keep"] == pytest.approx(
        pooled_tau([t for t in traces if t.accepted]), abs=1e-4
    )
    monkeypatch.setattr(bench, "_Bench", None)
    assert bench_triage([family], tmp_path / "out") == runs
    out = Console(width=80, record=True)
    print_runs(runs, out)
    shown = out.export_text()
    assert f"{moved.taus['adapt']:.2f}" in shown
    assert "tiny/int8" in shown
    assert "…" not in shown, "nothing is cut on a narrow screen"
    with pytest.raises(UserError, match="has no member 'sfft'"):
        bench_triage([family], tmp_path / "out", ["sfft"])


@pytest.mark.usefixtures("small")
def test_a_check_measures_what_its_calibration_runs_measured(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictors of a check are those of the cell of the same fine-tune, the closed form's too; by another
    loss that one would be another."""
    (known,) = bench_triage([family], tmp_path / "out", ["sft"])
    models = ["--target", str(family / "members" / "sft"), "--base", str(family / "base")]
    asked = ["check", *models, "--draft", str(family / "draft"), "--json", "--max-new-tokens", "12"]
    asked += ["--prompts", str(family / "prompts" / "math-heldout.jsonl"), "--most", "16"]

    def rise() -> float:
        run = CliRunner().invoke(app, asked)
        assert run.exit_code == 0, run.output
        seen = json.loads(run.stdout)["evidence"]
        assert seen["unadapted"]["tau"] == pytest.approx(known.predictors["unadapted"], abs=1e-4)
        return float(seen["closed_form"]["tau"] - seen["closed_form"]["unadapted"])

    fitted = known.predictors["closed_form"] - known.predictors["unadapted"]
    recorded = pytest.approx(fitted, abs=2e-4)
    assert rise() == recorded
    with monkeypatch.context() as patched:
        patched.setattr(evidence, "TRAINING", TrainConfig(loss="kl", batch_tokens=512))
        assert rise() != recorded


@pytest.mark.usefixtures("small")
def test_a_run_at_a_temperature_stands_next_to_the_greedy_one(family: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    run = ["bench", "triage", "--family", str(family), "--out", out, "--members", "sft", "--json"]
    for more in ([], ["--temperature", "0.3"]):
        found = CliRunner().invoke(app, [*run, *more])
        assert found.exit_code == 0, found.output
    runs = [CalibrationRun(**row) for row in json.loads(found.stdout)["runs"]]
    assert [(run.name, run.temperature) for run in runs] == [("sft", 0.0), ("sft", 0.3)]
    lines = Path(out, "answers", "tiny-0.3", "sft", "adapt.jsonl").read_text().splitlines()
    assert all(json.loads(line)["temperature"] == 0.3 for line in lines)


@pytest.mark.usefixtures("small")
def test_a_run_of_ones_own(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of prompts, split in its order: no prompt is in two parts, and a second run trains nothing."""
    prompts, table = write_prompts(tmp_path / "prompts.jsonl", 50), tmp_path / "mine.json"
    out = tmp_path / "out"
    target, base, draft = (str(family / p) for p in ("members/sft", "base", "draft"))
    run = ["bench", "case", "--target", target, "--draft", draft, "--base", base, "--kind", "odd"]
    run += ["--prompts", str(prompts), "--out", str(out), "--json", "--max-new-tokens", "12"]
    few = CliRunner().invoke(app, [*run[:-3], "--prompts", str(write_prompts(tmp_path / "f", 43))])
    assert "has 43 prompts of use, a calibration run needs 44 at least" in str(few.exception)
    first = CliRunner().invoke(app, [*run, "--record", str(table)])
    assert first.exit_code == 0, first.output
    (own,) = read_runs(table)
    assert (own.name, own.family, own.kind) == ("sft", "base", "odd")
    assert set(own.taus) == set(ACTIONS)
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
        (["--kind", "lora"], "a run base/sft with other kind; give this one another --name"),
        (["--target", base, "--name", "sft"], "with other target"),
        (["--max-new-tokens", "11"], "with other max_new_tokens"),
        (["--family", "org/base"], "--family 'org/base' has to do as the name of a file"),
    ):
        other = CliRunner().invoke(app, [*run, *more])
        assert words in str(other.exception)
    (work / "about.json").unlink()
    unsaid = CliRunner().invoke(app, run)
    assert "a run base/sft that does not say what it is of" in str(unsaid.exception)


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
