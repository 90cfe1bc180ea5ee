"""Where steps begin, against the reference implementation's own decoding, and bins against a table of single tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from redraft.core.records import Prompt
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.reference import Reference
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.metrics.positions import binned_steps, step_positions
from redraft.metrics.replay import replay
from redraft.models.target import Target

K, LONGEST = 4, 24
EDGES = (0, 4, 8, 16)
Places = Callable[[Sequence[int]], list[int]]


class Noting(Reference):
    """Notes how many tokens of the answer are there when a step begins."""

    def _step(self, text: list[int], at: int) -> tuple[int, list[int]]:
        found = super()._step(text, at)
        self.noted.append((at, found[0]))
        return found

    noted: list[tuple[int, int]]


def one_early(accepted: Sequence[int]) -> list[int]:
    return [at - 1 for at in step_positions(accepted)]


def without_correction(accepted: Sequence[int]) -> list[int]:
    return [1 + sum(accepted[:i]) for i in range(len(accepted))]


def by_number(accepted: Sequence[int]) -> list[int]:
    return list(range(1, len(accepted) + 1))


def by_token(steps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Accepted tokens and steps in each bin, token by token, from the places noted."""
    began = dict(steps)
    return [
        (
            sum(began.get(token, 0) for token in range(low, high)),
            sum(token in began for token in range(low, high)),
        )
        for low, high in pairwise(EDGES)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_steps_begin_where_the_twin_began_them(
    target: Target, trained_draft: Any, prompts: list[Prompt], temperature: float
) -> None:
    sampling = Sampling(temperature)
    mode = "sampled" if temperature else "greedy"
    answers = answer_all(target, prompts[:2], LONGEST, K, sampling)
    traces = replay(target, trained_draft, answers, K)
    lengths, misses = set(), dict.fromkeys((one_early, without_correction, by_number), 0)
    for prompt, answer, trace in zip(prompts[:2], answers, traces, strict=True):
        reference = Noting(target, trained_draft, K, Decoding(mode, sampling), answer.seed or 0)
        reference.noted = []
        if temperature:
            # At temperature the reference implementation draws other words; its own steps say where they began.
            accepted = tuple(reference.decode(prompt.tokens, LONGEST).accepted)
        else:
            assert reference.decode(prompt.tokens, LONGEST).tokens == list(answer.answer)
            accepted = trace.accepted
        places = [at for at, _ in reference.noted]
        assert step_positions(accepted) == places
        assert list(binned_steps(accepted, EDGES)) == by_token(reference.noted)
        for wrong in misses:
            misses[wrong] += wrong(accepted) != places
        lengths |= set(accepted)
    assert len(lengths) > 1, "steps of one length would not tell the rules apart"
    assert all(misses.values()), misses


@pytest.mark.parametrize("wrong", [one_early, without_correction, by_number])
def test_wrong_positions_change_the_bins(wrong: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = [2, 0, 4, 1, 0, 3]
    right = [(1, 2), (4, 0), (5, 4), (10, 1), (12, 0), (13, 3)]
    assert list(binned_steps(accepted, EDGES)) == by_token(right) == [(2, 1), (4, 2), (4, 3)]
    monkeypatch.setattr("redraft.metrics.positions.step_positions", wrong)
    assert list(binned_steps(accepted, EDGES)) != by_token(right)


def test_steps_outside_the_edges_are_left_out() -> None:
    assert binned_steps([1, 1, 1], (3, 5)) == ((1, 1),)
    assert binned_steps([], (0, 8)) == ((0, 0),)
