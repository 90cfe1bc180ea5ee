"""Arguments of tool calls as an object or as text: chat templates want the one or the other.

OpenAI defines text that is JSON. Some templates join it as text; others write an object as JSON
themselves, and would quote text once more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]


def forms(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """The messages with arguments as objects, then as text."""
    for change in (as_object, as_text):
        yield [_changed(message, change) for message in messages]


def as_object(arguments: Any) -> Any:
    """Arguments as an object, if they are one or are its JSON."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments  # no JSON: the template has it unchanged
    return found if isinstance(found, dict) else arguments


def as_text(arguments: Any) -> Any:
    """Arguments as text."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def written_as_python(messages: Messages, rendered: str) -> bool:
    """Whether a rendered conversation has an object of arguments as Python writes it, which is no JSON."""
    found = (as_object(function["arguments"]) for function in _functions(messages))
    return any(isinstance(one, dict) and one and str(one) in rendered for one in found)


def written_as_text(messages: Messages, rendered: str) -> bool:
    """Whether a rendered conversation has the arguments of every call as their text."""
    return all(str(as_text(function["arguments"])) in rendered for function in _functions(messages))


def _functions(messages: Messages) -> Iterator[dict[str, Any]]:
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    functions = (call.get("function") for call in calls if isinstance(call, dict))
    yield from (one for one in functions if isinstance(one, dict) and "arguments" in one)


def _changed(message: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": form(function["arguments"])}}
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message
