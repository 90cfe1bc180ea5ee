"""Conversations turn by turn, text and tokens as they are, and what inspection says of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.prompts.chat import understand
from redraft.prompts.inspection import inspect_prompts
from redraft.prompts.prompts import read_prompts
from redraft.prompts.turns import first_turn, next_turn


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TALK = [user("a"), says("A"), user("b"), says("B"), user("c")]


def answer(prompt: Prompt, text: str, target: Target, finish: str = "stop") -> Answer:
    tokens = (*target.tokenizer.encode(text, add_special_tokens=False), target.stop_ids[0])
    return Answer(prompt.id, prompt.tokens, tokens, len(tokens), finish)


def test_later_turns_are_asked_on_top_of_the_targets_own_answers(target: Target) -> None:
    first = first_turn("x", TALK, None, target, "all")
    assert list(first.tokens) == target.render([user("a")])
    second = next_turn(first, answer(first, "mine", target), target)
    assert second is not None
    assert second.id == "x#2"
    assert list(second.tokens) == target.render([user("a"), says("mine"), user("b")])
    third = next_turn(second, answer(second, "too", target), target)
    assert third is not None
    assert third.id == "x#3"
    whole = [user("a"), says("mine"), user("b"), says("too"), user("c")]
    assert list(third.tokens) == target.render(whole)
    assert next_turn(third, answer(third, "end", target), target) is None
    assert next_turn(first, answer(first, "mine", target, "length"), target) is None


def test_the_files_own_replies_and_questions_without_any(target: Target) -> None:
    first = first_turn("x", TALK, None, target, "all")
    second = next_turn(first, None, target)
    assert second is not None
    assert list(second.tokens) == target.render(TALK[:3])
    assert second.reference is not None
    assert target.tokenizer.decode(second.reference).startswith("B")
    bare = first_turn("y", [user("a"), user("b")], None, target, "all")
    assert list(bare.tokens) == target.render([user("a")])
    assert next_turn(bare, None, target) is None
    asked = next_turn(bare, answer(bare, "A", target), target)
    assert asked is not None
    assert list(asked.tokens) == target.render([user("a"), says("A"), user("b")])
    last = first_turn("z", TALK[:4], None, target, "last")
    assert list(last.tokens) == target.render(TALK[:3])
    assert not last.later


def test_a_reply_without_weight_is_kept(target: Target) -> None:
    talk = [user("a"), {**says("A"), "weight": 0}, user("b"), says("B"), user("c"), says("C")]
    first = first_turn("x", talk, None, target, "all")
    assert list(first.tokens) == target.render(TALK[:3])
    second = next_turn(first, answer(first, "mine", target), target)
    assert second is not None
    assert list(second.tokens) == target.render([*TALK[:3], says("mine"), user("c")])
    assert next_turn(second, answer(second, "end", target), target) is None


def test_a_reply_that_calls_a_tool_is_kept(target: Target) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    talk = [user("a"), call, {"role": "tool", "content": "7"}, says("A"), user("b"), says("B")]
    first = first_turn("x", talk, ({"name": "f"},), target, "all")
    assert list(first.tokens) == target.render(talk[:3])
    assert [len(turn) for turn in first.later] == [2, 1]


@pytest.mark.parametrize(
    ("talk", "replies"),
    [
        ([user("a"), says("A")], ["A"]),
        ([user("a"), says("A"), user("b"), says("B")], ["A", "B"]),
        ([user("a"), says("A"), user("b"), says("B"), user("c"), says("C")], ["A", "B", "C"]),
        ([user("a"), user("b"), says("B")], [None]),
        (TALK, ["A", "B", None]),
    ],
)
def test_every_reply_of_a_file_is_somebodys_reference(
    talk: list[Any], replies: list[str | None], target: Target
) -> None:
    turn: Prompt | None = first_turn("x", talk, None, target, "all")
    found = []
    while turn is not None:
        text = (
            target.tokenizer.decode(turn.reference, skip_special_tokens=True)[:1]
            if turn.reference
            else None
        )
        found.append(text)
        turn = next_turn(turn, None, target)
    assert found == replies


def test_single_turns_carry_no_history(target: Target) -> None:
    single = first_turn("x", [user("a"), says("A")], None, target, "all")
    assert (single.history, single.later) == ((), ())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [says("A"), user("a")]}, "turn 1 is out of order: assistant after start"),
        (
            {"messages": [user("a"), says("A"), says("B")]},
            "turn 3 is out of order: assistant after",
        ),
        ({"messages": [user("a"), {"role": "system", "content": "s"}]}, "turn 2 is out of order"),
        ({"messages": [user("a"), {"role": "tool", "content": "s"}]}, "tool after user"),
        ({"messages": [{"role": "system", "content": "s"}]}, "has no user turn"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "turn 1 holds a part of type 'image', which is not text",
        ),
        ({"prompt": "a", "tools": "{no"}, "tools is text that is not JSON"),
        ({"prompt": "a", "tools": [1]}, "tools is not a list of objects"),
        ({"input_ids": [1, "a"]}, "input_ids is not a list of token ids"),
        ({"input_ids": [1, 2], "loss_mask": [0]}, "loss_mask does not mark each of the 2"),
        ({"text": " "}, "the text is empty"),
        ({"prompt": [1, 2], "tokens": 345, "length": 2}, "not those of an answer record"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        understand(row)


def test_more_shapes(target: Target) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}
    assert understand({"messages": [parts]}).messages == (user("ab"),)
    preference = understand({"prompt": [user("a")], "completion": [says("A")]})
    assert preference.messages == (user("a"), says("A"))
    assert understand({"prompt": "a", "system": "s"}).messages[0]["role"] == "system"
    tools = understand({"prompt": "a", "tools": '[{"name": "f"}]'}).tools
    assert tools == ({"name": "f"},)
    calls = [{"function": {"name": "f", "arguments": '{"city": "P"}'}, "id": None}]
    row = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": calls}]}
    called = understand(row).messages[1]["tool_calls"]
    assert called == [{"function": {"name": "f", "arguments": '{"city": "P"}'}}]
    assert (
        understand({"prompt": "a", "completion": "A", "tokens": 345, "length": 9}).shape == "prompt"
    )
    mixed = {"messages": [{"role": "user", "content": "a", "tool_calls": None}]}
    assert understand(mixed).messages == (user("a"),)


def read(target: Target, tmp_path: Path, rows: list[Any], **how: Any) -> Any:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(str(path), target, **how)


def test_text_and_tokens_are_taken_as_they_are(target: Target, tmp_path: Path) -> None:
    rendered = target.render([user("a"), says("A")], answered=True)
    text = target.tokenizer.decode(rendered)
    asked = target.render([user("a")])
    mask = [i >= len(asked) for i in range(len(rendered))]
    rows = [
        {"text": text},
        {"text": "plain text"},
        {"input_ids": [9, *rendered[1:]], "loss_mask": mask},
        {"input_ids": [5, 6]},
        {"input_ids": [5, 999_999]},
        {"input_ids": [5, 6, 7], "loss_mask": [1, 0, 0]},
        {"input_ids": [5, 6, 8], "loss_mask": [0, 0, 0]},
    ]
    found = read(target, tmp_path, rows)
    assert list(found.prompts[0].tokens) == asked
    assert found.prompts[0].reference == tuple(rendered[len(asked) :])
    assert target.tokenizer.decode(found.prompts[1].tokens) == "plain text"
    assert found.prompts[2].reference == tuple(rendered[len(asked) :])
    assert found.prompts[3].tokens == (5, 6)
    reasons = dict(found.left_out)
    assert "they are another model's" in reasons[5]
    assert "marks the first token" in reasons[6]
    assert "marks no token" in reasons[7]
    assert found.shapes == {"text": 2, "input_ids": 2}


def test_conversations_are_answered_in_rounds_and_resumed(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = tuple(range(2, target.vocab_size, 9))  # so that a random model ends its answers
    monkeypatch.setattr(Target, "stop_ids", property(lambda self: often))
    rows = [{"id": "x", "messages": TALK}, {"id": "y", "prompt": "hello"}]
    prompts = read(target, tmp_path, rows).prompts
    config = RegenerateConfig(max_new_tokens=200)
    whole = {a.id: a for a in regenerate(target, prompts, tmp_path / "a.jsonl", config)}
    assert set(whole) == {"x", "x#2", "x#3", "y"}
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        cut = tmp_path / f"cut{kept}.jsonl"
        cut.write_text("".join(lines[:kept]))
        about = (tmp_path / "a.about.json").read_text()
        (tmp_path / f"cut{kept}.about.json").write_text(about)
        resumed = regenerate(target, prompts, cut, config)
        assert {a.id: a for a in resumed} == whole
        assert cut.read_text().splitlines(keepends=True)[:kept] == lines[:kept]
    original = RegenerateConfig(answers="original", max_new_tokens=200)
    given = regenerate(target, prompts, tmp_path / "o.jsonl", original)
    assert [a.id for a in given] == ["x", "x#2"]


def test_inspection_shows_the_mistakes_of_a_template(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [
        {"messages": [{"role": "system", "content": "s"}, user("a"), says("A")]},
        {"messages": TALK},
        {"prompt": "x" * 300},
        {"prompt": "y" * 300},
    ]
    good = inspect_prompts(read(target, tmp_path, rows), target, rows=2)
    assert (good.kept, good.left_out, good.conversations) == (2, 2, 1)
    assert good.reasons == {"the prompt is … tokens long, the target's context is …": 2}
    assert list(good.lines.values()) == [3]
    assert good.warnings == ()
    assert good.rows[1].turns == 3
    supervised = [s.text for s in good.rows[0].spans if s.supervised and not s.special]
    assert supervised == ["A"]
    assert any(s.special and s.supervised for s in good.rows[0].spans)  # the stop token
    dropping = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    monkeypatch.setattr(target, "template", dropping)
    bad = inspect_prompts(read(target, tmp_path, rows), target, rows=0)
    said = "\n".join(bad.warnings)
    assert "the chat template drops system prompts: 1 row with them" in said
    assert "nothing that has the target answer" in said
    assert "hold no stop token under this template (stop tokens: " in said


def test_prompts_inspect_prints_and_gives_json(target_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "one", "messages": TALK[:2]}) + "\n{}\n")
    run = CliRunner().invoke(app, ["prompts", "inspect", str(path), "--target", str(target_folder)])
    assert run.exit_code == 0, run.output
    assert "one: " in run.output
    assert "«A»«⟨" in run.output, "the stop token is learned too"
    assert "1 prompts (1 messages)" in run.output
    assert "1 row (line 2): unknown schema with keys (none)" in run.output
    arguments = ["prompts", "inspect", str(path), "--target", str(target_folder), "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert (found["kept"], found["left_out"]) == (1, 1)
    wrong = CliRunner().invoke(app, [*arguments, "--turns", "some"])
    assert isinstance(wrong.exception, UserError)
    assert "--turns must be one of all, last; got 'some'" in str(wrong.exception)
