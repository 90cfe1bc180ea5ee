"""Rows and files damaged at random: each row ends as a prompt or as a reason, and nothing else happens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from redraft.core.errors import UserError
from redraft.models.target import Target
from redraft.prompts.prompts import PromptReader
from redraft.prompts.rows import read_rows

ARGUMENTS: list[Any] = [{"w": 5}, '{"w": 5}', "no", "", None]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"w": 5}}}
USER = {"role": "user", "content": "q"}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "messages": [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}]},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "1", "tool_call_id": "c1"}], "tools": [{"name": "f"}]},
    {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, {"role": "function", "content": "1"}]},
    {"messages": [USER, {"role": "assistant", "weight": 0, "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]}, USER]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}, {"from": "observation", "value": "1"}], "tools": "[]"},
    {"prompt": [USER], "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"instruction": "q", "input": "i", "context": "c", "history": [["b", "c"]], "output": "a", "system": "s"},
    {"question": "q", "context": ["c", "d"], "answers": {"text": ["a"], "answer_start": [3]}, "choices": ["x"]},
    {"turns": ["q", "r"], "category": "c"},
    {"text": "<|user|>q<|end|><|assistant|>a", "title": "t"},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
    {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
    {"id": "a", "prompt": [5, 6], "tokens": [7, 8, 9], "length": 2},
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**30, -(10**4000), "", " ", "q", "\0", "\x1b[2J",
    "half \ud800", "<image>", "x" * 5000, "<|end|>" * 40, "[" * 2000, '{"a": 1}', b"bytes", [], {}, [[]], [None], [{}],
    {"a": None}, {"": ""}, {"text": []}, [["q"]], [["q", None]], [[1, 2]], [{"role": "user"}], [{"from": None, "value": {}}],
    {1: 2}, (1, 2), {"role": "user", "content": "q"}, [{"role": "tool", "content": "x"}], [1, "a"], [-1, 5], list(range(400)),
]  # fmt: skip


def deep(levels: int, draw: random.Random) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = draw.choice([[value], {"content": value}, {"arguments": value}])
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def mutated(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A copy of a row with one to three places changed: replaced, removed, doubled, or swapped with others."""
    found: Any = json.loads(json.dumps(row))
    for _ in range(draw.randint(1, 3)):
        *path, last = draw.choice(places(found)[1:] or [("new",)])
        holder: Any = found
        for key in path:
            holder = holder[key]
        kind = draw.randrange(5)
        if kind == 0:
            holder.pop(last) if last in holder or isinstance(holder, list) else None
        elif kind == 1 and isinstance(holder, list):
            holder.insert(0, holder[last])
        elif kind == 2:
            holder[last] = deep(draw.choice([5, 300, 3000]), draw)
            break  # too deep for the walk above
        elif kind == 3:
            holder[last] = json.loads(json.dumps(draw.choice(draw.choice(ROWS).copy().popitem())))
        else:
            holder[last] = draw.choice(ODD)
        if isinstance(holder, dict) and draw.random() < 0.1:
            holder[
                draw.choice(["weight", "thinking", "images", "name", "tool_calls", "\ud800"])
            ] = draw.choice(ODD)
        try:
            json.dumps(found)
        except (TypeError, ValueError, RecursionError):
            break  # no JSON any more, which is what is copied above
    return found if isinstance(found, dict) else {}


@pytest.mark.parametrize("seed", range(6))
def test_every_damaged_row_ends_as_a_prompt_or_a_reason(seed: int, target: Target) -> None:
    draw = random.Random(seed)
    reader = PromptReader(target, draw.choice(["all", "last"]))
    for number in range(150):
        prompt = reader.take(number, mutated(draw.choice(ROWS), draw))
        if prompt is not None:
            assert 0 <= min(prompt.tokens) <= max(prompt.tokens) < target.vocab_size
            assert reader.pool[-1] == prompt
    assert len(reader.pool) + reader.refused == 150
    assert 20 < reader.refused < 148, "some are kept, some left out"
    assert all(reason.strip() for _, reason in reader.left_out)
    assert all(isinstance(note, str) for note in reader.notes())


@pytest.mark.parametrize("seed", range(4))
def test_every_damaged_file_is_read_or_refused_in_a_sentence(
    seed: int, target: Target, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    path = tmp_path / "p.json"
    refused = 0
    for _ in range(60):
        rows = draw.choices(ROWS, k=4)
        text = json.dumps(rows, indent=draw.choice([None, 1]))
        if draw.random() < 0.5:
            text = "\n".join(json.dumps(row) for row in rows)
        content = bytearray(text.encode(draw.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"])))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content))
            content[at : at + draw.choice([0, 1, 40])] = draw.choice(
                [b"", b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"\\", b"\\ud800", b"9" * 5000, b"[" * 9000]
            )  # fmt: skip
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        reader = PromptReader(target)
        try:
            for number, row in read_rows(str(path)):
                reader.take(number, row)
        except UserError as problem:
            assert str(path) in str(problem)  # noqa: PT017 - either outcome is right
            refused += 1
    assert refused < 60
