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
TEXTS = {"text": ("text", "value"), "input_text": ("text",), "output_text": ("text",)}
"""Types of the parts that are text, and the keys it is under."""
CALLS = ("tool_call", "tool_use", "function_call")
"""Types of the parts that are tool calls."""
WEIGHTS = ("weight", "train", "loss", "loss_weight")
"""Keys that mark whether a turn is learned (OpenAI, axolotl, ms-swift, LLaMA-Factory)."""
READ = {"role", "from", "content", "value", "text", "name", *REASONING, *WEIGHTS}
READ |= {"tool_calls", "function_call", "tool_call_id"}
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
    text, thought, calls = _read(turn.get(key), role)
    message: Message = {"role": role, "content": text or ""}
    if role == "assistant":
        thought = thought or next((t for n in REASONING if isinstance(t := turn.get(n), str)), "")
        message |= dict.fromkeys(REASONING, thought) if thought else {}
        if given := turn.get("tool_calls") or turn.get("function_call"):
            calls = _calls(_from_json(given, "has tool calls that are not JSON"))
        message |= {"tool_calls": calls} if calls else {}
        if any(name in turn and _is_zero(turn[name]) for name in WEIGHTS):
            message["weight"] = 0
    message |= {name: turn[name] for name in ("tool_call_id", "name") if turn.get(name)}
    if text is None and "tool_calls" not in message:
        raise ValueError(f"has no text under '{key}'")
    if role == "user" and (found := PLACEHOLDER.search(message["content"])):
        raise ValueError(f"has {found[0]}, which stands for more than text")
    return message


def _read(content: Any, role: str) -> tuple[str | None, str, list[Message]]:
    """The text, the reasoning and the tool calls of a message: a string, or a list of parts."""
    if isinstance(content, str):
        return content, "", []
    parts = [content] if isinstance(content, Mapping) else content
    if role == "tool" and content is not None and not _are_parts(parts):
        return json.dumps(content, ensure_ascii=False), "", []  # a result as the tool gave it
    if not isinstance(parts, list) or not parts:
        return None, "", []
    calls = [call for part in parts if _kind(part) in CALLS for call in _call_of(part)]
    found = [(_kind(part), _text_of(part)) for part in parts if _kind(part) not in CALLS]
    text = "".join(text for kind, text in found if kind not in THOUGHTS)
    return text, "".join(text for kind, text in found if kind in THOUGHTS), calls


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, Mapping) and ("type" in part or set(part) == {"text"}) for part in value
    )


def _kind(part: Any) -> str:
    return str(part.get("type", "text")) if isinstance(part, Mapping) else type(part).__name__


def _text_of(part: Any) -> str:
    """The text of a part, or the thought in it."""
    kind, value = _kind(part), part
    if isinstance(part, Mapping):
        names = TEXTS.get(kind, (*THOUGHTS, "text", "value") if kind in THOUGHTS else ())
        value = next((part[name] for name in names if name in part), None)
        value = _read(value, "")[0] if kind in THOUGHTS else value  # a thought may be in parts
    if not isinstance(value, str):
        raise ValueError(f"holds a part of type {kind[:60]!r}, which is not text")
    return value


def _call_of(part: Mapping[str, Any]) -> list[Message]:
    if "value" in part:  # as LLaMA-Factory has it
        return _calls(_from_json(part["value"], "has a tool call that is not JSON"))
    arguments = part.get("input", part.get("arguments", {}))  # as Anthropic has it
    call = {"type": "function", "function": {"name": part.get("name"), "arguments": arguments}}
    return _calls({"id": part["id"], **call} if "id" in part else call)


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
