"""Where no answer ended by itself, the stop tokens are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.config import RegenerateConfig
from redraft.core.records import Prompt
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.prompts.stopping import unfinished_note
from tests.generation.conftest import settings
from tests.generation.fake_openai import Brain, FakeOpenAI


def test_due_when_all_of_eight_were_cut(target: Target) -> None:
    (stop,) = target.stop_ids
    note = unfinished_note(0, 8, target)
    assert note is not None
    assert note.startswith("warning: none of 8 answers ended by itself")
    assert f"stop tokens are {target.tokenizer.convert_ids_to_tokens(stop)}." in note
    assert unfinished_note(1, 8, target) is None
    assert unfinished_note(0, 7, target) is None


def test_a_target_without_stop_tokens(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "stop_ids", property(lambda self: ()))
    assert "stop tokens are none" in str(unfinished_note(0, 8, target))


@pytest.mark.parametrize("served", [False, True], ids=["here", "served"])
def test_told_after_answering(
    target: Target,
    prompts: list[Prompt],
    brain: Brain,
    tmp_path: Path,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    served: bool,
) -> None:
    def answer(prompts: list[Prompt], name: str) -> None:
        with FakeOpenAI(brain).running() as server:
            own = RegenerateConfig(max_new_tokens=4)
            config = settings(server, max_new_tokens=4) if served else own
            regenerate(target, prompts, tmp_path / name, config)

    monkeypatch.setattr(Target, "stop_ids", property(lambda self: (0,)))
    answer(prompts[:8], "a.jsonl")
    assert sum("none of 8 answers ended by itself" in line for line in told) == 1
    told.clear()
    answer(prompts[:7], "b.jsonl")
    assert not any("WARNING" in line for line in told)
