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
from .rows import read_rows
from .secrets import secrets_in

BATCH = 256
"""Rows that are written at a time."""


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

    `consent` is FIELD=VALUE: a field by its dotted name, and what it holds in rows that may be used. A row is a chat as
    prompts files hold it, or a request of an OpenAI-style API with its response ({"request": ..., "response": ...}). Raises
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
    for text in _texts(found):
        for kind in secrets_in(text):
            return f"secret: {kind}"
    return _written(found)


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
    found = _field(row, field)
    if isinstance(found, bool) or found is None:
        found = json.dumps(found)
    return isinstance(found, str | int | float) and str(found) == value


def _field(row: Any, dotted: str) -> Any:
    """A field by its dotted name; None where there is none. JSON in text is looked into."""
    for name in dotted.split("."):
        row = _opened(row)
        if not isinstance(row, Mapping):
            return None
        row = row.get(name)
    return row


def _opened(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _model_of(row: Mapping[str, Any]) -> Any:
    """The model that was asked."""
    asked = _field(row, "request.model")
    return row.get("model") if asked is None else asked


def _chat_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as prompts files hold it."""
    request = _opened(row.get("request"))
    if not isinstance(request, Mapping):
        return row
    reply = _opened(row.get("response"))
    if isinstance(reply, Mapping):
        choices = reply.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        reply = first.get("message", first.get("text")) if isinstance(first, Mapping) else None
    chat = {key: request[key] for key in ("messages", "prompt", "tools") if key in request}
    return {**chat, **({"response": reply} if reply else {})}


def _texts(found: Understood) -> Iterator[str]:
    """All texts of it: what was said, and what tools are, were asked and replied."""
    for message in found.messages:
        yield str(message.get("content") or "")
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        if rest:
            yield json.dumps(rest, ensure_ascii=False, default=str)
    if found.tools:
        yield json.dumps(found.tools, ensure_ascii=False, default=str)


def _written(found: Understood) -> dict[str, Any]:
    chat: dict[str, Any] = {"messages": [dict(message) for message in found.messages]}
    if found.tools:
        chat["tools"] = list(found.tools)
    text = json.dumps(chat, sort_keys=True, ensure_ascii=False, default=str)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], **chat}


def _known(out: Path) -> set[str]:
    """The ids of the rows in a file, whose last line is cut off where it is not whole."""
    if not out.is_file():
        return set()
    finish_lines(out, _is_row)
    found = set()
    for number, line in enumerate(out.read_bytes().splitlines(), 1):
        if not _is_row(line):
            raise UserError(
                f"{out}, line {number}: no row of redraft prompts collect; name another file with --out"
            )
        found.add(json.loads(line)["id"])
    return found


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("id"), str) and "messages" in row
