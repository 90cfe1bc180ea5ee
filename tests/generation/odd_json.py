"""Replies as no server should send them: a good one with one or two places changed, from a seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "7", "stop", "\ud800", "\x1b]0;owned\x07", "x" * 3000),
    *([], [[]], {}, [None], ["1", 2], [-1], [10**9], {"message": {"a": []}}, {"\x1b[2J": "\u202e"}),
]
RAW = [
    *(b"", b"null", b"[]", b"{}", b'"x"', b"NaN", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}"),
    *(b"<html>\x1b[2J</html>", b"data: {}\n\n", b"\x00" * 99, b"[" * 100_000, b'{"a":' * 5000),
    b'{"choices": 1' + b"0" * 5000 + b"}",
]


def mutated(reply: Any, draw: random.Random) -> bytes:
    """The bytes of a reply that resembles `reply`."""
    if draw.random() < 0.1:
        return draw.choice(RAW)
    reply = copy.deepcopy(reply)
    for _ in range(draw.choice((1, 1, 2))):
        reply = _changed(reply, draw)
    data = json.dumps(reply).encode()
    if draw.random() < 0.1:
        at = draw.randrange(len(data) + 1)
        data = draw.choice((data[:at], data[:at] + b"\xff\x1b" + data[at:], data + data))
    return data


def _changed(value: Any, draw: random.Random) -> Any:
    """One place of a JSON value replaced, left out, repeated or added."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return copy.deepcopy(draw.choice(ODD))
    if isinstance(value, dict):
        name = draw.choice(list(value))
        if draw.random() < 0.15:
            del value[name]
        else:
            value[name] = _changed(value[name], draw)
        return value
    at = draw.randrange(len(value))
    what = draw.random()
    if what < 0.15:
        del value[at]
    elif what < 0.3:
        value.insert(at, copy.deepcopy(value[at]))
    else:
        value[at] = _changed(value[at], draw)
    return value
