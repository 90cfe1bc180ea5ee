"""Which samples a budget keeps, what comes last, and how the choice is explained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.config import SelectConfig, read_budget, resolve
from redraft.core import console
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.generation.answer_file import read_answers
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.selection.explain import explain
from redraft.selection.near_duplicates import clusters, near_duplicates
from redraft.selection.select import (
    kept_answers,
    most_kept,
    read_selection,
    select,
    within_budget,
    write_selection,
)
from tests.conftest import write_prompts


def sample(name: str, tokens: list[int]) -> Answer:
    return Answer(name, tuple(tokens[:4]), tuple(tokens[4:]), len(tokens) - 4, "stop")


POOL = [sample(f"s{i}", [100 * i + j for j in range(40)]) for i in range(10)]
COPIES = [sample(f"copy{i}", [100 * i + j for j in range(39)] + [7]) for i in range(10)]


def test_near_duplicates_come_last_and_name_their_original() -> None:
    both = [*POOL, *COPIES]
    found = select(both, SelectConfig(budget="10"))
    assert len(found.kept) == 10
    originals = {s.id[-1] for s in found.kept}
    assert len(originals) == 10  # one of each pair
    for copied in found.samples[10:]:
        assert copied.duplicate_of is not None
        assert copied.duplicate_of[-1] == copied.id[-1]
    assert "10 near-duplicates, 0 kept" in found.summary()
    roomy = select(both, SelectConfig(budget="15"))
    assert sum(s.duplicate_of is not None for s in roomy.kept) == 5
    untouched = select(both, SelectConfig(budget="10", duplicates=0.0))
    assert all(s.duplicate_of is None for s in untouched.samples)
    assert Counter(s.id[-1] for s in untouched.kept).most_common(1)[0][1] == 2


def test_alike_is_measured_in_shared_runs() -> None:
    tokens = [list(range(100)), [*range(95), 1, 2, 3, 4, 5], [*range(50), *range(500, 550)]]
    assert near_duplicates(tokens, [0, 1, 2], 0.8) == {1: 0}  # 91 runs of 101; 46 of 146
    assert near_duplicates(tokens, [2, 1, 0], 0.8) == {0: 1}
    assert near_duplicates(tokens, [0, 1, 2], 0.2) == {1: 0, 2: 0}
    assert near_duplicates([*tokens, tokens[0]], [0, 1, 2, 3], 1.0) == {3: 0}  # exact copies alone


def test_coverage_lets_clusters_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        [k * 1000 + (7 * i * j) % 50 for j in range(60)] for k in range(3) for i in range(1, 11)
    ]
    pool = [sample(f"{i:02}", tokens) for i, tokens in enumerate(kinds)]
    groups = clusters(kinds, 3, seed=0)
    assert [len(set(groups[i : i + 10])) for i in (0, 10, 20)] == [1, 1, 1]
    assert len(set(groups)) == 3
    monkeypatch.setattr(  # the first kind scores best throughout
        "redraft.selection.scoring.random_score", lambda name, seed: -float(name)
    )
    plain = select(pool, SelectConfig(budget="6", duplicates=0.0))
    assert [s.id for s in plain.kept] == ["00", "01", "02", "03", "04", "05"]
    spread = select(pool, SelectConfig(budget="6", coverage=3, duplicates=0.0))
    assert Counter(int(s.id) // 10 for s in spread.kept) == {0: 2, 1: 2, 2: 2}
    assert {s.id for s in spread.kept} == {"00", "01", "10", "11", "20", "21"}
    assert len({s.cluster for s in spread.samples}) == 3


def test_tokens_pass_over_what_does_not_fit() -> None:
    assert within_budget([300, 50, 200, 30], read_budget("200t")) == [1, 3]


@pytest.mark.parametrize(
    ("budget", "kept"), [("7", 7), ("70", 20), ("0.25", 5), ("0.01", 1), ("900t", 9), ("auto", 20)]
)
def test_what_a_budget_keeps_is_known_before_anything_is_answered(budget: str, kept: int) -> None:
    assert most_kept(20, read_budget(budget)) == kept


def test_budgets_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nothing to choose from"):
        select([], SelectConfig(coverage=3))
    with pytest.raises(UserError, match=r"'200t' counts answers' tokens, and with --by prompts"):
        select(POOL, SelectConfig(budget="200t", by="prompts"))
    console.set_quiet(False)
    try:
        assert len(select(POOL, SelectConfig(budget="12")).kept) == 10
    finally:
        console.set_quiet(True)
    assert "asks for 12 samples, the pool has 10: all are kept" in capsys.readouterr().err


def test_answers_worth_training_on(tmp_path: Path) -> None:
    """Those of two tokens or more, that the selection keeps; a selection of others is refused."""
    lengths = {"a": 3, "b": 1, "c": 2, "d": 2}
    answers = [Answer(name, (1,), (5,) * n, n, "stop") for name, n in lengths.items()]
    assert [a.id for a in kept_answers(answers, None)] == ["a", "c", "d"]
    found = select(answers, SelectConfig(budget="3", duplicates=0.0))
    write_selection(tmp_path / "s.jsonl", found)
    kept = {sample.id for sample in found.kept}
    assert len(kept) == 3
    chosen = [a.id for a in kept_answers(answers, tmp_path / "s.jsonl")]
    assert chosen == sorted(kept - {"b"})
    with pytest.raises(UserError, match="keeps 3 samples, of which 2 are here"):
        kept_answers([a for a in answers if a.id != min(kept)], tmp_path / "s.jsonl")


def test_a_selection_is_stored_and_explained(target: Target, tmp_path: Path) -> None:
    pool = [sample(a.id, [t % 250 for t in (*a.prompt, *a.answer)]) for a in POOL]
    found = select(pool, SelectConfig(budget="5", duplicates=0.0))
    write_selection(tmp_path / "s.jsonl", found)
    assert read_selection(tmp_path / "s.jsonl") == found.samples
    examples = explain(found.samples, {a.id: a for a in pool}, target, count=2)
    assert [(e.where, e.rank) for e in examples] == [
        ("top", 1),
        ("top", 2),
        ("middle", 5),
        ("middle", 6),
        ("bottom", 9),
        ("bottom", 10),
    ]
    assert len(explain(found.samples[:3], {a.id: a for a in pool}, target)) == 3
    (tmp_path / "s.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(
        UserError, match=r"s\.jsonl is damaged .* write it again with redraft select"
    ):
        read_selection(tmp_path / "s.jsonl")


def test_the_command_scores_and_explains(
    target_folder: Path, draft_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(a.to_line() + "\n" for a in answers))
    out = str(tmp_path / "s.jsonl")
    arguments = ["select", "--answers", str(file), "--out", out, "--select", "rejection"]
    models = ["--target", str(target_folder), "--draft", str(draft_folder)]
    run = CliRunner().invoke(app, [*arguments, *models, "--budget", "0.25", "--explain", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert (found["kept"], found["scored"]) == (6, 24)
    assert found["scoring"]["flops"] > 0
    assert "top, rank 1: " in run.stderr
    assert "bottom, rank 24: " in run.stderr
    scores = [s.score for s in read_selection(tmp_path / "s.jsonl") if not s.duplicate_of]
    assert scores == sorted(scores, reverse=True)
    for extra, message in (
        ([], "--select rejection asks the target: name it with --target, or select by random"),
        (["--by", "prompts"], "--by prompts chooses among prompts: name them with --prompts"),
        (["--select", "random", "--explain"], "--explain needs the target's tokenizer"),
    ):
        failed = CliRunner().invoke(app, [*arguments, *extra])
        assert isinstance(failed.exception, UserError)
        assert message in str(failed.exception)


def test_prompts_that_select_chose_are_answered_by_regenerate(
    target_folder: Path, tmp_path: Path
) -> None:
    prompts, chosen = write_prompts(tmp_path / "p.jsonl", 12), tmp_path / "s.jsonl"
    models = ["--target", str(target_folder), "--prompts", str(prompts)]
    select = ["select", "--by", "prompts", "--select", "flatness", "--budget", "5", "--explain"]
    run = CliRunner().invoke(app, [*select, *models, "--out", str(chosen)])
    assert run.exit_code == 0, run.output
    assert "<|user|>Say 70 and 10.<|end|><|assistant|>\n" in run.stderr, "not shown whole"
    assert "->" not in run.stderr
    answer = ["regenerate", *models, "--out", str(tmp_path / "a.jsonl"), "--max-new-tokens", "4"]
    run = CliRunner().invoke(app, [*answer, "--selection", str(chosen)])
    assert run.exit_code == 0, run.output
    kept = {s.id for s in read_selection(chosen) if s.kept}
    assert {a.id for a in read_answers(tmp_path / "a.jsonl")} == kept
    assert len(kept) == 5
    few = CliRunner().invoke(app, [*answer, "--selection", str(chosen), "--limit", "2"])
    assert "name the file that was chosen from" in str(few.exception)


def test_prompts_chosen_first_are_the_only_ones_answered(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = str(write_prompts(tmp_path / "p.jsonl", 40))
    settings: dict[str, Any] = {
        "select.by": "prompts",
        "select.select": "draft_loss",
        "select.budget": "0.5",
        "select.duplicates": 0.0,
        "regenerate.max_new_tokens": 16,
        "train.epochs": 1.0,
        "measure.eval_limit": 8,
        "measure.heldout": 8,
        "measure.eval_new_tokens": 16,
    }
    result = pipeline.adapt(
        target,
        str(draft_folder),
        prompts,
        out=tmp_path / "run",
        config=resolve([("test", settings)]),
    )
    chosen = [s for s in read_selection(tmp_path / "run" / "selection.jsonl") if s.kept]
    answered = read_answers(tmp_path / "run" / "answers" / "adapt.jsonl")
    assert {a.id for a in answered} == {s.id for s in chosen}
    assert len(answered) == 12  # half of the 24 that are neither held out nor measured on
    assert result.report.prompts["trained_on"] == 12
    assert result.report.cost["scored"]["flops"] > 0
    again = pipeline.adapt(
        target,
        str(draft_folder),
        prompts,
        out=tmp_path / "run",
        config=resolve([("test", settings)]),
    )
    assert not again.worked
