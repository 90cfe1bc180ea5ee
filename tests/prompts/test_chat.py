"""Rows as data sets and training tools write them: what is asked, what answers, what is marked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from redraft.prompts.chat import understand


def asked(row: dict[str, Any]) -> str:
    """The conversation in one line: s/u/a/t and the text of each message."""
    return "|".join(f"{m['role'][0]}:{m['content']}" for m in understand(row).messages)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"name": "area", "arguments": {"w": 5}}


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"instruction": "q", "context": "c c", "response": "a"}, "u:q\n\nc c|a:a"),
        ({"question": "q", "context": "c c", "answers": {"text": ["a", "b"]}}, "u:q\n\nc c|a:a"),
        ({"question": "q", "passage": "c c", "answer": True}, "u:q\n\nc c"),
        ({"question": "in c c?", "context": "c c"}, "u:in c c?"),
        ({"question": "q", "context": ["c", "d"]}, "u:q\n\nc\n\nd"),
        ({"instruction": "", "input": "q", "output": "a"}, "u:q|a:a"),
        ({"instruction": "q", "history": [["b", "c"]], "output": "a"}, "u:b|a:c|u:q|a:a"),
        ({"prompt": "q", "history": CHAT}, "u:q|a:a|u:q"),
        ({"query": "q", "response": "a"}, "u:q|a:a"),
        ({"problem": "q", "solution": "a", "answer": "5"}, "u:q|a:a"),
        ({"inputs": "q", "targets": "a"}, "u:q|a:a"),
        ({"input": "q", "output": "a"}, "u:q|a:a"),
        ({"user": "q", "assistant": "a"}, "u:q|a:a"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "s:s|u:q|a:a"),
        ({"turns": ["q", "r"], "question_id": 1}, "u:q|u:r"),
        ({"turns": 2, "prompt": "q"}, "u:q"),
        ({"messages": json.dumps(CHAT)}, "u:q|a:a"),
        ({"messages": CHAT[:1], "answer": "5"}, "u:q"),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, "u:q|a:a"),
        ({"prompt": "q", "chosen": CHAT, "rejected": CHAT}, "u:q|a:a"),
        ({"chosen_messages": CHAT, "rejected_messages": CHAT}, "u:q|a:a"),
        ({"chosen": CHAT, "rejected": CHAT}, "u:q|a:a"),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, "u:q|a:a"),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
            },
            "u:q|a:a",
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q"}, "u:q|a:a"),
        (
            {"prompt": "Human: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", "chosen": "b"},
            "u:q|a:a|u:r|a:b",
        ),
        ({"prompt": "Human: q"}, "u:Human: q"),
        ({"question": "q", "answer": {"value": "a", "aliases": ["b"]}}, "u:q"),
        ({"inputs": CHAT[:1], "output": "a"}, "u:q|a:a"),
    ],
)
def test_columns_in_use_are_a_conversation(row: dict[str, Any], conversation: str) -> None:
    assert asked(row) == conversation
    assert understand(row).unread == ()


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"question": "q", "choices": ["A b", "C"], "answer": "A b"}, ["choices"]),
        ({"question": "q", "options": {"A": "one"}, "hint": "two"}, ["options", "hint"]),
        ({"question": "q", "documents": [{"title": "x", "text": "y"}]}, ["documents"]),
        ({"question": "q", "context": {"sentences": [["a"]]}}, ["context"]),
        ({"messages": CHAT, "context": "c"}, ["context"]),
        ({"prompt": "q", "history": "a while ago"}, ["history"]),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "z"}, ["system"]),
        ({"prompt": "q", "source": "x" * 300}, ["source"]),
        ({"text": "a text", "question": None, "context": "c"}, ["context"]),
        ({"messages": [{**CHAT[0], "context": "c", "id": "7", "country": "B"}]}, ["messages[].context"]),
        ({"prompt": "q", "source": "web", "user_id": "a", "model_name": "m", "meta": {"a": "b"}}, []),
        ({"prompt": "q", "reward": 0.5, "flags": [True], "tokens": 7, "hint": " "}, []),
        ({"prompt": "q", "completion": "a", "rejected": "b", "rationale": "c", "tests": ["d"]}, []),
        ({"instruction": "q", "input": "i", "output": "a", "text": "x q\n\ni y a"}, []),
        ({"messages": [{"role": "user", "content": "a long enough question"}], "prompt": "a long enough question"}, []),
    ],
)  # fmt: skip
def test_text_that_is_not_read_is_named(row: dict[str, Any], unread: list[str]) -> None:
    assert list(understand(row).unread) == unread


def sharegpt(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def test_tool_calls_of_every_kind_are_one() -> None:
    called = {"type": "function", "function": CALL}
    rows: list[Any] = [
        sharegpt(("human", "q"), ("function_call", json.dumps(CALL)), ("observation", "15")),
        sharegpt(("User", "q"), ("TOOL_CALL", json.dumps([called])), ("function_response", {"x": 1})),
        {
            "messages": [
                CHAT[0],
                {"role": "assistant", "content": None, "function_call": CALL},
                {"role": "function", "name": "area", "content": "15"},
            ]
        },
        {
            "messages": [
                CHAT[0],
                {"role": "assistant", "tool_calls": json.dumps([called])},
                {"role": "tool", "tool_call_id": "c1", "name": "area", "content": [{"type": "text", "text": "15"}]},
            ]
        },
    ]  # fmt: skip
    parts = [
        {"type": "tool_call", "value": json.dumps(CALL)},
        {"type": "tool_use", "name": "area", "input": {"w": 5}},
    ]
    for part in parts:
        turns = [
            {"role": "assistant", "content": [part]},
            {"role": "tool", "content": [{"type": "text", "value": "15"}]},
        ]
        rows.append({"messages": [CHAT[0], *turns]})
    found = [understand(row).messages for row in rows]
    assert [messages[1]["tool_calls"] for messages in found] == [[called]] * 6
    assert [m[2]["content"] for m in found] == ["15", '{"x": 1}', "15", "15", "15", "15"]
    assert found[2][2]["name"] == "area"
    assert (found[3][2]["name"], found[3][2]["tool_call_id"]) == ("area", "c1")


def test_calls_that_follow_each_other_are_one_turn() -> None:
    call = json.dumps(CALL)
    row = sharegpt(
        ("human", "q"), ("gpt", "wait"), ("function_call", call), ("function_call", call),
        ("observation", "1"), ("observation", "2"), ("gpt", "a"),
    )  # fmt: skip
    messages = understand(row).messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert (messages[1]["content"], len(messages[1]["tool_calls"])) == ("wait", 2)


@pytest.mark.parametrize("role", ["gpt", "ChatGPT", "bing", "BARD", "model", "assistant"])
def test_names_of_assistants(role: str) -> None:
    assert asked(sharegpt(("human", "q"), (role, "a"))) == "u:q|a:a"


def test_developers_and_functions() -> None:
    row = {"messages": [{"role": "developer", "content": "s"}, *CHAT], "functions": [{"name": "f"}]}
    assert asked(row) == "s:s|u:q|a:a"
    assert understand(row).tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "a", "reasoning": "why"},
        {"content": "a", "thinking": "why"},
        {"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "a"}]},
        {"content": [{"type": "reasoning", "text": "why"}, {"type": "output_text", "text": "a"}]},
        {"content": [{"type": "reasoning", "value": "why"}, {"type": "text", "value": "a"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, {"text": "a"}]},
    ],
)  # fmt: skip
def test_reasoning_goes_by_the_names_that_templates_read(answer: dict[str, Any]) -> None:
    message = understand({"messages": [CHAT[0], {"role": "assistant", **answer}]}).messages[1]
    assert message["content"] == "a"
    assert {message[name] for name in ("reasoning_content", "reasoning", "thinking")} == {"why"}


@pytest.mark.parametrize(
    "weight", [{"weight": 0}, {"train": False}, {"loss": 0.0}, {"loss_weight": 0.0}]
)
def test_an_answer_without_weight_is_context(weight: dict[str, Any]) -> None:
    turns = [CHAT[0], {**CHAT[1], **weight}, {"role": "user", "content": "r"}]
    assert understand({"messages": turns}).messages[1]["weight"] == 0
    assert asked({"messages": turns[:2]}) == "u:q"
    assert "weight" not in understand({"messages": [CHAT[0], {**CHAT[1], "weight": 1}]}).messages[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "images": ["a.png"]}, "more than text \\(column images\\)"),
        ({"question": "q", "image": {"bytes": b"x", "path": None}}, "column image\\)"),
        ({"input_ids": [1, 2], "pixel_values": [[0.1]]}, "column pixel_values\\)"),
        ({"messages": [{**CHAT[0], "audio": "a.wav"}]}, "turn 1 has more than text \\(under 'audio'\\)"),
        ({"prompt": "<image>What?"}, "turn 1 has <image>"),
        ({"messages": [{"role": "user", "content": "see <|video_pad|>"}]}, "has <|video_pad|>"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        (sharegpt(("human", "q"), ("function_call", "no")), "turn 2 is a tool call that is not JSON"),
        (sharegpt(("human", "q"), ("function_call", "{}")), "turn 2 has a tool call without the name"),
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}]}, "neither"),
        (sharegpt(("wizard", "q")), "turn 1 has the unknown role 'wizard'"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": 3}]}, "turn 2 has no text under 'content'"),
        ({"messages": ["q"]}, "turn 1 is no object"),
        ({"messages": 7}, "messages is not a list of turns but int"),
        ({"chosen": "blue", "rejected": "green"}, "chosen is an answer, and no column has its prompt"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ({"prompt": "x\ud800y"}, "half a surrogate pair"),
        ({"text": "x\udc00y"}, "half a surrogate pair"),
        (sharegpt(("human", "q"), ("tool_call", r'{"name": "\ud800"}')), "half a surrogate pair"),
    ],
)  # fmt: skip
def test_rows_that_are_not_text_alone_or_not_understood(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        understand(row)


@pytest.mark.parametrize(
    "text", ["What does `<video>` do?", "Fix <video src=x></video>", "<audio>x</audio>"]
)
def test_tags_of_a_page_are_text(text: str) -> None:
    assert asked({"prompt": text}) == f"u:{text}"


IDS = [2, 70, 71, 1, 3, 80, 81, 1]
MASK = [0, 0, 0, 0, 0, 1, 1, 1]
LABELS = [-100] * 5 + IDS[5:]


@pytest.mark.parametrize(
    "marks",
    [
        {"loss_mask": MASK},
        {"loss_mask": [bool(m) for m in MASK]},
        {"loss_mask": [0.5 * m for m in MASK]},
        {"labels": LABELS},
        {"assistant_masks": MASK},
        {"completion_mask": MASK, "labels": LABELS, "attention_mask": [1] * 8},
    ],
)
def test_marks_of_the_answer(marks: dict[str, Any]) -> None:
    found = understand({"input_ids": IDS, **marks})
    assert (found.tokens, found.answer) == (tuple(IDS[:5]), tuple(IDS[5:]))
    padded: dict[str, Any] = {
        name: [0, *value, 0] if name != "labels" else [-100, *value, -100]
        for name, value in {"attention_mask": [1] * 8, **marks}.items()
    }
    found = understand({"input_ids": [0, *IDS, 0], **padded})
    assert (found.tokens, found.answer) == (tuple(IDS[:5]), tuple(IDS[5:]))


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ({"labels": IDS}, "labels marks the first token"),
        ({"labels": [-100] * 8}, "labels marks no token"),
        ({"labels": [-100] * 4 + IDS[5:] + [9]}, "labels has other tokens than input_ids"),
        ({"labels": LABELS[1:]}, "labels does not mark each of the 8"),
        ({"loss_mask": MASK, "labels": [-100] * 6 + IDS[6:]}, "loss_mask and labels mark different"),
        ({"assistant_masks": [0] * 8}, "assistant_masks marks no token"),
        ({"completion_mask": "00000111"}, "completion_mask does not mark each"),
        ({"completion_mask": ["0"] * 8}, "completion_mask has values that are neither"),
        ({"loss_mask": [float("nan")] * 8}, "loss_mask has values"),
        ({"loss_mask": MASK, "attention_mask": [1, 1, 0, 1, 1, 1, 1, 1]}, "attention_mask has zeros between"),
        ({"answer_mask": MASK, "attention_mask": [1] * 8}, "answer_mask may mark the answer; known marks"),
        ({"attention_mask": [0] * 8}, "attention_mask is 0 for every token"),
    ],
)  # fmt: skip
def test_marks_that_do_not_fit_are_named(marks: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        understand({"input_ids": IDS, **marks})


def test_deep_rows_are_left_out() -> None:
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        understand({"prompt": "q", "context": deep})
