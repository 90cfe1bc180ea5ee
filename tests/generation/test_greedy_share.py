"""A share of the prompts is answered greedily, whoever answers and wherever a run was cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.config import RegenerateConfig
from redraft.core.records import Prompt
from redraft.generation.answer_file import answer_inputs, read_answers
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from tests.generation.conftest import TOKENS, own, settings
from tests.generation.fake_openai import Brain, FakeOpenAI


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_each_answer_is_the_greedy_or_the_sampled_one(
    target: Target, prompts: list[Prompt], tmp_path: Path, share: float
) -> None:
    greedy = own(target, prompts, tmp_path / "greedy")
    sampled = own(target, prompts, tmp_path / "sampled", temperature=0.8)
    mixed = own(target, prompts, tmp_path / "mixed", temperature=0.8, greedy_share=share)
    assert set(mixed) == set(greedy)
    for name, answer in mixed.items():
        assert answer == (sampled if answer.temperature else greedy)[name]
    count = sum(not answer.temperature for answer in mixed.values())
    assert 0 < count < len(prompts)
    assert {
        a.temperature
        for a in own(target, prompts, tmp_path / "all", temperature=0.8, greedy_share=1.0).values()
    } == {0.0}


def test_a_larger_share_keeps_the_greedy_ones(
    target: Target, prompts: list[Prompt], tmp_path: Path
) -> None:
    few, many = (
        {
            n
            for n, a in own(
                target, prompts, tmp_path / str(s), temperature=0.8, greedy_share=s
            ).items()
            if not a.temperature
        }
        for s in (0.3, 0.7)
    )
    assert few < many


def test_a_run_that_was_cut_gives_the_same_answers(
    target: Target, prompts: list[Prompt], tmp_path: Path
) -> None:
    settings = {"temperature": 0.8, "greedy_share": 0.5}
    whole = own(target, prompts, tmp_path, **settings)
    file = tmp_path / "own.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 3]))
    assert own(target, prompts, tmp_path, **settings) == whole


def test_a_share_that_changes_nothing_is_no_other_input(
    target: Target, prompts: list[Prompt]
) -> None:
    """Files of before name no share: they are continued."""
    plain = answer_inputs(target, prompts, RegenerateConfig(), 0)
    assert "greedy_share" not in plain
    assert plain == answer_inputs(target, prompts, RegenerateConfig(greedy_share=0.5), 0)
    mixed = RegenerateConfig(temperature=0.8, greedy_share=0.5)
    assert answer_inputs(target, prompts, mixed, 0)["greedy_share"] == 0.5


def test_endpoints_are_asked_greedily_for_the_same_prompts(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    here = own(target, prompts, tmp_path, temperature=0.8, greedy_share=0.5)
    with FakeOpenAI(brain).running() as server:
        config = settings(server, temperature=0.8, greedy_share=0.5)
        found = regenerate(target, prompts, tmp_path / "served.jsonl", config)
    asked = {
        tuple(b["prompt"]): b["temperature"] for b in server.bodies if b["max_tokens"] == TOKENS
    }
    for answer in found:
        assert answer.temperature == here[answer.id].temperature == asked[tuple(answer.prompt)]
    assert len(read_answers(tmp_path / "served.jsonl")) == len(prompts)
