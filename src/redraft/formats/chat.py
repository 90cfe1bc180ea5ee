"""Rows as people store them, turned into one shape: a conversation, or text or tokens taken as they are.

Known shapes: `messages` and `conversations` (role/content or from/value), `prompt` (text or messages),
`instruction` with optional `input` and `output`, `question` with optional `answer`, `text` (rendered
already), pre-tokenised `input_ids` with optional `loss_mask`, and lines of redraft's answers files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
SHAPES = (
    "messages, conversations, prompt, instruction (+ input, output), question (+ answer), text, "
    "input_ids (+ loss_mask)"
)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
EXTRAS = ("tool_calls", "tool_call_id", "name", "thinking", "reasoning_content")
"""What a message may carry beside role and content, handed to the chat template as it is."""


@dataclass(frozen=True)
class Understood:
    """What a row was understood to be: `messages` (with `tools`), or `text`, or `tokens`.

    `supervised` marks the tokens that are answers, where the row said so.
    """

    shape: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    supervised: tuple[bool, ...] | None = None


def understand(row: Mapping[str, Any]) -> Understood:
    """What a row holds. Raises ValueError when its shape is unknown, empty or out of order."""
    row = {key: value for key, value in row.items() if value is not None}
    if "input_ids" in row:
        return _tokenised(row)
    prompt = row.get("prompt")
    if "tokens" in row and isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return _answered(row)
    for shape in ("messages", "conversations"):
        if shape in row and not isinstance(row[shape], list):
            raise ValueError(f"{shape} is not a list of turns but {type(row[shape]).__name__}")
    for shape in ("messages", "conversations", "prompt"):
        if isinstance(row.get(shape), list):
            answer = row.get("completion", row.get("response")) if shape == "prompt" else None
            turns = [*row[shape], *(answer if isinstance(answer, list) else ())]
            messages = _turns(turns)
            if isinstance(answer, str) and answer:
                messages.append({"role": "assistant", "content": answer})
            return Understood(shape, _in_order(_with_system(row, messages)), _tools(row))
    if isinstance(row.get("prompt"), str):
        return _pair(row, "prompt", row["prompt"], row.get("response", row.get("completion")))
    if isinstance(row.get("instruction"), str):
        extra = row.get("input")
        text = row["instruction"] + (f"\n\n{extra}" if extra else "")
        return _pair(row, "instruction", text, row.get("output"))
    if isinstance(row.get("question"), str):
        return _pair(row, "question", row["question"], row.get("answer"))
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise ValueError("the text is empty")
        return Understood("text", text=row["text"])
    raise ValueError(
        f"unknown schema with keys {', '.join(sorted(row)) or '(none)'}; known: {SHAPES}"
    )


def last_supervised(supervised: tuple[bool, ...]) -> tuple[int, int]:
    """Begin and end of the last run of supervised tokens. Raises ValueError when there is none."""
    if not any(supervised):
        raise ValueError("loss_mask marks no token, so nothing says where the answer begins")
    end = len(supervised) - supervised[::-1].index(True)
    begin = end
    while begin and supervised[begin - 1]:
        begin -= 1
    return begin, end


def _tokenised(row: Mapping[str, Any]) -> Understood:
    tokens, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(tokens, list) or not tokens or not all(type(t) is int for t in tokens):
        raise ValueError("input_ids is not a list of token ids")
    if mask is not None and (not isinstance(mask, list) or len(mask) != len(tokens)):
        raise ValueError(f"loss_mask does not mark each of the {len(tokens)} input_ids")
    supervised = None if mask is None else tuple(bool(m) for m in mask)
    return Understood("input_ids", tokens=tuple(tokens), supervised=supervised)


def _answered(row: Mapping[str, Any]) -> Understood:
    """A line of an answers file of redraft's."""
    if not isinstance(row["tokens"], list) or not isinstance(row.get("length"), int):
        raise ValueError("tokens and length are not those of an answer record")
    prompt, said = row["prompt"], row["tokens"][: row["length"]]
    found = _tokenised({"input_ids": [*prompt, *said]})
    marks = (False,) * len(prompt) + (True,) * len(said)
    return Understood("answer", tokens=found.tokens, supervised=marks)


def _pair(row: Mapping[str, Any], shape: str, user: str, assistant: Any) -> Understood:
    if not user.strip():
        raise ValueError("the prompt is empty")
    messages: list[Message] = [{"role": "user", "content": user}]
    if isinstance(assistant, str) and assistant:
        messages.append({"role": "assistant", "content": assistant})
    return Understood(shape, _in_order(_with_system(row, messages)), _tools(row))


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system", row.get("system_prompt"))
    if isinstance(system, str) and system and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as problem:
            raise ValueError(f"tools is text that is not JSON: {problem.msg}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("tools is not a list of objects")
    return tuple(_given(dict(tool)) for tool in tools)


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, which chat templates write as JSON themselves."""
    call = _given(call)
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except json.JSONDecodeError:
            return call  # no JSON: the template has it as it is
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def _given(value: Any) -> Any:
    """Without the keys whose value is null, which Parquet gives every object of a column."""
    if isinstance(value, Mapping):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def _turns(turns: list[Any]) -> list[Message]:
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is no object")
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        role = str(turn.get(role_key, "")).lower()
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"turn {number} has the unknown role '{turn.get(role_key)}'")
        extras = {key: turn[key] for key in EXTRAS if turn.get(key)}
        if "tool_calls" in extras:
            extras["tool_calls"] = [_call(call) for call in extras["tool_calls"]]
        text = _text(turn.get(text_key))
        if text is None and "tool_calls" not in extras:
            raise ValueError(f"turn {number} has no text under '{text_key}'")
        messages.append({"role": role, "content": text or "", **extras})
    return messages


def _text(content: Any) -> str | None:
    """A message's text: a string, or the text parts of a list of parts."""
    if isinstance(content, list):
        parts = [p.get("text") for p in content if isinstance(p, Mapping)]
        if len(parts) < len(content) or not all(isinstance(part, str) for part in parts):
            raise ValueError("a turn holds parts that are not text (images, audio)")
        return "".join(str(part) for part in parts)
    return content if isinstance(content, str) else None


def _in_order(messages: list[Message]) -> tuple[Message, ...]:
    """The messages, if a chat can go that way. Raises ValueError naming the turn that cannot."""
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("the conversation has no user turn")
    follows = {
        "system": ("start",),
        "user": ("start", "system", "assistant", "user"),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    before = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in follows[role]:
            raise ValueError(f"turn {number} is out of order: {role} after {before}")
        before = role
    return tuple(messages)
