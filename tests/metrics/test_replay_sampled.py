"""Replay at any temperature: live decoding's steps where they are determined, their mean where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.decoding.acceptance_modes import Decoding, Seeded
from redraft.decoding.sampling import Sampling
from redraft.drafts.base import Draft
from redraft.metrics import replay as replay_module
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.live import live
from redraft.metrics.measure import answer_all, measure
from redraft.metrics.replay import decoding_of, expect, expected_walk, replay
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double
from tests.decoding.test_decode import pair64  # noqa: F401

LONGEST = 24
SEEDED = [
    Decoding("seeded", Sampling(1.0), "coupled"),
    Decoding("seeded", Sampling(0.7, top_p=0.9), "coupled"),
    Decoding("seeded", Sampling(0.15), "deterministic"),
    Decoding("seeded", Sampling(1.0, top_p=0.5), "deterministic"),
]


@pytest.mark.parametrize("decoding", SEEDED, ids=str)
@pytest.mark.parametrize("k", [1, 4])
def test_seeded_replay_is_the_live_loop(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
    decoding: Decoding,
    k: int,
) -> None:
    target, draft = pair64
    lived = measure(
        target,
        draft,
        prompts[:8],
        k=k,
        max_new_tokens=LONGEST,
        mode="live",
        decoding=decoding,
        seed=3,
    )
    replayed = measure(
        target, draft, prompts[:8], k=k, max_new_tokens=LONGEST, decoding=decoding, seed=3
    )
    assert [a.answer for a in lived.answers] == [a.answer for a in replayed.answers]
    assert [a.seed for a in lived.answers] == [a.seed for a in replayed.answers]
    assert lived.traces == replayed.traces
    assert lived.acceptance.draft_token == decoding.draft_token


def test_batches_live_take_the_same_steps(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
) -> None:
    target, draft = pair64
    found = [
        live(target, draft, prompts[:9], 3, LONGEST, decoding=SEEDED[0], batch_size=size)
        for size in (1, 4, 9)
    ]
    assert found[0] == found[1] == found[2]


def test_a_reduced_vocabulary_replays_too(target_folder: Path, prompts: list[Prompt]) -> None:
    target = in_double(target_folder)
    draft = fresh_draft(target, vocab=40)
    steps, _ = live(target, draft, prompts[:6], 3, LONGEST, decoding=SEEDED[0], seed=1)
    answers = answer_all(target, prompts[:6], LONGEST, 3, SEEDED[0].sampling, 1)
    assert replay(target, draft, answers, 3, decoding=SEEDED[0]) == steps
    assert any(n for trace in steps for n in trace.accepted)


@pytest.mark.parametrize("sampling", [Sampling(0.3), Sampling(0.6, top_k=12)])
def test_sampled_replay_walks_around_its_expectation_and_live_agrees(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
    sampling: Sampling,
) -> None:
    target, draft = pair64
    decoding = Decoding("sampled", sampling, "sampled")
    many = [replace(p, id=f"{p.id}/{i}") for i in range(2) for p in prompts]
    answers = answer_all(target, many, 12, 3, sampling, 5)
    expected = pooled_tau(expect(target, draft, answers, 3, decoding=decoding))
    walks = []
    for seed in range(8):  # only the numbers that accept change
        reseeded = [replace(a, seed=(a.seed or 0) + 1 + seed) for a in answers]
        walks.append(pooled_tau(replay(target, draft, reseeded, 3, decoding=decoding)))
    error = np.std(walks, ddof=1) / len(walks) ** 0.5
    assert abs(np.mean(walks) - expected) < 4 * error
    lived = measure(
        target, draft, many, k=3, max_new_tokens=12, mode="live", decoding=decoding, seed=9
    ).acceptance
    low, high = lived.ci
    assert low - (high - low) / 2 < expected < high + (high - low) / 2  # four standard errors
    assert expected > 1.02


@pytest.mark.parametrize("mutant", ["p over q", "always accepted"])
def test_wrong_chances_are_caught(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
    mutant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, draft = pair64
    decoding = Decoding("sampled", Sampling(0.6), "sampled")
    answers = answer_all(target, prompts, 12, 3, decoding.sampling, 5)
    right = pooled_tau(expect(target, draft, answers, 3, decoding=decoding))
    of = replay_module._of
    if mutant == "p over q":
        monkeypatch.setattr(replay_module, "_of", lambda p, said: 1 / of(p, said))
    else:
        monkeypatch.setattr(replay_module, "_of", lambda p, said: of(p, said).fill_(1.0))
    assert abs(pooled_tau(expect(target, draft, answers, 3, decoding=decoding)) - right) > 0.05


def test_noise_of_the_position_before_is_caught(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, draft = pair64
    answers = answer_all(target, prompts, LONGEST, 3, SEEDED[0].sampling, 1)
    right = replay(target, draft, answers, 3, decoding=SEEDED[0])
    choose = Seeded.choose
    monkeypatch.setattr(
        Seeded, "choose", lambda self, scores, at, seeds: choose(self, scores, at - 1, seeds)
    )
    assert replay(target, draft, answers, 3, decoding=SEEDED[0]) != right


def test_the_expectation_by_brute_force() -> None:
    """Every pattern of accepted and rejected tokens of a short answer, weighted and added up."""
    answer = Answer("a", (1, 2), (5, 6, 7, 8, 9, 9, 9), 5, "length")
    table = np.random.default_rng(0).uniform(0, 1, (8, 2))
    first = 1  # the earliest chain start: the pair before the first answer token
    found = expected_walk(answer, table.tolist(), first)
    counts = np.zeros(3)

    def go(emitted: int, chance: float) -> None:
        if emitted >= answer.length:
            return
        a, b = table[len(answer.prompt) + emitted - 2 - first]
        for n, share in ((0, 1 - a), (1, a * (1 - b)), (2, a * b)):
            counts[n] += chance * share
            go(emitted + n + 1, chance * share)

    go(1, 1.0)
    assert found.by_accepted == pytest.approx(counts)
    assert found.steps == pytest.approx(counts.sum())
    assert found.gained == pytest.approx(counts[1] + 2 * counts[2])


def test_certain_chances_are_the_walk(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
) -> None:
    target, draft = pair64
    answers = answer_all(target, prompts[:8], LONGEST, 4, Sampling())
    for walked, meant in zip(
        replay(target, draft, answers, 4), expect(target, draft, answers, 4), strict=True
    ):
        assert list(meant.by_accepted) == walked.counts(4)


def test_answers_that_cannot_be_scored_are_named(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
) -> None:
    target, draft = pair64
    answers = answer_all(target, prompts[:3], 8, 3, Sampling(1.0))
    with pytest.raises(UserError, match="to be scored for Sampling.*regenerate them that way"):
        replay(target, draft, answers, 3, decoding=Decoding("seeded", Sampling(0.5)))
    unkeyed = [replace(a, seed=None) for a in answers]
    with pytest.raises(UserError, match="does not say which noise it was sampled with"):
        replay(target, draft, unkeyed, 3, decoding=Decoding("seeded", Sampling(1.0)))
    with pytest.raises(UserError, match="were sampled in 2 ways"):
        decoding_of([answers[0], replace(answers[1], temperature=0.3)])
    assert decoding_of(answers) == Decoding("sampled", Sampling(1.0), "deterministic")
    assert replay(target, draft, unkeyed, 3)  # deterministic draft tokens need no noise
