"""A server's reply: the JSON that it is, or one of the ways in which a request fails.

Failures are of four kinds, by what to do about them. `Trouble` may pass. `Busy` passes when its time
is up. `Refused` would be the same again. `Unable` is the server's and would be so for any prompt.
Text of a server is shown without the API key and with its control characters escaped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from ..core.visible import visible
from .key_blanking import SECRET, blanked

LONGEST_WAIT = 3600.0
"""A server that asks for a longer pause than this, in seconds, is asked again after it."""
MAY_PASS = (408, 409, 425, 429)
"""Statuses below 500 that are not about the request itself."""


class EndpointError(Exception):
    """What went wrong with one request; the text fits behind the server's URL."""


class Trouble(EndpointError):
    """Asking again may help. `reached` is whether the server took the request at all."""

    def __init__(self, text: str, reached: bool = True):
        super().__init__(text)
        self.reached = reached


class Busy(Trouble):
    """The server takes no more for now; `wait` is the pause it asks for, in seconds."""

    def __init__(self, text: str, wait: float | None = None):
        super().__init__(text)
        self.wait = wait


class Refused(EndpointError):
    """The server will not do this; the same request would be refused again."""

    def __init__(self, status: int, text: str):
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class Unable(EndpointError):
    """The server lacks what the run needs."""


@dataclass(frozen=True)
class Reply:
    """A whole reply to a request that was sent with `key`. `pause` is its Retry-After header."""

    status: int
    text: str
    pause: str | None = None
    key: str | None = field(default=None, repr=False)

    @property
    def reason(self) -> str:
        """The sentence inside an error, fit to be shown."""
        return message_of(self.text, self.key)

    def json(self) -> dict[str, Any] | None:
        """The JSON object that it is, without the key; None for anything else."""
        return object_of(self.text, self.key)

    def content(self) -> dict[str, Any]:
        """The JSON object of a request that went well. Raises an EndpointError for any other."""
        status = self.status
        if status == 429 or (status == 503 and self.pause is not None):
            raise Busy(f"is busy (HTTP {status}: {self.reason})", seconds(self.pause))
        if status >= 500 or status in MAY_PASS:
            raise Trouble(f"failed with HTTP {status}: {self.reason}")
        if status != 200:
            raise Refused(status, self.reason)
        content = self.json()
        if content is None:
            beginning = shown(self.text, self.key, 80)
            raise Trouble(f"replied with something that is no JSON object: '{beginning}'")
        return content


def seconds(text: str | None) -> float | None:
    """A Retry-After header in seconds from now; None where there is none that can be read."""
    if text is None:
        return None
    try:
        wait = float(text)
    except ValueError:
        try:
            when = parsedate_to_datetime(text)
        except (TypeError, ValueError):
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        wait = (when - datetime.now(timezone.utc)).total_seconds()
    return min(max(wait, 0.0), LONGEST_WAIT) if wait == wait else None


def text_of(content: bytes) -> str:
    """A reply as text: UTF-8, as JSON is, whatever its header names."""
    return content.decode("utf-8-sig", "replace")


def object_of(text: str, key: str | None) -> dict[str, Any] | None:
    """The JSON object that a reply is, without the key in its strings; None for anything else."""
    try:
        content = json.loads(text)
        if isinstance(content, dict) and (
            "\\ud" in text.lower() or (key and len(key) >= SECRET and blanked(text, key) != text)
        ):
            content = _tidied(content, key if key and len(key) >= SECRET else None)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _tidied(value: Any, key: str | None) -> Any:
    """JSON without the key and without halves of characters, which cannot be written anywhere."""
    if isinstance(value, dict):
        return {_tidied(name, key): _tidied(each, key) for name, each in value.items()}
    if isinstance(value, list):
        return [_tidied(each, key) for each in value]
    if isinstance(value, str):
        return blanked(value.encode("utf-8", "replace").decode(), key)
    return value


def message_of(text: str, key: str | None = None) -> str:
    """The sentence inside an OpenAI-style error, else the beginning of the text, fit to be shown."""
    content = object_of(text, None)
    if content is None:
        return shown(text, key, 120) or "no reason given"
    error = content.get("error", content)
    if isinstance(error, dict):
        error = error.get("message", error.get("detail", error))
    return shown(str(error), key)


def shown(text: str, key: str | None, most: int = 300) -> str:
    """The beginning of a server's text on one line, without the key and with nothing a terminal obeys."""
    return visible(blanked(" ".join(text.split()), key)[:most])


def models_of(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The models of a /v1/models reply by name. Raises Trouble for what is no such list."""
    listed = content.get("data")
    if not isinstance(listed, list) or not all(
        isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed
    ):
        raise Trouble("listed its models in no known form")
    return {m["id"]: m for m in listed}


def first_choice(content: dict[str, Any]) -> dict[str, Any]:
    """The one completion in a reply. Raises Trouble when there is none."""
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        fields = visible(", ".join(content))[:100]
        raise Trouble(f"replied without a completion (fields: {fields or 'none'})")
    found: dict[str, Any] = choices[0]
    return found


def finish_of(choice: dict[str, Any]) -> str:
    """How a completion ended, 'stop' or 'length'. Raises Trouble for one that was broken off."""
    finish = choice.get("finish_reason")
    if finish == "stop" or finish == "length":
        return str(finish)
    raise Trouble(f"broke off an answer (finish_reason: {finish!r:.40})")
