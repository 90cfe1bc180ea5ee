"""Chat templates as files and as code: what is no template says so, and tool calls are written as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.models.templates import read_template
from redraft.prompts.prompts import PromptReader, read_prompts
from redraft.prompts.turns import next_turn
from tests.conftest import FAMILIES, make_tokenizer, save_target

TEXT = "{% for m in messages %}\n{{ m.content }} é{% endfor %}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_template_in_any_unicode_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode(encoding))
    assert read_template(str(path)) == TEXT
    assert read_template(None) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("é".encode("latin-1"), "byte 1 is not utf-8; save the file as UTF-8"),
        (b"", "expected a Jinja template, found an empty file"),
        (b"GGUF\x00\x00\x00", "found a binary file"),
        (b"a\n{% for m in messages %}b", "is no Jinja template: line 2"),
        (b"{{ messages | no_such_filter }}", "is no Jinja template: line 1: No filter named"),
        (json.dumps({"chat_template": TEXT}).encode(), "found JSON; save its chat_template value"),
    ],
)
def test_what_is_no_template_is_refused_before_any_row(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_template(str(path))
    with pytest.raises(UserError, match="is a folder; name the file in it"):
        read_template(str(tmp_path))


def test_a_models_own_template_that_is_none(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "template", "{% for m in messages %}")
    with pytest.raises(UserError, match=r"the chat template of .* is no Jinja template: line 1"):
        target.render([{"role": "user", "content": "x"}])


def call(arguments: Any) -> list[dict[str, Any]]:
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]


WRITERS = {
    "joins text": "{{ 'f ' + c.function.arguments }}",
    "writes any": "{{ c.function.arguments }}",
    "writes JSON": "{{ c.function.arguments | tojson }}",
    "asks which": (
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    ),
    "writes pairs": (
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("given", [{"city": "Åre"}, '{"city": "Åre"}'])
@pytest.mark.parametrize("writer", WRITERS)
def test_arguments_take_the_form_that_the_template_writes_as_json(
    writer: str, given: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        f"{WRITERS[writer]}{{% endfor %}}{{% endfor %}}"
    )
    monkeypatch.setattr(target, "template", template)
    text = target.tokenizer.decode(target.render(call(given), answered=True))
    wanted = 'city="Åre"' if writer == "writes pairs" else '{"city": "Åre"}'
    assert text.removeprefix("x").removeprefix("f ") == wanted


def test_text_keeps_its_own_spaces_and_words_are_no_python(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins = "{% for m in messages if m.tool_calls %}{{ '' + m.tool_calls[0].function.arguments }}{% endfor %}"
    monkeypatch.setattr(target, "template", joins)
    assert target.tokenizer.decode(target.render(call('{"a":1}'), answered=True)) == '{"a":1}'
    writes = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(target, "template", writes)
    messages = call({"a": "b"})
    messages[0]["content"] = "is {'a': 'b'} JSON?"  # the arguments as Python writes them
    text = target.tokenizer.decode(target.render(messages, answered=True))
    assert '"arguments": {"a": "b"}' in text


def test_a_template_that_refuses_both_says_why(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "template", "{{ raise_exception('no tools') }}")
    with pytest.raises(ValueError, match="refused the row: no tools"):
        target.render(call({}), answered=True)


def test_a_token_that_the_embedding_does_not_have_ends_the_command(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "embedding_VH", target.embedding_VH[:90])
    for row in ({"prompt": "x"}, {"text": "x"}, {"text": "<|assistant|>x"}):
        with pytest.raises(
            UserError, match="'x' as token 92, but the model's embedding has 90 rows"
        ):
            PromptReader(target).take(1, row)


def test_rows_may_switch_the_template(tmp_path: Path) -> None:
    """Both modes of one model, as two domains: `chat_template_kwargs` of a row goes before --template-arg."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
        "{% if think is defined %}{{ 'yes' if think else 'no' }}{% endif %}"
    )
    folder = save_target(
        tmp_path / "t", FAMILIES["llama"](len(make_tokenizer())), template=template
    )
    target = load_target(str(folder), template_args={"think": True})
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows: list[dict[str, Any]] = [
        {"messages": talk},
        {"messages": talk, "chat_template_kwargs": {"think": False}},
        {"messages": talk, "chat_template_kwargs": '{"think": false, "other": 1}'},
        {"messages": talk, "chat_template_kwargs": "{"},
        {"messages": talk, "chat_template_kwargs": [1]},
        {"messages": talk, "chat_template_kwargs": {"tools": []}},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(str(path), target)
    first, second = found.prompts
    texts = [target.tokenizer.decode(prompt.tokens) for prompt in found.prompts]
    assert [text[-3:] for text in texts] == ["yes", ";no"]
    reasons = dict(found.left_out)
    assert "same prompt" in reasons[3]
    assert "no JSON" in reasons[4]
    assert "no object but list" in reasons[5]
    assert "tools is an argument of the rendering" in reasons[6]
    assert Prompt.from_row(json.loads(json.dumps(second.to_row()))) == second
    assert len(first.to_row()) == 6  # as it was: hashes of prompts without variables stay
    said = tuple(target.tokenizer.encode("x"))
    for prompt, ending in ((first, "yes"), (second, ";no")):
        later = next_turn(prompt, Answer(prompt.id, prompt.tokens, said, 1, "stop"), target)
        assert later is not None
        assert target.tokenizer.decode(later.tokens).endswith(f"x;user: c;{ending.strip(';')}")
    with pytest.raises(UserError, match="--template-arg: .* add_generation_prompt is an argument"):
        load_target(str(folder), template_args={"add_generation_prompt": True})
