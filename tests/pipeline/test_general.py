"""General prompts: what is trained on next to the prompts, and what guards other traffic."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.generation import general_prompts
from redraft.generation.answer_file import read_answers
from redraft.generation.general_prompts import made_up_questions
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.pipeline import general
from redraft.report.terminal import print_report
from redraft.training import train as train_module
from redraft.training.guard import SHARES
from tests.conftest import write_prompts
from tests.pipeline.test_adapt import settings
from tests.training.test_train import rising

COUNT = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("general")
    return write_prompts(folder / "p.jsonl", COUNT), write_prompts(
        folder / "g.jsonl", 60, start=200
    )


def run(
    target: Target, draft: Path, files: tuple[Path, Path], out: Path, **changes: object
) -> pipeline.AdaptResult:
    about = {"general__share": 0.5, "general__prompts": str(files[1]), "general__aside": 10}
    return pipeline.adapt(
        target, str(draft), str(files[0]), out=out, config=settings(**{**about, **changes})
    )


@pytest.mark.parametrize("budget", ["0.5", "auto"])
def test_a_share_is_trained_on_some_guard_it_and_some_are_measured(
    target: Target, draft_folder: Path, files: tuple[Path, Path], tmp_path: Path, budget: str
) -> None:
    result = run(target, draft_folder, files, tmp_path / "run", select__budget=budget)
    answers = {f.stem: read_answers(f) for f in (tmp_path / "run/answers").glob("*.jsonl")}
    asked = {name: {tuple(a.prompt) for a in found} for name, found in answers.items()}
    trained = set().union(*(asked[n] for n in asked if n in ("general", "general-1")))
    kept = len(answers["rounds"]) if budget == "auto" else len(answers["adapt"]) // 2
    assert len(trained) == round(kept / 2)
    assert len(asked["general-heldout"]) == len(asked["off-general"]) == 10
    assert not trained & asked["general-heldout"]
    assert not (trained | asked["general-heldout"]) & asked["off-general"]
    report = result.report
    assert report.prompts["trained_on"] == kept + len(trained)
    assert {"general-before", "general-after"} <= set(report.off_domain)
    way = [share for share, _, _ in report.train.way]
    assert way == (list(SHARES) if report.train.best_step else [])
    generated = sum(a.length for n, found in answers.items() if n in paid(answers) for a in found)
    assert report.cost["unique_generated_tokens"] == generated


def paid(answers: dict[str, list[Answer]]) -> set[str]:
    return {"heldout", "general", "general-1", "general-heldout"} | (
        {"rounds"} if "rounds" in answers else {"adapt"}
    )


def test_what_is_measured_has_one_temperature(
    target: Target, draft_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {
        "regenerate__temperature": 0.8,
        "regenerate__greedy_share": 0.5,
        "measure__temperature": 0.8,
    }
    run(target, draft_folder, files, tmp_path / "run", **changes)
    found = {f.stem: read_answers(f) for f in (tmp_path / "run/answers").glob("*.jsonl")}
    ways = {name: {answer.temperature for answer in some} for name, some in found.items()}
    assert ways.pop("adapt") == {0.0, 0.8}
    ways.pop("general")
    assert set(map(frozenset, ways.values())) == {frozenset({0.8})}


def test_a_guard_alone_trains_on_no_general_prompts(
    target: Target,
    draft_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_module, "_evaluate", rising)  # so that the last step is the best one
    changes = {"general__share": 0.0, "general__guard": "on"}
    result = run(target, draft_folder, files, tmp_path / "run", **changes)
    found = {f.stem for f in (tmp_path / "run/answers").glob("*general*.jsonl")}
    assert found == {"general-heldout", "off-general"}
    report = result.report
    assert (
        report.prompts["trained_on"] == len(read_answers(tmp_path / "run/answers/adapt.jsonl")) // 2
    )
    assert report.train.best_step == report.train.steps
    shown = Console(width=400, record=True, file=io.StringIO())
    print_report(report, shown)
    kept = next(row for row in report.train.way if row[0] == report.train.share)
    assert (
        f"guard: {kept[0]:.0%} of the way from the unadapted to the trained draft is kept"
        in shown.export_text(clear=False)
    )
    assert f"kept {kept[1]:.2f} and {kept[2]:.2f}" in shown.export_text(clear=False)
    assert kept[2] >= report.train.way[0][2] * 0.99
    assert report.train.best_tau() == kept[1]


def test_without_a_share_nothing_of_it_is_there(
    target: Target, draft_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run(target, draft_folder, files, tmp_path / "run", general__share=0.0)
    assert not list((tmp_path / "run").rglob("*general*"))
    assert not result.report.train.way


def test_a_second_run_has_nothing_to_do_and_another_share_costs_only_its_own(
    target: Target, draft_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(target, draft_folder, files, out)
    assert not run(target, draft_folder, files, out).worked
    before = {f: f.read_bytes() for f in (out / "answers").glob("*.jsonl")}
    run(target, draft_folder, files, out, general__share=1.0)
    changed = {f.stem for f in before if f.read_bytes() != before[f]}
    assert changed == {"general"}


def test_a_file_with_too_few_is_refused(
    target: Target, draft_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    few = write_prompts(tmp_path / "few.jsonl", 3 * general.FEWEST - 1, start=300)
    with pytest.raises(
        UserError, match=r"holds 23 general prompts that are not asked already, 24 are the least"
    ):
        run(target, draft_folder, (files[0], few), tmp_path / "run")


def test_no_general_prompt_is_asked_elsewhere(
    target: Target, draft_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """A file that holds the job's own prompts first: training on what is measured would flatter it."""
    both = tmp_path / "both.jsonl"
    both.write_text(files[0].read_text() + files[1].read_text())
    run(target, draft_folder, (files[0], both), tmp_path / "run")
    found = {f.stem: read_answers(f) for f in (tmp_path / "run/answers").glob("*.jsonl")}
    asked = [tuple(a.prompt) for some in found.values() for a in some]
    assert len(set(asked)) == len(asked)


def test_the_name_of_the_measured_set_is_taken(
    target: Target, draft_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    about = {"general__share": 0.5, "general__prompts": str(files[1])}
    off = {"general": str(files[1])}
    with pytest.raises(UserError, match="off-domain name 'general' is that of the general prompts"):
        pipeline.adapt(
            target,
            str(draft_folder),
            str(files[0]),
            out=tmp_path / "run",
            config=settings(**about),
            off_domain=off,
        )
    assert not (tmp_path / "run/answers").exists()


def test_the_questions_are_what_the_target_writes_in_a_users_place(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, tokenizer = target.stop_ids[0], target.tokenizer
    texts = [
        "What is the first town?",
        "what is the first town?",
        "hi",
        "Name two lakes. And of the",
        "Is it so?  ",
    ]
    opening: list[list[int]] = []

    def written(target: Target, batch: list[object], plan: object, **how: object) -> object:
        for prompt, text in zip(batch, texts, strict=False):
            opening.append(list(prompt.tokens))  # type: ignore[attr-defined]
            tokens = tokenizer.encode(text, add_special_tokens=False)
            ends = not text.startswith("Name")
            tokens += [stop] if ends else []
            yield [Answer("x", prompt.tokens, tokens, len(tokens), "stop" if ends else "length")]  # type: ignore[attr-defined]

    monkeypatch.setattr(general_prompts, "generate_answers", written)
    # The same in other letters and what is too short are left out; what has no end is cut at a sentence's.
    assert made_up_questions(target, 2) == ["What is the first town?", "Name two lakes."]
    whole = target.render([{"role": "user", "content": "What is the first town?"}])
    assert whole[: len(opening[0])] == opening[0]
    assert len(opening[0]) < len(whole)
    assert len(made_up_questions(target, 4)) == 3, "a target that repeats itself gives fewer"


def test_a_turn_that_ends_with_a_text_ends_there(target: Target) -> None:
    """Some templates end a user's turn with ordinary tokens; what the target answers is no question."""
    tokens = target.tokenizer.encode("Name the lake [/INST] It is so.", add_special_tokens=False)
    question = general_prompts._question(target, tokens, "[/INST]")
    assert question == "Name the lake"


def test_a_template_that_hides_the_users_place_is_refused(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "render_text", lambda messages: "no user's text")
    with pytest.raises(UserError, match="does not show where a user's turn begins"):
        made_up_questions(target, 1)


@pytest.mark.parametrize("problem", [UserError("no chat template"), ValueError("system first")])
def test_a_template_that_refuses_a_question_leaves_the_job_unguarded(
    target: Target,
    draft_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
) -> None:
    render_text = target.render_text

    def refuses(messages: list[dict[str, str]], **how: object) -> str:
        if messages[0]["content"] == general_prompts.PLACE:
            raise problem
        return render_text(messages, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(target, "render_text", refuses)
    about = {"general__share": 0.0, "general__prompts": "", "general__guard": "auto"}
    result = run(target, draft_folder, files, tmp_path / "run", **about)
    assert "general-before" not in result.report.off_domain
    with pytest.raises(UserError, match=rf"made up \({problem}\): name a file"):
        run(target, draft_folder, files, tmp_path / "on", **{**about, "general__guard": "on"})


def test_without_enough_of_them_auto_leaves_the_job_unguarded_and_on_is_refused(
    target: Target,
    draft_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def made_up(target: Target, count: int, seed: int) -> list[str]:
        asked.append(count)
        return []

    monkeypatch.setattr(general, "made_up_questions", made_up)
    about = {"general__share": 0.0, "general__prompts": ""}
    for _ in range(2):
        result = run(target, draft_folder, files, tmp_path / "run", **about, general__guard="auto")
    assert not result.worked, "a second run tried again"
    assert asked == [3 * general.FEWEST], "twice ten are fewer than are needed"
    assert not result.report.train.way
    assert "general-before" not in result.report.off_domain
    shown = Console(width=400, record=True, file=io.StringIO())
    print_report(result.report, shown)
    assert "no guard: the target did not make up enough general prompts" in shown.export_text()
    for changes in ({"general__guard": "on"}, {"general__share": 0.5}):
        with pytest.raises(
            UserError, match=r"made up 0 different questions of \d+, 24 are the least: name a file"
        ):
            run(target, draft_folder, files, tmp_path / "other", **{**about, **changes})


def test_the_made_up_questions_are_kept(
    target: Target,
    draft_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def made_up(target: Target, count: int, seed: int) -> list[str]:
        asked.append(count)
        return [f"say the word {i}" for i in range(count)]

    monkeypatch.setattr(general, "made_up_questions", made_up)
    for _ in range(2):
        run(target, draft_folder, files, tmp_path / "run", general__prompts="")
    rows = [json.loads(line) for line in (tmp_path / "run/general.jsonl").read_text().splitlines()]
    assert asked == [len(rows)]
    assert rows[0]["messages"] == [{"role": "user", "content": "say the word 0"}]
