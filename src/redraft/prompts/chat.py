"""Rows as people store them, turned into one shape: a conversation, or text or tokens taken unchanged.

The names of columns are in `columns.py`, turns in `messages.py`, rows of tokens in `masks.py`. Lines of
redraft's answers files are rows too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import columns, masks
from .columns import is_text
from .messages import Message, in_order, messages_of, plain, unread_keys

SHAPES = (
    "messages, conversations, prompt, instruction (+ input, output), question (+ answer), query, problem, "
    "chosen, text, input_ids (+ loss_mask, labels)"
)
STRICT = ("messages", "conversations")
"""Columns that are conversations, whatever they hold; others of such a name may be a number or an id."""
TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
"""Turns of a conversation in one text, as in Anthropic's preference data."""


@dataclass(frozen=True)
class Understood:
    """What a row was understood to be: `messages` (with `tools`), or `text`, or `tokens`.

    `answer` are the tokens of the answer, where the row marked them. `unread` names the columns with
    text that may belong to the question and was not read. `variables` are those that the row gives the
    chat template (`chat_template_kwargs`).
    """

    shape: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    answer: tuple[int, ...] | None = None
    unread: tuple[str, ...] = ()
    variables: dict[str, Any] | None = None


def understand(row: Mapping[str, Any]) -> Understood:
    """What a row holds. Raises ValueError when its shape is unknown, empty or out of order."""
    try:
        found = _understood({str(key): value for key, value in row.items() if value is not None})
        json.dumps([found.text, found.messages, found.tools], ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair, which is no character") from None
    except RecursionError:
        raise ValueError("the row is nested too deeply") from None


def _understood(row: Mapping[str, Any]) -> Understood:
    if media := next((key for key in row if columns.MEDIA.fullmatch(key) and row[key]), None):
        raise ValueError(
            f"the row has more than text (column {media}), and the target is asked in text"
        )
    if "input_ids" in row:
        tokens, answer = masks.split(row)
        return Understood("input_ids", tokens=tokens, answer=answer)
    prompt = row.get("prompt")
    if "tokens" in row and isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return _answered(row)
    asked = next(_asked(row), None)
    if asked is not None:
        return _conversation(row, asked)
    if is_text(row.get("text")):
        rest = columns.unread(row, ("text",), (row["text"],))
        return Understood("text", text=row["text"], unread=tuple(rest))
    if empty := next(
        (key for key in (*columns.QUESTIONS, "text") if isinstance(row.get(key), str)), None
    ):
        raise ValueError(f"the {empty} is empty")
    raise ValueError(
        f"unknown schema with keys {', '.join(sorted(row))[:300] or '(none)'}; known: {SHAPES}"
    )


def _asked(row: Mapping[str, Any]) -> Iterator[str]:
    """The columns that may hold what is asked, the best first."""
    for name in columns.CONVERSATIONS:
        if isinstance(row.get(name), list) or (name in row and name in STRICT):
            yield name
    for name in columns.QUESTIONS:
        value = row.get(name)
        if (is_text(value) or (value and isinstance(value, list | Mapping))) and (
            name != "user" or "assistant" in row
        ):
            yield name
    if row.get("chosen"):
        yield "chosen"


def _conversation(row: Mapping[str, Any], asked: str) -> Understood:
    used = {asked}
    turns = _turns(asked, row[asked])
    messages = messages_of(turns)
    if isinstance(row[asked], str) and len(turns) == 1:
        text = turns[0]["content"]
        for name in columns.CONTEXTS:
            if name != asked and (context := _joined(row.get(name))):
                used.add(name)
                text += "" if context in text else f"\n\n{context}"
        messages = [{"role": "user", "content": text}]
    if (history := _history(row.get("history"))) and asked not in columns.CONVERSATIONS:
        used.add("history")
        messages = [*history, *messages]
    if asked != "chosen" and messages and messages[-1]["role"] != "assistant":
        messages, name = _with_answer(row, asked, messages)
        used.add(name)
    for name in columns.SYSTEMS:
        if is_text(row.get(name)) and not (messages and messages[0]["role"] == "system"):
            used.add(name)
            messages = [{"role": "system", "content": row[name]}, *messages]
    while messages and messages[-1].get("weight") == 0:
        messages.pop()  # an answer that is not to be learned, and context of nothing
    for name in columns.TOOLS:
        tools = _tools(name, row.get(name))
        if tools is not None:
            break
    texts = [message["content"] for message in messages]
    if "text" in row and all(text.strip() in str(row["text"]) for text in texts):
        used.add("text")  # the whole row, rendered
    rest = [*columns.unread(row, {*used, *columns.TOOLS, columns.VARIABLES}, texts)]
    if isinstance(row[asked], list):
        within = {key for keys in unread_keys(turns) for key in columns.unread(keys, (), texts)}
        rest += [f"{asked}[].{key}" for key in sorted(within)]
    return Understood(
        asked, in_order(messages), tools, unread=tuple(rest), variables=_variables(row)
    )


def _variables(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of the chat template, as an object or as its JSON text."""
    given = row.get(columns.VARIABLES)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as problem:
            raise ValueError(f"{columns.VARIABLES} is no JSON: {problem}") from None
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{columns.VARIABLES} is no object but {type(given).__name__}")
    return {str(name): value for name, value in (given or {}).items() if value is not None} or None


def _turns(name: str, value: Any) -> list[Any]:
    """The turns in a column: a list of them, one, or a text; or a transcript, or several questions."""
    if isinstance(value, str) and name in columns.CONVERSATIONS and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is text that is not JSON") from None
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list) and name == "turns" and all(isinstance(turn, str) for turn in value):
        return [{"role": "user", "content": turn} for turn in value]
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or name in columns.CONVERSATIONS:
        raise ValueError(f"{name} is not a list of turns but {type(value).__name__}")
    if turns := _transcript(value):
        return turns
    if name == "chosen":
        raise ValueError("chosen is an answer, and no column has its prompt")
    return [{"role": "user", "content": value}]


def _transcript(text: str) -> list[Message]:
    """The turns of a transcript (Human: ... Assistant: ...); none of any other text."""
    begin, *parts = TRANSCRIPT.split(text.lstrip())
    if begin or "Assistant" not in parts[::2]:
        return []
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns if turns[-1]["content"] else turns[:-1]


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _with_answer(
    row: Mapping[str, Any], asked: str, messages: list[Message]
) -> tuple[list[Message], str]:
    """The messages with the answer in the row, if one is found, and the column it is in."""
    for name in columns.ANSWERS:
        if asked in columns.CONVERSATIONS and name in ("answer", "answers", "solution"):
            continue  # short results, as benchmarks have them
        if reply := messages_of(_reply(name, row.get(name))):
            whole = reply[0]["role"] != "assistant"  # it begins with the question again
            return (reply if whole else [*messages, *reply]), name
    return messages, ""


def _reply(name: str, value: Any) -> list[Any]:
    """The turns of an answer in a column; none where it has none."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]  # SQuAD's answers
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]
    if is_text(value):
        transcript = _transcript(value) if name == "chosen" else []
        return transcript or [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, Mapping) else value
    return turns if isinstance(turns, list) and all(_is_turn(turn) for turn in turns) else []


def _joined(context: Any) -> str:
    """A context as text; a list of texts is several passages."""
    parts = context if isinstance(context, list) else [context]
    return "\n\n".join(part.strip("\n") for part in parts) if all(map(is_text, parts)) else ""


def _history(history: Any) -> list[Message]:
    """Earlier turns, as LLaMA-Factory has them: a list of pairs of a question and its answer, or of turns."""
    if not isinstance(history, list):
        return []
    if all(isinstance(turn, Mapping) for turn in history):
        return messages_of(history)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        return []
    roles = ("user", "assistant")
    return messages_of(
        [
            {"role": r, "content": text}
            for pair in history
            for r, text in zip(roles, pair, strict=True)
        ]
    )


def _answered(row: Mapping[str, Any]) -> Understood:
    """A line of an answers file of redraft's."""
    if not isinstance(row["tokens"], list) or not isinstance(row.get("length"), int):
        raise ValueError("tokens and length are not those of an answer record")
    prompt = masks.token_ids("prompt", row["prompt"])
    answer = masks.token_ids("tokens", row["tokens"])[: row["length"]]
    return Understood("answer", tokens=prompt, answer=answer or None)


def _tools(name: str, tools: Any) -> tuple[dict[str, Any], ...] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is text that is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{name} is not a list of objects")
    if name == "functions":  # OpenAI's older name, without the wrapping
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tuple(plain(dict(tool)) for tool in tools)
