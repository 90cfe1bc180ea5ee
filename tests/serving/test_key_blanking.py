"""The key is blanked in whatever notation a server repeats it."""

from __future__ import annotations

import base64
import html
import json
import random
import string
from urllib.parse import quote, quote_plus

import pytest

from redraft.serving.key_blanking import SECRET, blanked
from redraft.serving.reply import message_of, object_of

KEYS = ["sk-SECRET-123", "sk/a+b=c&d\"e\\f<g>'h", "EMPTY", "0123456789abcdef"]


def notations(key: str) -> dict[str, str]:
    """The key as servers may write it."""
    every = "".join(f"\\u{ord(c):04x}" for c in key)
    found = {
        "raw": key,
        "json": json.dumps(key)[1:-1],
        "json of json": json.dumps(json.dumps(key))[3:-3],
        "slashes": key.replace("/", "\\/"),
        "unicode escapes": every,
        "upper case": every.upper().replace("U", "u"),
        "url": quote(key, safe=""),
        "url twice": quote(quote(key, safe=""), safe=""),
        "form": quote_plus(key),
        "url, all": "".join(f"%{ord(c):02X}" for c in key),
        "html": html.escape(key),
        "html numbers": "".join(f"&#{ord(c)};" for c in key),
        "repr": repr(key)[1:-1],
    }
    if len(key) >= SECRET:
        for before in ("", "a", "ab", "user:", "Bearer "):
            coded = base64.b64encode(f"{before}{key}".encode()).decode()
            found[f"base64 {before}"] = coded
            found[f"base64 {before}, URL"] = coded.replace("+", "-").replace("/", "_")
    return found


@pytest.mark.parametrize("key", KEYS)
def test_every_notation_is_blanked(key: str) -> None:
    for name, text in notations(key).items():
        told = blanked(f"no: {text}, sorry", key)
        assert told.startswith("no: "), name
        assert told.endswith(", sorry"), name
        # base64 keeps what other bytes have a share in: a character or two at either end
        most = 8 + (len("Bearer ") * 4 // 3 + 2 if "base64" in name else 0)
        assert "***" in told, (name, told)
        assert len(told) <= len("no: , sorry") + most, (name, told)


def test_other_text_is_left_alone() -> None:
    text = "Incorrect API key provided: sk-OTHER-123 (\\u0073 %73 &#115;)"
    assert blanked(text, "sk-SECRET-123") == text
    assert blanked(text, None) == text


def test_random_keys_in_random_places() -> None:
    draw = random.Random(5)
    letters = string.ascii_letters + string.digits + string.punctuation
    for _ in range(200):
        key = "".join(draw.choices(letters, k=draw.randint(8, 60)))
        for name, text in notations(key).items():
            assert "***" in blanked(text, key), (key, name)
            error = {"error": {"message": "x" * draw.randint(0, 400) + text}}
            told = message_of(json.dumps(error), key)
            for size in (len(key), len(key) // 2 + 1):  # cut to fit, but not through the key
                assert key[:size] not in told, (key, name, told)


def test_a_reply_holds_no_key_either() -> None:
    key = "sk-SECRET-123"
    reply = json.dumps({"data": [{"id": f"model {key}", key: [key]}], "n": 1})
    assert object_of(reply, key) == {"data": [{"id": "model ***", "***": ["***"]}], "n": 1}
    assert object_of('{"id": "EMPTY"}', "EMPTY") == {"id": "EMPTY"}, "a word, not a secret"
    assert object_of('{"id": "\\ud800x"}', None) == {"id": "?x"}, "half a character"


def test_a_long_run_of_backslashes_is_no_trap() -> None:
    assert blanked("\\" * 200_000, "sk-SECRET-123") == "\\" * 200_000
