"""The one HTTP client of redraft: it asks an OpenAI-compatible server, from threads or from an event loop.

`Client` and `AsyncClient` differ in how they wait and in nothing else. The API key travels in a header
only; where a server repeats it, it is blanked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx

from ..core.errors import UserError
from ..core.visible import visible
from .reply import Reply, Trouble, shown, text_of

KEY, OTHER_KEY = "REDRAFT_API_KEY", "OPENAI_API_KEY"
CONNECT_SECONDS, LOOK_SECONDS = 10.0, 30.0
"""The longest wait for a connection, and for a reply that takes no generating."""
CHECK_SECONDS = 15.0
"""How often a server is checked while a request is open. A server that is shutting down (SIGTERM) accepts no more
connections, and may keep an open one without ever replying, as vLLM 0.32 does."""
IDLE_SECONDS = 2.0
"""How long an idle connection is kept: less than servers keep it, which would close it under a request."""
HEALTH = "/health"
FAILURES = (httpx.RequestError, httpx.InvalidURL)
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


@dataclass(frozen=True)
class _Endpoint(Generic[Http]):
    """The server at `url` (its root). `timeout` is the longest wait for a whole reply, in seconds."""

    url: str
    http: Http
    timeout: float
    key: str | None = field(default=None, repr=False)

    def _request(self, path: str, body: dict[str, Any] | None) -> tuple[httpx.Request, float]:
        """A request (GET without a body, else POST), and the longest wait for its whole reply."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        verb, limit = (
            ("GET", min(self.timeout, LOOK_SECONDS)) if body is None else ("POST", self.timeout)
        )
        return self.http.build_request(verb, self.url + path, json=body, headers=headers), limit

    def _reply(self, response: httpx.Response, content: bytes) -> Reply:
        pause = response.headers.get("retry-after")
        return Reply(response.status_code, text_of(content), pause, self.key)

    def _trouble(self, problem: Exception) -> Trouble:
        if isinstance(problem, (httpx.ReadTimeout, httpx.WriteTimeout)):
            return _too_slow(self.timeout)
        if isinstance(problem, (httpx.ConnectError, httpx.ConnectTimeout)):
            cause = visible(_cause(problem)) or f"no connection within {CONNECT_SECONDS:g} s"
            return Trouble(f"cannot be reached ({cause})", reached=False)
        cause = shown(str(problem), self.key) or type(problem).__name__
        return Trouble(f"broke off its reply ({cause})")


class Client(_Endpoint[httpx.Client]):
    """A server that is asked from threads, of which several may ask at a time."""

    def reply(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        """The whole reply at a path below the root, whatever its status. Raises Trouble without one."""
        if body is None:
            return self._whole(path, body)
        found: Future[Reply] = Future()

        def ask() -> None:
            try:
                found.set_result(self._whole(path, body))
            except BaseException as problem:  # noqa: BLE001 - the caller raises it
                found.set_exception(problem)

        # A daemon thread: Python does not wait for it at exit, even if the reply never comes.
        threading.Thread(target=ask, daemon=True).start()
        while not wait([found], CHECK_SECONDS).done:
            if self._gone():
                raise _shut_down()
        return found.result()

    def _gone(self) -> bool:
        try:
            self.http.get(self.url + HEALTH, timeout=CONNECT_SECONDS)
        except FAILURES as problem:
            return isinstance(problem, httpx.ConnectError)
        return False

    def _whole(self, path: str, body: dict[str, Any] | None) -> Reply:
        content = b""
        try:
            request, limit = self._request(path, body)
            end = time.monotonic() + limit
            # httpx bounds the silence between two bytes, not the whole reply.
            with contextlib.closing(self.http.send(request, stream=True)) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > end:
                        raise _too_slow(limit)
        except FAILURES as problem:
            raise self._trouble(problem) from None
        return self._reply(response, content)


class AsyncClient(_Endpoint[httpx.AsyncClient]):
    """A server that is asked from one event loop."""

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object at a path below the root, or that a JSON body gets there.

        Raises an EndpointError.
        """
        try:
            request, limit = self._request(path, body)
            sending = asyncio.ensure_future(self.http.send(request))
            try:
                await self._come(sending, limit)
                response = sending.result()
            finally:
                sending.cancel()
        except FAILURES as problem:
            raise self._trouble(problem) from None
        return self._reply(response, response.content).content()

    async def _come(self, sending: asyncio.Future[httpx.Response], limit: float) -> None:
        """Wait for the reply. Raises Trouble for a server that is too slow or shutting down."""
        end = time.monotonic() + limit
        while not sending.done():
            # asyncio.wait_for before Python 3.12 swallows a cancellation that meets the reply.
            await asyncio.wait(
                {sending}, timeout=min(max(end - time.monotonic(), 0), CHECK_SECONDS)
            )
            if sending.done():
                return
            if time.monotonic() >= end:
                raise _too_slow(limit)
            if await self._gone():
                raise _shut_down()

    async def _gone(self) -> bool:
        try:
            await self.http.get(self.url + HEALTH, timeout=CONNECT_SECONDS)
        except FAILURES as problem:
            return isinstance(problem, httpx.ConnectError)
        return False


def connect(
    url: str, timeout: float, key: str | None = None, transport: httpx.BaseTransport | None = None
) -> Client:
    """A client for threads; its `http` is closed by whoever made it.

    Raises UserError for a proxy of no use.
    """
    return Client(url, _open(httpx.Client, url, timeout, transport=transport), timeout, key)


def connect_async(url: str, timeout: float, key: str | None = None) -> AsyncClient:
    """The same for the event loop that uses it."""
    return AsyncClient(url, _open(httpx.AsyncClient, url, timeout), timeout, key)


def _open(kind: type[Http], url: str, timeout: float, **options: Any) -> Http:
    """Callers bound their requests themselves. This machine is reached past the environment's proxies."""
    limits = httpx.Limits(keepalive_expiry=IDLE_SECONDS)
    limit = httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None)
    try:
        return kind(limits=limits, timeout=limit, trust_env=not _near(url), **options)
    except (ImportError, ValueError, httpx.InvalidURL):  # the message might hold a password
        raise UserError(
            f"{url}: a proxy named in the environment (HTTP_PROXY, HTTPS_PROXY or ALL_PROXY) cannot be "
            "used; expected an http:// or https:// URL, or the server's name in NO_PROXY"
        ) from None


def _near(url: str) -> bool:
    """Whether a server is on this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def key_for(url: str) -> str | None:
    """The API key for a server, from the environment. Raises UserError for what can be none.

    OPENAI_API_KEY may be meant for another server, so it is never sent in the clear over a network.
    """
    private = _near(url) or urlsplit(url).scheme == "https"
    names = (KEY, OTHER_KEY) if private else (KEY,)
    for name in names:
        key = os.environ.get(name, "").strip()
        if key:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise UserError(
                    f"{name} holds characters that an API key cannot have (spaces, line ends or "
                    "letters beyond ASCII); set it again"
                )
            return key
    return None


def _too_slow(limit: float) -> Trouble:
    return Trouble(f"gave no whole reply within {limit:g} s")


def _shut_down() -> Trouble:
    return Trouble(
        "is shutting down: it accepts no more connections while a request is open", reached=False
    )


def _cause(problem: BaseException) -> str:
    """What the system reports beneath an error of the HTTP client, else what the client reports."""
    text, inner = str(problem), problem.__cause__ or problem.__context__
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno:
            # asyncio has its own text for a refused connection; names not found have negative numbers
            text = os.strerror(inner.errno) if inner.errno > 0 else str(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return text
