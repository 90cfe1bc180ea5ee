"""The sync way of the client; the async way is tested by the endpoints that use it, too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from redraft.core.errors import UserError
from redraft.serving import client as client_module
from redraft.serving.client import Client, connect, connect_async
from redraft.serving.counters import Counters, steady
from redraft.serving.engines import ENGINES, engine_named
from redraft.serving.reply import Busy, Refused, Trouble

KEY = "sk-SECRET-123"


def asking(reply: Callable[[httpx.Request], httpx.Response], timeout: float = 5.0) -> Client:
    return connect("http://box:8000", timeout, KEY, httpx.MockTransport(reply))


def test_a_request_has_its_key_and_a_body_makes_it_a_post() -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        key = request.headers["Authorization"]
        return httpx.Response(
            200, json=[request.method, request.url.path, key, request.content.decode()]
        )

    client = asking(reply)
    found = json.loads(client.reply("/metrics").text)
    assert found == ["GET", "/metrics", f"Bearer {KEY}", ""]
    assert json.loads(client.reply("/v1/completions", {"n": 1}).text)[0] == "POST"


@pytest.mark.parametrize(
    ("status", "pause", "error", "message"),
    [
        (429, "7", Busy, r"is busy \(HTTP 429: no \*\*\* today\)"),
        (503, "soon", Busy, "is busy"),
        (503, None, Trouble, r"failed with HTTP 503: no \*\*\* today"),
        (408, None, Trouble, "failed with HTTP 408"),
        (204, None, Refused, "HTTP 204"),
        (404, "7", Refused, r"HTTP 404: no \*\*\* today"),
    ],
)
def test_failures_by_what_to_do_about_them(
    status: int, pause: str | None, error: type[Exception], message: str
) -> None:
    headers = {"retry-after": pause} if pause else {}
    body = {"error": {"message": f"no {KEY} today"}}
    reply = asking(lambda _: httpx.Response(status, json=body, headers=headers)).reply("/")
    assert (reply.status, reply.reason) == (status, "no *** today")
    assert KEY not in repr(reply).replace(reply.text, "")
    with pytest.raises(error, match=message) as failed:
        reply.content()
    assert type(failed.value) is error
    if status == 429:
        assert failed.value.wait == 7  # type: ignore[attr-defined]


def test_a_reply_that_never_ends_is_given_up() -> None:
    def drops() -> Iterator[bytes]:
        while True:
            time.sleep(0.01)
            yield b" "

    with pytest.raises(Trouble, match=r"^gave no whole reply within 0\.1 s$"):
        asking(lambda _: httpx.Response(200, content=drops()), timeout=0.1).reply("/")


def test_nobody_there() -> None:
    with pytest.raises(Trouble, match=r"^cannot be reached \(Connection refused\)$") as failed:
        connect("http://127.0.0.1:9", 5.0).reply("/health")
    assert not failed.value.reached


def test_counters_are_read_until_they_are_steady() -> None:
    pages = iter([Counters(n) for n in (1, 2, 2, 3)])
    assert steady(lambda: next(pages), 0.0) == Counters(2)
    busy = iter(range(100))
    assert steady(lambda: Counters(next(busy)), 0.0, 5) == Counters(5)
    assert next(busy) == 6


def test_an_engine_is_named_by_its_row() -> None:
    assert [engine_named(row.name) for row in ENGINES] == list(ENGINES)
    with pytest.raises(UserError, match="--engine sglang: redraft does not run SGLang"):
        engine_named("sglang")
    with pytest.raises(UserError, match="unknown --engine 'vlm'; did you mean 'vllm'"):
        engine_named("vlm")


@contextmanager
def ending_server(takes_more: bool) -> Iterator[str]:
    """A server that keeps the connection of its first request open and never replies; it takes others, or no more."""
    listening = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed under it at the end
            held.append(listening.accept()[0])
            if not takes_more:
                listening.close()
            while takes_more:
                connection = listening.accept()[0]
                connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
                connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)
        for connection in held:
            connection.close()


def ask_in_a_thread(url: str, timeout: float) -> None:
    connect(url, timeout).reply("/v1/completions", {"n": 1})


def ask_in_a_loop(url: str, timeout: float) -> None:
    asyncio.run(connect_async(url, timeout).ask("/v1/completions", {"n": 1}))


@pytest.mark.parametrize("ask", [ask_in_a_thread, ask_in_a_loop])
def test_a_server_that_is_ending_is_not_waited_for(
    ask: Callable[[str, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CHECK_SECONDS", 0.1)
    with ending_server(takes_more=False) as url:
        began = time.monotonic()
        with pytest.raises(Trouble, match="is shutting down: it accepts no more") as failed:
            ask(url, 60.0)
        assert time.monotonic() - began < 20
        assert not failed.value.reached
    with ending_server(takes_more=True) as url, pytest.raises(Trouble, match="within 1 s"):
        ask(url, 1.0)


def test_what_breaks_in_the_thread_is_raised() -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        asking(broken).reply("/v1/completions", {"n": 1})
