"""One OpenAI-compatible server: a request, its reply as JSON, and every way in which it can fail.

Failures are of four kinds, for what to do about them: `Trouble` may pass, `Busy` passes when its
time is up, `Refused` would be the same again, `Unable` is the server's and would be so for any prompt.
The API key travels in a header and in nothing else: where a server repeats it, it is blanked. A
server's words are shown with their control characters escaped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..core.errors import UserError
from ..core.visible import visible
from .key_blanking import SECRET, blanked

KEY, OTHER_KEY = "REDRAFT_API_KEY", "OPENAI_API_KEY"
CONNECT_SECONDS, LOOK_SECONDS = 10.0, 30.0
"""The longest wait for a connection, and for a reply that takes no generating."""
LONGEST_WAIT = 3600.0
"""A server that asks for a longer pause than this, in seconds, is asked again after it."""
MAY_PASS = (408, 409, 425, 429)
"""Statuses below 500 that say nothing about the request itself."""


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
class Endpoint:
    """The server at `url` (its root). `timeout` is the longest wait for a reply, in seconds."""

    url: str
    client: httpx.AsyncClient
    timeout: float
    key: str | None = field(default=None, repr=False)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path below the root. Raises an EndpointError."""
        return await self._ask("GET", path, None, min(self.timeout, LOOK_SECONDS))

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a JSON body gets at a path. Raises an EndpointError."""
        return await self._ask("POST", path, body, self.timeout)

    async def _ask(
        self, verb: str, path: str, body: dict[str, Any] | None, timeout: float
    ) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = asyncio.ensure_future(
            self.client.request(verb, self.url + path, json=body, headers=headers)
        )
        try:
            # httpx bounds the silence between two bytes, not the whole reply; and asyncio.wait_for
            # before Python 3.12 swallows a cancellation that meets the reply.
            await asyncio.wait({request}, timeout=timeout)
            if not request.done():
                raise Trouble(f"gave no whole reply within {timeout:g} s")
            reply = request.result()
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise Trouble(f"gave no whole reply within {timeout:g} s") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as problem:
            said = visible(_cause(problem)) or f"no connection within {CONNECT_SECONDS:g} s"
            raise Trouble(f"cannot be reached ({said})", reached=False) from None
        except (httpx.RequestError, httpx.InvalidURL) as problem:
            said = shown(str(problem), self.key) or type(problem).__name__
            raise Trouble(f"broke off its reply ({said})") from None
        finally:
            request.cancel()
        return self._read(reply)

    def _read(self, reply: httpx.Response) -> dict[str, Any]:
        text = text_of(reply.content)
        if reply.status_code != 200:
            said = message_of(text, self.key)
            if reply.status_code == 429 or (
                reply.status_code == 503 and "retry-after" in reply.headers
            ):
                wait = _seconds(reply.headers.get("retry-after"))
                raise Busy(f"is busy (HTTP {reply.status_code}: {said})", wait)
            if reply.status_code >= 500 or reply.status_code in MAY_PASS:
                raise Trouble(f"failed with HTTP {reply.status_code}: {said}")
            raise Refused(reply.status_code, said)
        content = object_of(text, self.key)
        if content is None:
            raise Trouble(
                f"replied with something that is no JSON object: '{shown(text, self.key, 80)}'"
            )
        return content


def connect(url: str, concurrency: int, timeout: float) -> httpx.AsyncClient:
    """A client for `concurrency` requests at a time to a server, and a few more next to them.

    It belongs to the event loop that uses it, and is closed by whoever made it. A server on this
    machine is reached past the proxies of the environment. Raises UserError for a proxy of no use.
    """
    most = concurrency + 4
    with proxy_checked(url):
        return httpx.AsyncClient(
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            trust_env=not near(url),
        )


@contextlib.contextmanager
def proxy_checked(url: str) -> Iterator[None]:
    """A client is made here. Raises UserError for a proxy of no use."""
    try:
        yield
    except (ImportError, ValueError, httpx.InvalidURL):  # the message might hold a password
        raise UserError(
            f"{url}: a proxy named in the environment (HTTP_PROXY, HTTPS_PROXY or ALL_PROXY) cannot be "
            "used; expected an http:// or https:// URL, or the server's name in NO_PROXY"
        ) from None


def _cause(problem: BaseException) -> str:
    """What the system said beneath an error of the HTTP client, else what the client says."""
    said, inner = str(problem), problem.__cause__ or problem.__context__
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno:
            # asyncio words a refused connection in its own way; names not found have negative numbers
            said = os.strerror(inner.errno) if inner.errno > 0 else str(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return said


def near(url: str) -> bool:
    """Whether a server is on this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def key_for(url: str) -> str | None:
    """The API key for a server, from the environment. Raises UserError for what can be none.

    OPENAI_API_KEY may be meant for another server, so it is never sent in the clear over a network.
    """
    private = near(url) or urlsplit(url).scheme == "https"
    names = (KEY, OTHER_KEY) if private else (KEY,)
    for name in names:
        key = os.environ.get(name, "").strip()
        if key:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise UserError(
                    f"{name} holds characters that an API key cannot have (spaces, line ends or "
                    "letters beyond ASCII); set it anew"
                )
            return key
    return None


def _seconds(text: str | None) -> float | None:
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
    """A reply as text: UTF-8, as JSON is, whatever its header says."""
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


def models_of(reply: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The models of a /v1/models reply by name. Raises Trouble for what is no such list."""
    listed = reply.get("data")
    if not isinstance(listed, list) or not all(
        isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed
    ):
        raise Trouble("listed its models in no known form")
    return {m["id"]: m for m in listed}
