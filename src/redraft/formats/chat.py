"""Chat rows as people store them, turned into one shape: a list of {"role", "content"} messages.

Known shapes: `messages` (role/content), `conversations` (from/value or role/content), `prompt`
(a string), `instruction` with optional `input` and `output`, `question` with optional `answer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = dict[str, str]
SHAPES = "messages, conversations, prompt, instruction (+ input, output), question (+ answer)"
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The conversation in a row. Raises ValueError when its shape is unknown or empty."""
    if isinstance(row.get("messages"), list):
        return _turns(row["messages"], "role", "content")
    if isinstance(row.get("conversations"), list):
        turns = row["conversations"]
        if turns and isinstance(turns[0], Mapping) and "from" in turns[0]:
            return _turns(turns, "from", "value")
        return _turns(turns, "role", "content")
    if isinstance(row.get("prompt"), str):
        return _pair(row["prompt"], row.get("response", row.get("completion")))
    if isinstance(row.get("instruction"), str):
        extra = row.get("input")
        text = row["instruction"] + (f"\n\n{extra}" if extra else "")
        return _pair(text, row.get("output"))
    if isinstance(row.get("question"), str):
        return _pair(row["question"], row.get("answer"))
    raise ValueError(
        f"unknown schema with keys {', '.join(sorted(row)) or '(none)'}; known: {SHAPES}"
    )


def split_answer(messages: list[Message]) -> tuple[list[Message], Message | None]:
    """The conversation up to the last user turn, and the assistant turn after it if there is one."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]
    return messages, None


def _pair(user: str, assistant: Any) -> list[Message]:
    if not user.strip():
        raise ValueError("the prompt is empty")
    messages = [{"role": "user", "content": user}]
    if isinstance(assistant, str) and assistant:
        messages.append({"role": "assistant", "content": assistant})
    return messages


def _turns(turns: list[Any], role_key: str, text_key: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(text_key), str):
            raise ValueError(f"turn {number} has no text under '{text_key}'")
        role = str(turn.get(role_key, "")).lower()
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"turn {number} has the unknown role '{turn.get(role_key)}'")
        messages.append({"role": role, "content": str(turn[text_key])})
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("the conversation has no user turn")
    return messages
