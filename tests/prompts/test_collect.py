"""Prompts from logs: only of people who agreed, without secrets, and nothing of a row but its messages."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft.core.lock import held
from redraft.prompts.collect import collect
from redraft.prompts.rows import read_rows
from redraft.prompts.secrets import secrets_in

SECRETS = {
    "AWS Access Key": "use AKIAIOSFODNN7EXAMPLE for the bucket",
    "GitHub Token": "token ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "Secret Keyword": "password = 'hunter2abc'",
    "Private Key": "-----BEGIN RSA PRIVATE KEY-----",
    "Basic Auth Credentials": "clone https://user:passw0rd@example.com/x",
    "long token": "my key is sk-proj-Abcdefgh1234567890abcdefgh",
    "e-mail address": "write to john.doe@example.com",
    "telephone number": "call +44 20 7946 0958 tomorrow",
    "card number": "pay with 4111 1111 1111 1111 please",
    "IBAN": "send it to DE89 3704 0044 0532 0130 00",
}
"""Each with its kind; the keys are published examples."""
HARMLESS = (
    "What is 2 + 2?",
    "def f(password):\n    return hash(password)",
    "the year 1989, 3.14159265358979 and 1234 5678 9012 3456",
    "a-very-long-word-with-many-hyphens-in-it-indeed",
    "https://example.com/a/long/path/to/some/page.html",
    "donaudampfschifffahrtsgesellschaftskapitaen",
    "Order 66 of 2005-05-19, version 1.2.3.4",
    "token: str = tokens[0]; password: string",
    "2026-11-29 12:30:00 2026-11-30 12:30:00",
)


OTHER_WAYS = {
    "card number": (
        "pay with 4111 1111 1111 1111.",
        "4111 1111 1111 1111 12/27",
        "4111111111111111 12/27 cvc 123",
        "order 12 4111-1111-1111-1111",
        "4111.1111.1111.1111",
        "5555 5555 5555 4444",
    ),
    "IBAN": (
        "AT61 1904 3002 3457 3201 BIC OPSKATWW",
        "de89 3704 0044 0532 0130 00",
        "(DE89370400440532013000)",
    ),
    "Secret Keyword": (
        "DB_PASSWORD=hunter2abc",
        "password: hunter2abc",
        "my password is hunter2abc",
        "Authorization: Bearer abcdefghijklmnop1234567890qrst",
        "password = 'hunter2abc'  # pragma: allowlist secret",
    ),
    "AWS Access Key": ("AKIAIOSFODNN7EXAMPLE  # pragma: allowlist secret",),
    "long token": ("api abcdef1234567890abcdef12",),
    "telephone number": ("call\n+44 20 7946 0958",),
}


@pytest.mark.parametrize("kind", OTHER_WAYS)
def test_a_secret_is_found_however_it_is_written(kind: str) -> None:
    for text in OTHER_WAYS[kind]:
        assert kind in set(secrets_in(text)), text


def test_a_long_text_takes_no_longer_than_its_length() -> None:
    began = time.monotonic()
    assert set(secrets_in("ACGT" * 50_000)) == set()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_and_named(kind: str) -> None:
    assert kind in set(secrets_in(f"Hello.\n{SECRETS[kind]}\nBye."))


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_has_none(text: str) -> None:
    assert list(secrets_in(text)) == []


def logged(
    content: str, agreed: object = True, model: str = "tuned", **more: Any
) -> dict[str, Any]:
    request = {"model": model, "messages": [{"role": "user", "content": content}], "user": "u-17"}
    reply = {"choices": [{"message": {"role": "assistant", "content": f"About {content}"}}]}
    return {"request": request, "response": reply, "metadata": {"training": agreed}, **more}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_only_rows_with_consent_and_without_secrets_are_taken(tmp_path: Path) -> None:
    rows = [
        logged("one"),
        logged("two", agreed=False),
        logged("three", agreed=None),
        {"messages": [{"role": "user", "content": "no field at all"}]},
        logged("four", agreed="true"),
        logged("five", model="other"),
        logged("mail me at a@b.de"),
        {"metadata": {"training": True}, "model": "tuned", "strange": 1},
        "no object",
        logged("one", ip="10.0.0.1"),
    ]
    out = tmp_path / "prompts.jsonl"
    log = write(tmp_path / "log.jsonl", rows)
    found = collect(log, out, consent="metadata.training=true", model="tuned")
    assert (found.added, found.held) == (2, 2)
    assert found.left_out == {
        "no consent": 3,
        "not understood": 2,
        "another model": 1,
        "secret: e-mail address": 1,
        "there already": 1,
    }
    kept = [row for _, row in read_rows(str(out))]
    assert [row["messages"][0]["content"] for row in kept] == ["one", "four"]
    assert [row["messages"][1]["content"] for row in kept] == ["About one", "About four"]
    assert all(set(row) == {"id", "messages"} for row in kept)
    assert "u-17" not in out.read_text()
    assert "10.0.0.1" not in out.read_text()


def test_more_is_added_each_time_and_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "prompts.jsonl"
    first = write(tmp_path / "a.jsonl", [logged(f"a{i}") for i in range(300)])
    collect(first, out, consent=None, everyone_agreed=True)
    before = out.read_bytes()
    out.write_bytes(before + b'{"id": "0123')  # a kill in the middle of a line
    second = write(tmp_path / "b.jsonl", [logged("a7"), logged("b"), logged("c")])
    found = collect(second, out, consent=None, everyone_agreed=True, most=301)
    assert (found.added, found.held, found.left_out) == (1, 301, {"there already": 1})
    assert out.read_bytes().startswith(before)
    contents = [row["messages"][0]["content"] for _, row in read_rows(str(out))]
    assert contents == [*(f"a{i}" for i in range(300)), "b"]


@pytest.mark.parametrize("place", ["answer", "tool call", "arguments", "tool", "system"])
def test_every_text_of_a_row_is_looked_at(tmp_path: Path, place: str) -> None:
    mail = "john.doe@example.com"
    call = {"function": {"name": "f", "arguments": {"to": mail}}, "type": "function"}
    said = {"name": "f", "arguments": json.dumps({"body": f"to\n{mail}\n"})}
    rows = {
        "answer": {"prompt": "who?", "response": f"{mail}."},
        "system": {
            "messages": [{"role": "system", "content": mail}, {"role": "user", "content": "hi"}]
        },
        "tool call": {
            "messages": [
                {"role": "user", "content": "send it"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
        },
        "arguments": {
            "messages": [
                {"role": "user", "content": "send it"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": said}]},
            ]
        },
        "tool": {
            "messages": [{"role": "user", "content": "hi"}],
            "tools": [{"type": "function", "function": {"name": "f", "description": mail}}],
        },
    }
    log = write(tmp_path / "log.jsonl", [rows[place]])
    found = collect(log, tmp_path / "out.jsonl", consent=None, everyone_agreed=True)
    assert found.left_out == {"secret: e-mail address": 1}
    assert not (tmp_path / "out.jsonl").exists()


def test_a_password_among_a_call_s_arguments_is_seen(tmp_path: Path) -> None:
    for arguments in ({"password": "hunter2abc"}, json.dumps({"password": "hunter2abc"})):
        call = {"function": {"name": "login", "arguments": arguments}, "type": "function"}
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        log = write(
            tmp_path / "l.jsonl", [{"messages": [{"role": "user", "content": "go"}, asked]}]
        )
        found = collect(log, tmp_path / "out.jsonl", consent=None, everyone_agreed=True)
        assert found.left_out == {"secret: Secret Keyword": 1}


def test_texts_in_the_text_of_arguments_are_looked_at_as_they_read(tmp_path: Path) -> None:
    """After a line end, which stands escaped in the text of arguments."""
    call = {"function": {"name": "f", "arguments": json.dumps({"body": "call\n+44 20 7946 0958"})}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    log = write(tmp_path / "l.jsonl", [{"messages": [{"role": "user", "content": "go"}, asked]}])
    found = collect(log, tmp_path / "out.jsonl", consent=None, everyone_agreed=True)
    assert found.left_out == {"secret: telephone number": 1}


def test_nothing_else_of_a_row_is_written(tmp_path: Path) -> None:
    """Neither columns next to the chat, nor who wrote a message, nor what a log keeps with a call."""
    call = {
        "id": "c1",
        "type": "function",
        "user": "Jane Roe",
        "function": {"name": "f", "arguments": {}},
    }
    chat = [
        {"role": "user", "content": "hello", "name": "John_Smith"},
        {"role": "assistant", "content": "", "tool_calls": [call], "user_ip": "10.0.0.1"},
        {"role": "tool", "content": "4", "name": "f", "tool_call_id": "c1"},
    ]
    rows = [
        {
            "prompt": "hello",
            "response": "hi",
            "context": "Jane Roe, Elm St",
            "system": "for Jane Roe",
        },
        {"messages": chat, "history": [["Jane", "Roe"]], "user": "Jane Roe"},
    ]
    out = tmp_path / "out.jsonl"
    collect(write(tmp_path / "l.jsonl", rows), out, consent=None, everyone_agreed=True)
    text = out.read_text()
    assert not any(name in text for name in ("Jane", "Roe", "Elm", "John", "10.0.0.1"))
    kept = [row["messages"] for _, row in read_rows(str(out))]
    assert [[m["role"] for m in one] for one in kept] == [
        ["user", "assistant"],
        ["user", "assistant", "tool"],
    ]
    assert kept[1][1]["tool_calls"] == [{k: v for k, v in call.items() if k != "user"}]
    assert kept[1][2]["name"] == "f"


@pytest.mark.parametrize(
    ("metadata", "agreed"),
    [
        ('{"training": true}', True),
        ('{"training": false, "training": true}', False),
        ({"training": "true"}, True),
        ({"training": 1}, False),
        ({}, False),
        (None, False),
        ([True], False),
    ],
)
def test_consent_is_what_the_field_says(metadata: Any, agreed: bool, tmp_path: Path) -> None:
    log = write(tmp_path / "l.jsonl", [{"prompt": "hello", "metadata": metadata}])
    found = collect(log, tmp_path / "out.jsonl", consent="metadata.training=true")
    assert found.added == agreed
    missing = collect(log, tmp_path / "other.jsonl", consent="metadata.opted_out=null")
    assert missing.added == 0


@pytest.mark.parametrize(
    "mine", ['[{"messages": [{"role": "user"}]}]', '{"text": "a"}\n{"text": "precious"}', "notes"]
)
def test_a_file_of_another_kind_stays_as_it_is(mine: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(mine)
    with pytest.raises(UserError, match="no row of redraft prompts collect"):
        collect(
            write(tmp_path / "l.jsonl", [logged("one")]), out, consent=None, everyone_agreed=True
        )
    assert out.read_text() == mine


def test_bad_input_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = write(tmp_path / "log.jsonl", [logged("one")]), tmp_path / "out.jsonl"
    for consent, everyone in ((None, False), ("a=b", True)):
        with pytest.raises(UserError, match="whose rows may be used"):
            collect(log, out, consent=consent, everyone_agreed=everyone)
    for wrong in ("training", "=true", "training="):
        with pytest.raises(UserError, match="takes FIELD=VALUE"):
            collect(log, out, consent=wrong)
    out.write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match="line 1: no row of redraft prompts collect"):
        collect(log, out, consent="metadata.training=true")
    assert out.read_text() == '{"text": "mine"}\n'
    with held(out), pytest.raises(UserError, match="another redraft process"):
        collect(log, out, consent="metadata.training=true")
    out.unlink()
    monkeypatch.setitem(sys.modules, "detect_secrets.core.scan", None)
    with pytest.raises(UserError, match=r"pip install 'redraft\[collect\]'"):
        collect(log, out, consent="metadata.training=true")


def test_the_command_counts_and_shows_no_secret(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [logged("one"), logged(SECRETS["AWS Access Key"])])
    words = ["prompts", "collect", log, "--everyone-agreed", "--out", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "1 added, 1 rows in" in done.stdout
    assert "left out: 1 (secret: AWS Access Key)" in done.stdout
    assert "AKIA" not in done.output
