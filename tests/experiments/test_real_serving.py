"""Trials of the race's drafts in vLLM: what is run once, what is compared, what is refused. The engine is a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.checkpoints.load import load_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import Throughput
from redraft.decoding.plain import decode_plain
from redraft.decoding.speculative import decode_speculative
from redraft.prompts.prompts import read_prompts
from redraft.serving.counters import Counters
from redraft.serving.trial import Trial
from redraft_experiments import real_generate, real_serving
from redraft_experiments.real_generate import bench_real_generate
from redraft_experiments.real_serving import (
    PROMPTS,
    bench_real_serving,
    print_served,
    ratio,
    read_served,
)
from redraft_experiments.real_suite import build_real_suite, load_real, prompts_of


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trials in a row of rising speed; a draft changes the last answer."""
    tried: list[tuple[str, int]] = []

    def stand_in(self: object, row: str, draft: Path | None, k: int) -> Trial:
        tried.append((row, k))
        rate = 10.0 * len(tried)
        speed = {n: Throughput(row, rate * n, rate * n, rate * n, 2, 16, 99) for n in (1, 4)}
        answers = [[i, 7] for i in range(PROMPTS)]
        if draft is not None:
            answers[-1][-1] = 8
        return Trial({1: answers}, speed, Counters(10, 10 * k, 5, (5,)))

    monkeypatch.setattr(real_serving._Bench, "_try", stand_in)
    return tried


def test_each_draft_is_tried_once_against_vllm_without_it(
    tmp_path: Path, tried: list[tuple[str, int]]
) -> None:
    suite, race = tmp_path / "real", tmp_path / "race"
    for folder in (suite / "draft", race / "math-sft" / "drafts" / "expert.s1"):
        folder.mkdir(parents=True)
    for _ in range(2):
        cells = bench_real_serving(
            suite, race, member="math-sft", rows=["unadapted", "expert"], ks=[2, 4], seed=1
        )
    assert tried == [("plain", 0), *((r, k) for r in ("unadapted", "expert") for k in (2, 4))]
    plain, *others = cells
    assert (plain.tau, plain.equal) == (None, None)
    assert {(cell.tau, cell.equal) for cell in others} == {(1.5, PROMPTS - 1)}
    assert [ratio(cell, plain, "4") for cell in others] == [2.0, 3.0, 4.0, 5.0]
    assert sorted(read_served(race), key=lambda c: (c.row, c.k)) == sorted(
        cells, key=lambda c: (c.row, c.k)
    )
    print_served(cells)


def test_transformers_answers_alike_with_a_draft_and_is_timed_once(
    data: Path, tmp_path: Path, small_real: list[RegenerateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out = tmp_path / "real", tmp_path / "race"
    build_real_suite(suite, data=str(data), members=["math-sft"])
    monkeypatch.setattr(real_generate, "LONGEST", 12)
    asked = {
        "member": "math-sft",
        "drafts": {"unadapted": suite / "draft"},
        "ks": [1, 3],
        "seed": 1,
    }
    cells = bench_real_generate(suite, out, **asked)
    plain, *drafted = cells
    assert [(cell.row, cell.k) for cell in cells] == [
        ("plain", 0),
        ("unadapted", 1),
        ("unadapted", 3),
    ]
    target = load_real(suite, "math-sft")
    file = str(prompts_of(suite, "math", "eval"))
    prompts = read_prompts(file, target, plain.speed["1"].prompts, "last").prompts
    draft = load_draft(str(suite / "draft"), target)
    alone = [decode_plain(target, prompt.tokens, 12) for prompt in prompts]
    for cell in drafted:
        found = [
            decode_speculative(target, draft, [prompt.tokens], cell.k, 12)[0] for prompt in prompts
        ]
        accepted = [count for each in found for count in each.accepted]
        # bf16 at random weights parts at near-ties, with our loop as with this one.
        assert cell.tau == pytest.approx(1 + sum(accepted) / len(accepted), abs=0.005)
        assert cell.equal == sum(one.tokens == two for one, two in zip(found, alone, strict=True))
        assert cell.equal >= len(prompts) / 2
    monkeypatch.setattr(real_generate, "race", None)
    assert bench_real_generate(suite, out, **asked) == cells
    print_served(cells)


def test_a_draft_that_was_not_trained_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expert\.s1 is not there; make it with redraft bench"):
        bench_real_serving(tmp_path, tmp_path, member="math-sft", rows=["expert"], ks=[2], seed=1)
