"""What is said of a prompts file: columns not read, what the template drops, and where turns end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft.core.visible import visible
from redraft.models.target import Target
from redraft.prompts.prompts import PromptReader, PromptSet, read_prompts
from redraft.prompts.stopping import end_of_turn_note

USER = {"role": "user", "content": "x"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
CALLED = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}]


def notes(target: Target, *rows: Any) -> str:
    reader = PromptReader(target)
    for number, row in enumerate(rows, 1):
        reader.take(number, row)
    return "\n".join(reader.notes())


def test_columns_that_are_not_read_are_counted(target: Target) -> None:
    rows = [{"question": f"q{i}", "hint": "h", "source": "s"} for i in range(3)]
    said = notes(target, *rows, {"question": "q", "choices": ["a b", "c"], "answer": "a b"})
    assert "columns hint (3 rows), choices (1 row) are not read" in said
    many = notes(target, *({"question": f"q{i}", f"column {i}": "h"} for i in range(200)))
    assert "column 7 (1 row), 92 others are not read" in many
    assert notes(target, {"question": "q", "answer": "a", "id": "7"}) == ""


def test_what_the_template_drops(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "messages": [{"role": "system", "content": "s"}, *CALLED, {"role": "user", "content": "y"}],
        "tools": [{"name": "f"}],
    }
    row["messages"].insert(-1, {"role": "assistant", "content": "z"})
    said = notes(target, row)
    assert "drops tools: 1 row with them" in said
    assert "drops tool calls: 1 row with them" in said
    assert "drops system" not in said
    whole = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    monkeypatch.setattr(target, "template", whole)
    assert notes(target, row) == ""


def ends(*tail: str) -> str:
    """A template that writes this after each answer."""
    return (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
        f"{{% if m.role == 'assistant' %}}{''.join(tail)}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


@pytest.mark.parametrize(
    ("template", "warned"),
    [
        (ends("<|system|>"), True),
        (ends("\\n<|system|>\\n"), True),
        (ends("<|im_end|>\\n"), True),
        (ends("<|system|><|end|>"), False),
        (ends("<|end|>\\n"), False),
        (ends("\\n"), False),
        (ends(), False),
        ("{{ raise_exception('three turns at least') }}", False),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|system|>{% endfor %}", False),
    ],
)
def test_an_end_of_turn_that_is_no_stop_token(
    template: str, warned: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "template", template)
    said = end_of_turn_note(target)
    assert bool(said) == warned
    if said:
        what = (
            "<|im_end|>, which this tokenizer splits"
            if "im_end" in template
            else "<|system|> (id 4)"
        )
        assert f"ends an assistant's turn with {what}" in said
        assert "no stop token (stop tokens: <|end|>)" in said
        assert said in notes(target, {"prompt": "x"})
        assert said not in notes(target, {"text": "x"}, {"input_ids": [5, 6]})


def test_warnings_are_marked_as_such() -> None:
    found = PromptSet("p.jsonl", (), ((2, "no \x1b[31m"),), 1, notes=("this", "that"))
    assert visible(found.summary()) == (
        "0 prompts from p.jsonl; 1 left out (first: line 2: no \\x1b[31m)\n  warning: this\n  warning: that"
    )


def test_one_reason_for_all_is_said_once(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(9)))
    monkeypatch.setattr(target, "template", "{{ raise_exception('no') }}")
    with pytest.raises(UserError) as refused:
        read_prompts(str(path), target)
    assert "reading 9 lines, all for the same reason\n" in str(refused.value)
    assert str(refused.value).count("the chat template refused the row: no") == 1


def test_nothing_in_a_file_steers_the_terminal(target_folder: Path, tmp_path: Path) -> None:
    path, evil = tmp_path / "p.jsonl", "\x1b]52;c;eA==\x07\u202e\x9b2J"
    rows = [
        {"id": f"i{evil}", "prompt": f"say {evil}", f"column {evil}": "x y"},
        {"messages": [{"role": f"r{evil}", "content": "x"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["prompts", "inspect", str(path), "--target", str(target_folder)]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert not set(run.output) & set(evil) - set("]52;c;eA==2J")
    assert run.output.count("\\x1b]") == 4


def test_odd_names_of_rows(target: Target) -> None:
    reader = PromptReader(target)
    names: list[Any] = [None, {"a": 1}, ["x"], "n" * 1000, 7]
    found = [reader.take(i, {"id": name, "prompt": f"q{i}"}) for i, name in enumerate(names)]
    assert [p.id if p else None for p in found] == ["line-0", "line-1", "line-2", "n" * 200, "7"]
