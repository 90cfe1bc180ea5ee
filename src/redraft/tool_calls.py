"""Arguments of tool calls as an object or as text: chat templates want the one or the other.

OpenAI defines text that is JSON. Some templates join it as text; others write an object as JSON
themselves, and would quote text once more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]


def with_arguments(messages: Messages, form: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The messages with the arguments of each tool call in another form."""
    return [
        {**message, "tool_calls": [_changed(call, form) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


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
    """Whether a rendered conversation holds an object of arguments as Python writes it, which is no JSON."""
    found = (as_object(arguments) for arguments in _arguments(messages))
    return any(isinstance(one, dict) and one and str(one) in rendered for one in found)


def written_as_text(messages: Messages, rendered: str) -> bool:
    """Whether a rendered conversation holds the arguments of every tool call as their text."""
    return all(str(as_text(arguments)) in rendered for arguments in _arguments(messages))


def _arguments(messages: Messages) -> Iterator[Any]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                yield function["arguments"]


def _changed(call: Any, form: Callable[[Any], Any]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": form(function["arguments"])}}
