"""Answers are paid for once: what changed is named, what was there is kept, and what fits is used again."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.lock import held
from redraft.core.records import Answer, Prompt
from redraft.generation import answer_file
from redraft.generation import regenerate as module
from redraft.generation.answer_file import about, read_answers
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.pipeline import run_folder
from redraft.prompts import clock
from redraft.prompts.prompts import read_prompts
from tests.conftest import write_prompts

SETTINGS = RegenerateConfig(max_new_tokens=6, batch_size=4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the prompts that the target was asked."""
    found: list[str] = []
    real = module.generate_answers

    def spy(target: Target, prompts: Any, plan: Any, **how: Any) -> Any:
        found.extend(prompts[i].id for batch in plan for i in batch)
        return real(target, prompts, plan, **how)

    monkeypatch.setattr(module, "generate_answers", spy)
    return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for place in (module, answer_file, run_folder, clock):
        monkeypatch.setattr(place, "say", lines.append)
    return lines


@pytest.fixture
def rows(target: Target, tmp_path: Path) -> list[Prompt]:
    return list(read_prompts(str(write_prompts(tmp_path / "p.jsonl", 12)), target).prompts)


def named(prompts: list[Prompt], names: str) -> list[Prompt]:
    return [replace(prompt, id=name) for prompt, name in zip(prompts, names, strict=True)]


def test_other_prompts_set_the_file_aside_and_take_from_it(
    target: Target, rows: list[Prompt], tmp_path: Path, asked: list[str], told: list[str]
) -> None:
    out = tmp_path / "a.jsonl"
    first = regenerate(target, named(rows[:4], "abcd"), out, SETTINGS)
    before = out.read_bytes()
    asked.clear()
    # Two of the old prompts under other names, and two new ones, one of them under an old name.
    again = regenerate(target, named(rows[2:6], "xyza"), out, SETTINGS)
    assert sorted(asked) == ["a", "z"]
    assert any("prompts changed; the answers so far are kept as" in line for line in told)
    assert any("2 answers given before to the same prompts are used again" in line for line in told)
    assert (tmp_path / "set-aside" / "a-1.jsonl").read_bytes() == before
    by_id = {answer.id: answer for answer in again}
    assert sorted(by_id) == ["a", "x", "y", "z"]
    assert by_id["x"] == replace(first[2], id="x")
    assert by_id["a"].prompt == rows[5].tokens
    # Back to the first prompts: all of their answers are somewhere.
    asked.clear()
    back = regenerate(target, named(rows[:4], "abcd"), out, SETTINGS)
    assert not asked
    assert {a.id: a for a in back} == {a.id: a for a in first}


def test_a_new_file_is_answered_anew(
    target: Target, rows: list[Prompt], tmp_path: Path, asked: list[str]
) -> None:
    for name in ("a.jsonl", "a-2.jsonl"):
        regenerate(target, rows[:2], tmp_path / name, SETTINGS)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("change", "lookahead"),
    [({"temperature": 0.5}, 0), ({"max_new_tokens": 7}, 0), ({"seed": 1}, 0), ({}, 2)],
)
def test_answers_of_other_settings_are_kept_and_not_used(
    change: dict[str, Any],
    lookahead: int,
    target: Target,
    rows: list[Prompt],
    tmp_path: Path,
    asked: list[str],
    told: list[str],
) -> None:
    out = tmp_path / "a.jsonl"
    regenerate(target, rows[:4], out, SETTINGS)
    asked.clear()
    regenerate(target, rows[:4], out, replace(SETTINGS, **change), lookahead)
    assert len(asked) == 4
    named_change = next(iter(change), "lookahead")
    assert f"a.jsonl: {named_change} changed" in told[0]
    assert len(read_answers(tmp_path / "set-aside" / "a-1.jsonl")) == 4
    settings = replace(SETTINGS, **change, batch_size=2)  # on which no answer depends
    asked.clear()
    regenerate(target, rows[:4], out, settings, lookahead)
    assert not asked


def test_a_file_of_the_person_grows(
    target: Target, rows: list[Prompt], tmp_path: Path, asked: list[str], told: list[str]
) -> None:
    out = tmp_path / "a.jsonl"
    first = regenerate(target, named(rows[:3], "abc"), out, SETTINGS, grow=True)
    asked.clear()
    # b's row was moved to the front, a new row has its place, one more came at the end.
    more = named([rows[1], rows[0], rows[7], rows[2], rows[8]], "abcde")
    for _ in range(2):  # the second time there is nothing left to ask
        grown = regenerate(target, more, out, SETTINGS, grow=True)
        assert sorted(asked) == ["c~2", "e"]
    assert grown[:3] == first
    assert {a.prompt for a in grown} == {p.tokens for p in more}
    other = named(rows[10:], "ab")
    regenerate(target, other, out, SETTINGS, grow=True)
    assert any("5 answers to other prompts stay in it" in line for line in told)
    assert len(read_answers(out)) == 7
    kept = out.read_bytes()
    with pytest.raises(
        UserError, match="made with other lookahead, temperature; name another file"
    ):
        regenerate(target, other, out, replace(SETTINGS, temperature=0.5), 3, grow=True)
    assert out.read_bytes() == kept
    stranger = tmp_path / "s.jsonl"
    stranger.write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match="was not written by `redraft regenerate`"):
        regenerate(target, other, stranger, SETTINGS, grow=True)


def test_an_interruption_while_setting_aside_loses_nothing(
    target: Target,
    rows: list[Prompt],
    tmp_path: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "a.jsonl"
    regenerate(target, rows[:4], out, SETTINGS)
    for name in ("move", "write_text", "append_lines"):
        with monkeypatch.context() as patch:

            def stop(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(answer_file, name, stop)
            with pytest.raises(KeyboardInterrupt):
                regenerate(target, rows[2:6], out, SETTINGS)
    asked.clear()
    found = regenerate(target, rows[2:6], out, SETTINGS)
    assert sorted(asked) == sorted(p.id for p in rows[4:6])
    assert {a.prompt for a in found} == {p.tokens for p in rows[2:6]}


def test_later_turns_are_used_again(
    target: Target, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model hardly stops by itself: let every second token be a stop token.
    stops_at = list(range(0, target.vocab_size, 2))
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", stops_at)
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "two"},
    ]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n")
    found = read_prompts(str(path), target).prompts
    stops = replace(SETTINGS, max_new_tokens=200)
    first = regenerate(target, found, tmp_path / "a.jsonl", stops)
    assert [a.id for a in first] == ["line-1", "line-1#2"]
    asked.clear()
    path.write_text(json.dumps({"question": "new"}) + "\n" + path.read_text())
    both = regenerate(target, read_prompts(str(path), target).prompts, tmp_path / "a.jsonl", stops)
    assert asked == ["line-1"]
    assert sorted(a.id for a in both) == ["line-1", "line-2", "line-2#2"]


def test_one_writer_per_file(target: Target, rows: list[Prompt], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with held(out), pytest.raises(UserError, match="another redraft process .* in this file"):
        regenerate(target, rows, out, SETTINGS, grow=True)
    with held(tmp_path / "b.jsonl"):
        regenerate(target, rows, out, SETTINGS, grow=True)


def test_a_changed_stage_names_what_changed(tmp_path: Path, told: list[str]) -> None:
    with run_folder.RunFolder.open(tmp_path / "run") as run:
        paid, other = run.path / "paid.jsonl", run.path / "cheap.txt"

        def work() -> None:
            for path in (paid, other):
                path.write_text(str(len(told)))

        for inputs in ({"a": 1, "b": [2]}, {"a": 1, "b": [3], "c": None}):
            outputs = ["paid.jsonl", "cheap.txt"]
            run.stage(
                "s", inputs, outputs, lambda: None if other.exists() else work(), keeps=outputs[:1]
            )
            assert paid.exists()
        assert told == ["s: b, c changed; doing it again"]


DATED = "{% for m in messages %}{{ strftime_now('%d %b %Y %S') }} {{ m.content }}{% endfor %}"


def test_a_dated_template_keeps_its_day(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(target, "template", DATED)
    path = write_prompts(tmp_path / "p.jsonl", 2)
    first = list(read_prompts(str(path), target).prompts)
    regenerate(target, first, tmp_path / "a.jsonl", SETTINGS)
    monkeypatch.setattr(target, "rendered_at", datetime.now() + timedelta(days=40))
    assert list(read_prompts(str(path), target).prompts) != first
    clock.continue_time(target, [tmp_path / "none.json", about(tmp_path / "a.jsonl")])
    assert list(read_prompts(str(path), target).prompts) == first
    assert "the chat template writes the date: prompts are rendered as of 20" in told[-1]
    monkeypatch.setattr(target, "template", None)
    assert clock.kept_time(target) == {}


def test_a_run_is_continued_the_next_day(
    target: Target,
    draft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
) -> None:
    from tests.pipeline.test_adapt import settings

    monkeypatch.setattr(target, "template", DATED + "?")
    path = str(write_prompts(tmp_path / "p.jsonl", 16))
    pipeline.adapt(target, str(draft_folder), path, out=tmp_path / "run", config=settings())
    asked.clear()
    monkeypatch.setattr(target, "rendered_at", datetime.now() + timedelta(days=1))
    again = pipeline.adapt(target, str(draft_folder), path, out=tmp_path / "run", config=settings())
    assert not again.worked
    assert not asked


def test_one_more_row_and_another_split_cost_only_themselves(
    target: Target, draft_folder: Path, tmp_path: Path, asked: list[str]
) -> None:
    from tests.pipeline.test_adapt import settings

    path = write_prompts(tmp_path / "p.jsonl", 24)
    arguments = (target, str(draft_folder), str(path))
    run = tmp_path / "run"
    pipeline.adapt(*arguments, out=run, config=settings())
    everything = len(asked)
    asked.clear()
    write_prompts(path, 25)
    pipeline.adapt(*arguments, out=run, config=settings())
    # The split is drawn anew, so prompts change sides, where answers are longer or sampled otherwise.
    assert 0 < len(asked) < everything
    kept = sorted((run / "answers" / "set-aside").glob("*.jsonl"))
    assert kept
    assert all(read_answers(file) for file in kept)
    answered = read_answers(run / "answers" / "adapt.jsonl")
    assert len({a.id for a in answered}) == len(answered)


def test_answers_of_another_model_are_named(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = target.embedding_VH.shape[0]
    for prompt, tokens in (((1, rows), (2,)), ((1,), (2, rows))):
        path.write_text(Answer("x", prompt, tokens, 1, "stop").to_line() + "\n")
        with pytest.raises(
            UserError, match=rf"answer x has token .* {rows} rows: .* another model"
        ):
            answer_file.answers_for(target, path)
    path.write_text(Answer("x", (1,), (rows - 1,), 1, "stop").to_line() + "\n")
    assert answer_file.answers_for(target, path) == [Answer("x", (1,), (rows - 1,), 1, "stop")]


def test_a_run_says_which_versions_did_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("a", "b", "c")):
        version = {"redraft": "1.0" if number < 2 else "1.1", "python": "3.12"}
        monkeypatch.setattr(run_folder, "versions", lambda version=version: version)
        with run_folder.RunFolder.open(tmp_path / "run") as run:
            for stage in ("a", "b", "c")[: number + 1]:
                run.stage(
                    stage, {}, [f"{stage}.json"], lambda s=stage: run.write_json(f"{s}.json", 1)
                )
            assert run.state[name]["versions"] == version
    assert run.versions() == {"redraft": "1.0, 1.1", "python": "3.12"}
