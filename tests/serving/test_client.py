"""The sync way of the client; the async way is tested by the endpoints that use it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from redraft.core.errors import UserError
from redraft.serving.client import Client, connect
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
