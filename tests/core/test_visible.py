"""What a terminal would obey is shown as its escape, wherever text of others is printed."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from redraft.cli import examples
from redraft.cli import main as run_command
from redraft.cli.bundles import TargetFlags
from redraft.core import console as console_module
from redraft.core.visible import visible
from redraft.decoding.speculative import Step
from redraft.models.target import Target
from redraft.report.terminal import _cell, _show
from redraft.selection.explain import Example
from redraft.selection.select import Scored

EVIL = "\x1b]52;c;cm0=\x07 \x9b2J \x08\r\x7f\u202e\u2066\x85"


def test_only_what_is_obeyed_is_escaped() -> None:
    plain = "naïve 東京 👩‍👩‍👧 عربي\n\ta\\b [red]"
    assert visible(plain) == plain
    assert visible("\x1b[31m\r\u202e\x9b\ud800") == "\\x1b[31m\\r\\u202e\\x9b\\ud800"
    for code in [*range(32), *range(127, 160)]:
        kept = visible(chr(code)) == chr(code)
        assert kept == (chr(code) in "\n\t"), code
    assert visible(visible(EVIL)) == visible(EVIL)


def test_pieces_are_as_safe_as_the_whole() -> None:
    """A sequence whose parts come one by one stays escaped, wherever it is cut."""
    for at in range(len(EVIL)):
        assert visible(EVIL[:at]) + visible(EVIL[at:]) == visible(EVIL)


def test_examples_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    sample = Scored("id" + EVIL, 1.0, 3, True)
    examples.print_examples([Example("top", 1, sample, "ask " + EVIL, "say " + EVIL)])
    told = capsys.readouterr().err
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, highlight=False, width=200)
    _show(console, f"[/x] {EVIL}", style="red")
    console.print(_cell(f"[/x] {EVIL}"))
    for text in (told, out.getvalue().replace("\x1b[31m", "").replace("\x1b[0m", "")):
        assert not set(text) & (set(EVIL) - {" "} - set("]52;cm0=2J")), repr(text)
        assert "\\x1b]52;c;cm0=\\x07" in text
    assert out.getvalue().count("[/x]") == 2, "brackets were taken for markup"


def test_generated_text(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model writes ESC and the rest of the sequence as tokens of two steps."""
    ids = target.tokenizer.encode("hi \x1b]0;owned\x07 there", add_special_tokens=False)
    cut = target.tokenizer.encode("hi \x1b", add_special_tokens=False)

    def steps(*arguments: Any, **named: Any) -> Any:
        for part in (ids[: len(cut)], ids[len(cut) :]):
            ended = len(ids) if part[-1] == ids[-1] else None
            yield Step([0], [len(part) - 1], [part], [ended], len(part) - 1, *[torch.zeros(1)] * 2)

    monkeypatch.setattr("redraft.decoding.speculative.speculate", steps)
    monkeypatch.setattr(TargetFlags, "load", lambda *arguments: target)
    monkeypatch.setattr("redraft.checkpoints.load.load_draft", lambda *arguments: None)
    command = ["redraft", "generate", "--target", "T", "--draft", "D", "--prompt", "x", "--k", "2"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as end:
        run_command()
    assert not end.value.code
    assert capsys.readouterr().out == "hi \\x1b]0;owned\\x07 there\n"


def test_every_message_and_every_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console_module, "_quiet", False)
    console_module.say(f"said {EVIL}")
    monkeypatch.setattr("sys.argv", ["redraft", "inspect", f"/no/folder{EVIL}"])
    with pytest.raises(SystemExit) as end:
        run_command()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("said \\x1b]52")
    assert "/no/folder\\x1b]52" in told
    assert visible(told) == told
