"""Prompts in many shapes, regeneration that resumes, selection within a budget."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from redraft.config import RegenerateConfig, SelectConfig, read_budget, resolve
from redraft.core import console
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.generation.answer_file import continued, read_answers
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.prompts.chat import understand
from redraft.prompts.prompts import read_prompts, split_prompts
from redraft.selection.select import select, within_budget
from tests.conftest import write_prompts


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "conversations": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"prompt": "q", "response": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"question": "q", "answer": "a"},
    ],
)
def test_every_known_shape_is_the_same_conversation(row: dict[str, object]) -> None:
    assert understand(row).messages == (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    )


def test_bad_lines_are_counted_and_the_rest_is_kept(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [
        json.dumps({"prompt": "one"}),
        "{not json",
        "",
        json.dumps({"texts": "what is this"}),
        json.dumps({"messages": [{"role": "wizard", "content": "x"}]}),
        json.dumps({"prompt": "x" * 300}),
        json.dumps({"prompt": "two"}),
        json.dumps({"messages": "hello"}),
    ]
    path.write_text("\n".join(lines) + "\n")
    found = read_prompts(str(path), target)
    assert [p.id for p in found.prompts] == ["line-1", "line-7"]
    reasons = dict(found.left_out)
    assert sorted(reasons) == [2, 3, 4, 5, 6, 8]
    assert reasons[8] == "messages is not a list of turns but str"
    assert "not valid JSON" in reasons[2]
    assert reasons[3] == "the line is empty"
    assert "unknown schema with keys texts; known: messages" in reasons[4]
    assert "unknown role 'wizard'" in reasons[5]
    assert "tokens long, the target's context is 256" in reasons[6]
    assert "2 prompts" in found.summary()
    assert "6 left out (first: line 2: not valid JSON" in found.summary()


def test_no_prompts_left_says_why(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(
        UserError, match=r"no prompts left after reading 1 lines\n.*line 1: unknown"
    ):
        read_prompts(str(path), target)
    path.write_text("")
    with pytest.raises(UserError, match="no prompts left"):
        read_prompts(str(path), target)
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "none.jsonl"), target)


def test_gzip_limit_references_and_repeated_ids(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    rows = [{"id": "a", "question": "2+2", "answer": "4"}, {"id": "a", "question": "3+3"}]
    with gzip.open(path, "wt") as stream:
        stream.write("".join(json.dumps(r) + "\n" for r in [*rows, {"id": "a", "prompt": "z"}]))
    found = read_prompts(str(path), target, limit=3)
    assert [p.id for p in found.prompts] == ["a", "a@2", "a@3"]
    reference = found.prompts[0].reference
    assert reference is not None
    assert reference[-1] in target.stop_ids
    assert found.prompts[1].reference is None
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="could not be read to the end"):
        read_prompts(str(path), target)


def test_repeats_and_refused_templates_are_rows_left_out(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "c", "prompt": "y"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read_prompts(str(path), target)
    assert [p.id for p in found.prompts] == ["a", "c"]
    assert found.left_out == ((2, "the same prompt as a"),)
    picky = "{% if messages[0]['content'] == 'y' %}{{ raise_exception('no y') }}{% endif %}x"
    monkeypatch.setattr(target, "template", picky)
    found = read_prompts(str(path), target)
    assert "refused the row: no y" in dict(found.left_out)[3]


def test_splits_are_disjoint_and_keyed_by_the_seed() -> None:
    prompts = [Prompt(str(i), (i,)) for i in range(40)]
    parts = [list(p) for p in split_prompts(prompts, 64, 8, seed=0)]
    assert [len(p) for p in parts] == [22, 8, 10]
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in prompts)
    assert parts == [list(p) for p in split_prompts(prompts, 64, 8, seed=0)]
    assert parts != [list(p) for p in split_prompts(prompts, 64, 8, seed=1)]
    with pytest.raises(UserError, match="7 prompts are too few"):
        split_prompts(prompts[:7], 64, 8, seed=0)


def test_equal_first_turns_are_on_one_side_of_the_split() -> None:
    later: Any = (({"role": "assistant"}, {"role": "user"}),)
    prompts = [Prompt(f"{i}/{n}", (i,), None, (), later * n) for i in range(30) for n in (0, 1)]
    adapt, heldout, evaluation = split_prompts(prompts, 15, 15, seed=0)
    for one, other in ((adapt, heldout), (adapt, evaluation), (heldout, evaluation)):
        assert not {p.tokens for p in one} & {p.tokens for p in other}
    assert len(evaluation) == 15


def test_given_names_do_not_meet_our_own(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "a"}, {"id": "line-1", "prompt": "b"}, {"id": "x#2", "prompt": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [p.id for p in read_prompts(str(path), target).prompts]
    assert names == ["line-1", "line-1@2", "x#2@3"]


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path: Path) -> None:
    lines = [Answer(f"a{i}", (1,), (2, 3), 2, "stop").to_line() for i in range(2)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    assert [a.id for a in read_answers(path)] == ["a0", "a1"]
    assert continued(path) == {"a0", "a1"}
    assert path.read_text() == "\n".join([*lines, ""])
    path.write_text(lines[0])
    assert [a.id for a in read_answers(path)] == ["a0"]
    path.write_text(f"{lines[0]}\n{lines[1][:20]}")
    assert [a.id for a in read_answers(path)] == ["a0"]
    assert continued(path) == {"a0"}
    assert path.read_text() == f"{lines[0]}\n"


def test_long_originals_are_cut_aloud(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [Prompt("a", (5,) * 200, (7,) * 100), Prompt("b", (5,), (7,) * 10)]
    console.set_quiet(False)
    try:
        config = RegenerateConfig(answers="original", max_new_tokens=1 << 30)
        found = regenerate(target, prompts, tmp_path / "a.jsonl", config)
    finally:
        console.set_quiet(True)
    assert [a.length for a in found] == [56, 10]
    assert "1 of 2 answers are longer than max_new_tokens" in capsys.readouterr().err


def test_regeneration_resumes_without_asking_twice(target: Target, tmp_path: Path) -> None:
    prompts = read_prompts(str(write_prompts(tmp_path / "p.jsonl", 10)), target).prompts
    config = RegenerateConfig(max_new_tokens=10, batch_size=4, temperature=0.7)
    whole = regenerate(target, prompts, tmp_path / "whole.jsonl", config, lookahead=2)
    assert len(whole) == 10
    assert all(a.temperature == 0.7 for a in whole)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    shutil.copy(tmp_path / "whole.about.json", tmp_path / "cut.about.json")
    cut.write_text("".join(lines[:4]) + lines[4][:30])  # killed in the middle of a line
    resumed = regenerate(target, prompts, cut, config, lookahead=2)
    assert {a.id: a for a in resumed} == {a.id: a for a in whole}
    assert cut.read_text().splitlines(keepends=True)[:4] == lines[:4]
    before = cut.read_text()
    regenerate(target, prompts, cut, config, lookahead=2)
    assert cut.read_text() == before


def test_original_answers(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question": "2+2", "answer": "4"}) + "\n" + '{"question": "x"}\n')
    prompts = read_prompts(str(path), target).prompts
    config = RegenerateConfig(answers="original")
    found = regenerate(target, prompts, tmp_path / "a.jsonl", config)
    assert [a.id for a in found] == ["line-1"]
    assert found[0].finish == "stop"
    assert read_answers(tmp_path / "a.jsonl") == found
    with pytest.raises(UserError, match="none of the 1 prompts has one"):
        regenerate(target, prompts[1:], tmp_path / "b.jsonl", config)


def test_answer_files_name_their_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; `redraft regenerate` writes one"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="line 1: not an answer record"):
        read_answers(tmp_path / "a.jsonl")


def test_selection_is_keyed_by_id_and_fits_the_budget() -> None:
    answers = [Answer(f"a{i}", (1,), tuple(range(10)), 10, "stop") for i in range(20)]
    scored = select(answers, SelectConfig(budget="0.25")).samples
    kept = {s.id for s in scored if s.kept}
    assert len(kept) == 5
    assert min(s.score for s in scored if s.kept) > max(s.score for s in scored if not s.kept)
    shuffled = select(answers[::-1], SelectConfig(budget="0.25")).samples
    assert {s.id for s in shuffled if s.kept} == kept
    assert {s.id for s in select(answers, SelectConfig(budget="0.25", seed=1)).kept} != kept


@pytest.mark.parametrize(
    ("budget", "kept"), [("3", 3), ("999", 4), ("0.5", 2), ("1.0", 4), ("25t", 2), ("30t", 3)]
)
def test_budgets(budget: str, kept: int) -> None:
    assert len(within_budget([10, 10, 10, 10], read_budget(budget))) == kept


@pytest.mark.parametrize("budget", ["lots", "1.5", "-0.2", "5x", "", "0", "20%", "5k"])
def test_budgets_that_are_none(budget: str) -> None:
    with pytest.raises(ValueError, match="is not a count"):
        read_budget(budget)
    with pytest.raises(UserError, match="select.budget is not a count"):
        resolve([("test", {"select.budget": budget})])


@pytest.mark.parametrize("budget", ["5t", "0.01"])
def test_budgets_that_keep_nothing(budget: str) -> None:
    with pytest.raises(UserError, match="keeps none of the 1 samples"):
        within_budget([10], read_budget(budget))
