"""The turns of a conversation as people store them, turned into the messages that chat templates read.

OpenAI's role and content, ShareGPT's from and value; tool calls and their results; parts of text and of
reasoning. Raises ValueError naming the turn and what in it is not understood.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .columns import MEDIA, PLACEHOLDER

Message = dict[str, Any]
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot"), "assistant"
    ),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "call"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Where chat templates look for what an assistant thought: each in one of these."""
THOUGHTS = ("thinking", "reasoning")
"""Types of the parts of a message that are no part of its text."""
WEIGHTS = ("weight", "train", "loss")
"""Keys by which a turn says whether it is learned (OpenAI, axolotl, ms-swift)."""
READ = {
    "role",
    "from",
    "content",
    "value",
    "text",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
}
READ |= {*REASONING, *WEIGHTS}
"""The keys of a turn that are understood."""


def messages_of(turns: list[Any]) -> list[Message]:
    """The messages that a list of turns is."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is no object")
        try:
            message = _message(plain(turn))
        except ValueError as problem:
            raise ValueError(f"turn {number} {problem}") from None
        if message.pop("continues", False) and messages and messages[-1]["role"] == "assistant":
            calls = messages[-1].get("tool_calls", [])
            messages[-1]["tool_calls"] = [*calls, *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def plain(value: Any) -> Any:
    """As JSON has it, without the keys whose value is null, which Parquet gives every object of a column."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"holds a value of type {type(value).__name__}, which is not JSON")


def in_order(messages: list[Message]) -> tuple[Message, ...]:
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


def _message(turn: Mapping[str, Any]) -> Message:
    given = turn.get("role", turn.get("from", ""))
    role = ROLES.get(str(given).strip().lower())
    if role is None:
        raise ValueError(f"has the unknown role {str(given)[:60]!r}")
    if media := next((key for key in turn if MEDIA.fullmatch(key) and turn[key]), None):
        raise ValueError(f"has more than text (under '{media}'), and the target is asked in text")
    key = next((key for key in ("content", "value", "text") if key in turn), "content")
    if role == "call":
        calls = _calls(_from_json(turn.get(key), "is a tool call that is not JSON"))
        return {"role": "assistant", "content": "", "tool_calls": calls, "continues": True}
    text, thought = _read(turn.get(key), role)
    message: Message = {"role": role, "content": text or ""}
    if role == "assistant":
        thought = thought or next((t for n in REASONING if isinstance(t := turn.get(n), str)), "")
        message |= dict.fromkeys(REASONING, thought) if thought else {}
        if given := turn.get("tool_calls") or turn.get("function_call"):
            message["tool_calls"] = _calls(_from_json(given, "has tool calls that are not JSON"))
        if any(name in turn and _is_zero(turn[name]) for name in WEIGHTS):
            message["weight"] = 0
    message |= {name: turn[name] for name in ("tool_call_id", "name") if turn.get(name)}
    if text is None and "tool_calls" not in message:
        raise ValueError(f"has no text under '{key}'")
    if role == "user" and (found := PLACEHOLDER.search(message["content"])):
        raise ValueError(f"has {found[0]}, which stands for more than text")
    return message


def _read(content: Any, role: str) -> tuple[str | None, str]:
    """The text and the reasoning of a message: a string, or a list of parts."""
    if isinstance(content, str):
        return content, ""
    parts = [content] if isinstance(content, Mapping) else content
    if role == "tool" and content is not None and not _are_parts(parts):
        return json.dumps(content, ensure_ascii=False), ""  # a result as the tool gave it
    if not isinstance(parts, list) or not parts:
        return None, ""
    found = [_part(part) for part in parts]
    text = "".join(text for kind, text in found if kind not in THOUGHTS)
    return text, "".join(text for kind, text in found if kind in THOUGHTS)


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, Mapping) and ("type" in part or set(part) == {"text"}) for part in value
    )


def _part(part: Any) -> tuple[str, str]:
    """The kind of a part, and its text."""
    if isinstance(part, str):
        return "text", part
    kind, value = type(part).__name__, None
    if isinstance(part, Mapping):
        kind = str(part.get("type", "text"))
        if kind in THOUGHTS:
            value = next((part[key] for key in (*THOUGHTS, "text") if key in part), None)
            value = _read(value, "")[0]  # which may be in parts of its own
        elif kind in ("text", "input_text", "output_text"):
            value = part.get("text")
    if not isinstance(value, str):
        raise ValueError(f"holds a part of type {kind[:60]!r}, which is not text")
    return kind, value


def _from_json(value: Any, otherwise: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return plain(json.loads(value))
    except (ValueError, RecursionError):
        raise ValueError(otherwise) from None


def _calls(given: Any) -> list[Message]:
    """Tool calls as OpenAI has them; their arguments stay text or object, see `tool_calls.py`."""
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("has a tool call without the name of a function")
        if not isinstance(function.get("arguments", {}), str | Mapping):
            raise ValueError("has a tool call whose arguments are neither an object nor text")
        rest = call if "function" in call else {"type": "function"}
        calls.append({**rest, "function": dict(function)})
    return calls


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def unread_keys(turns: list[Any]) -> Iterator[dict[str, Any]]:
    """What each turn has under keys that are not understood."""
    for turn in turns:
        yield {key: value for key, value in turn.items() if key not in READ}
