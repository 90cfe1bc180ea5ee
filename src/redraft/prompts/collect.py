"""`redraft prompts collect`: prompts for the next adaptation from the logs of a service, of people who agreed, without secrets.

A row is used if its consent field says so, if it was answered by the model that is asked for, and if no credential and no mark
of a person is found in any of its messages; else it is left out whole. What is written holds the messages (and tools), and
nothing else of the row. Rows that are in the file already are not added again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.console import Waiting
from ..core.errors import UserError
from ..core.files import append_lines, finish_lines
from ..core.lock import held
from .chat import Understood, understand
from .rows import DECODER, read_rows
from .secrets import secrets_in

BATCH = 256
"""Rows that are written at a time."""
BEGINNING = b'{"id": "'
"""Of every row that is written."""
CHAT = ("messages", "conversations", "prompt", "tools")
"""The columns that are read of a row; others may be of the person who asked."""
WORDLESS = ("content", "role")
"""Names of texts that say nothing of what the text is."""


@dataclass(frozen=True)
class Collected:
    """What became of a log's rows: `added` to `out`, which then holds `held`; the others by the reason why not."""

    out: str
    added: int
    held: int
    left_out: dict[str, int]


def collect(
    log: str,
    out: Path,
    *,
    consent: str | None,
    everyone_agreed: bool = False,
    model: str | None = None,
    most: int | None = None,
) -> Collected:
    """Add the rows of `log` that may be used to `out`, up to `most` in all.

    `consent` is FIELD=VALUE: a field by its dotted name, and what it holds in rows that may be used. A row is a chat (`messages`,
    `conversations`, or `prompt` and `response`), or a request of an OpenAI-style API with its response ({"request": ..., "response": ...}). Raises
    UserError where neither `consent` nor `everyone_agreed` is given, and for a file that is not of this function.
    """
    agreed = _consent(consent, everyone_agreed)
    with held(out):
        known = _known(out)
        before, lines, why = len(known), [], Counter[str]()
        with Waiting("collecting") as waiting:
            for at, row in read_rows(log):
                waiting.tick(at, "rows")
                if most is not None and len(known) >= most:
                    break
                found = _usable(row, agreed, model)
                if isinstance(found, str):
                    why[found] += 1
                    continue
                if found["id"] in known:
                    why["there already"] += 1
                    continue
                known.add(found["id"])
                lines.append(json.dumps(found, ensure_ascii=False))
                if len(lines) == BATCH:
                    append_lines(out, lines)
                    lines = []
        if lines:
            append_lines(out, lines)
    return Collected(str(out), len(known) - before, len(known), dict(why.most_common()))


def _usable(row: Any, agreed: tuple[str, str] | None, model: str | None) -> dict[str, Any] | str:
    """The row to write, or why there is none."""
    if not isinstance(row, Mapping):
        return "not understood"
    if agreed is not None and not _agrees(row, *agreed):
        return "no consent"
    if model is not None and _model_of(row) != model:
        return "another model"
    try:
        found = understand(_chat_of(row))
    except ValueError:
        return "not understood"
    if not found.messages:
        return "no chat"
    written = _written(found)
    chat = {key: value for key, value in written.items() if key != "id"}
    for text in _texts(chat):
        for kind in secrets_in(text):
            return f"secret: {kind}"
    return written


def _consent(given: str | None, everyone: bool) -> tuple[str, str] | None:
    if (given is None) == (not everyone):
        raise UserError(
            "whose rows may be used? Name the field that says so with --consent FIELD=VALUE (metadata.training=true), or say "
            "--everyone-agreed"
        )
    if given is None:
        return None
    field, sign, value = given.partition("=")
    if not (field and sign and value):
        raise UserError(f"--consent takes FIELD=VALUE, as metadata.training=true; got '{given}'")
    return field, value


def _agrees(row: Mapping[str, Any], field: str, value: str) -> bool:
    """Whether a field holds a value; one that is not there holds none."""
    found: Any = row
    for name in field.split("."):
        found = _opened(found)
        if not isinstance(found, Mapping) or name not in found:
            return False
        found = found[name]
    if isinstance(found, bool) or found is None:
        found = json.dumps(found)
    return isinstance(found, str | int | float) and str(found) == value


def _opened(value: Any) -> Any:
    """A value, or what its text is as JSON; of an object that has a key twice, the text."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return DECODER.decode(value.strip())
        except (ValueError, RecursionError):
            return value
    return value


def _model_of(row: Mapping[str, Any]) -> Any:
    """The model that was asked."""
    request = _opened(row.get("request"))
    return (request if isinstance(request, Mapping) else row).get("model")


def _chat_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The chat of a row, as prompts files hold it, without all else that the row holds."""
    request = _opened(row.get("request"))
    if not isinstance(request, Mapping):
        return {key: row[key] for key in (*CHAT, "response", "completion") if key in row}
    reply = _opened(row.get("response"))
    if isinstance(reply, Mapping):
        choices = reply.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        reply = first.get("message", first.get("text")) if isinstance(first, Mapping) else None
    chat = {key: request[key] for key in CHAT if key in request}
    return {**chat, **({"response": reply} if reply else {})}


def _texts(value: Any, name: str = "") -> Iterator[str]:
    """All texts in what is written, with the names that they stand under; also those in texts of JSON."""
    value = _opened(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, name)
    elif isinstance(value, str):
        yield value if name in WORDLESS else f"{name} = '{value}'"
        if name not in WORDLESS:
            yield value


def _written(found: Understood) -> dict[str, Any]:
    chat: dict[str, Any] = {"messages": [_message(dict(message)) for message in found.messages]}
    if found.tools:
        chat["tools"] = list(found.tools)
    text = json.dumps(chat, sort_keys=True, ensure_ascii=False, default=str)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], **chat}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """What a model is given of a message: not who wrote it, nor what else a log keeps with a call."""
    if message["role"] != "tool":
        message.pop("name", None)
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_call(dict(call)) for call in calls]
    return message


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return {key: call[key] for key in ("id", "type") if key in call}
    kept = {key: function[key] for key in ("name", "arguments") if key in function}
    return {**{key: call[key] for key in ("id", "type") if key in call}, "function": kept}


def _known(out: Path) -> set[str]:
    """The ids of the rows in a file, whose last line is cut off where it is not whole."""
    if not out.is_file():
        return set()
    found = set()
    *lines, rest = out.read_bytes().split(b"\n")
    ours = not rest or _is_row(rest) or rest.startswith(BEGINNING[: len(rest)])
    for number, line in enumerate([*lines, *([] if ours else [rest])], 1):
        if not _is_row(line):
            raise UserError(
                f"{out}, line {number}: no row of redraft prompts collect; name another file with --out"
            )
        found.add(json.loads(line)["id"])
    finish_lines(out, _is_row)
    if _is_row(rest):
        found.add(json.loads(rest)["id"])
    return found


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("id"), str) and "messages" in row
