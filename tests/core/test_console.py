"""What a person sees while waiting, where no terminal is: a line now and then, none when quiet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from redraft.core import console


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(console, "LOG_EVERY_SECONDS", 0.0)
    console.set_quiet(False)
    yield
    console.set_quiet(True)


def test_waiting_says_for_how_long(loud: None, capsys: pytest.CaptureFixture[str]) -> None:
    with console.Waiting("starting the engine") as waiting:
        waiting.tick()
    assert capsys.readouterr().err == "starting the engine: 0 s\n"


def test_progress_has_no_eta_before_the_first_step(
    loud: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Progress("training", 4, "steps") as progress:
        progress.advance(0)
        progress.advance(2)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("training: 0/4")
    assert "eta" not in first
    assert "eta" in last


def test_waiting_is_silent_when_quiet(loud: None, capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    with console.Waiting("starting the engine") as waiting:
        waiting.tick()
    assert capsys.readouterr().err == ""
