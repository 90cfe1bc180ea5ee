"""Sampled decoding on a model: whole texts have the target's distribution, by a chi-square test.

4,096 texts of three tokens against the exact probabilities of all 64 (top-k 4), at level 1e-4.
Power: with 63 degrees of freedom this many texts detect an effect of Cohen's w = 0.16 with a
probability of 99 % (recomputed below); the wrong rules here have larger ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from redraft.decoding import acceptance_modes
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.sampling import Sampling, probabilities
from redraft.decoding.speculative import decode_speculative
from redraft.drafts.base import Draft
from redraft.models.target import Target
from tests.decoding.cheat import CheatingDraft

TEXTS, BATCH, LENGTH = 4096, 512, 3
SAMPLING = Sampling(1.0, top_k=4)
PROMPT = [2, 50, 61, 72, 40]
LEVEL_Z = 3.719  # of the normal distribution, one-sided 1e-4
POWER_Z = 2.326  # one-sided 1 %
Text = tuple[int, ...]


@pytest.fixture(scope="module")
def exact(target: Target) -> dict[Text, float]:
    found: dict[Text, float] = {(): 1.0}
    for _ in range(LENGTH):
        rows = torch.tensor([[*PROMPT, *text] for text in found])
        p = probabilities(target.read(rows, ()).logits_BTV[:, -1].double(), SAMPLING)
        found = {
            (*text, token): chance * float(p[row, token])
            for row, (text, chance) in enumerate(found.items())
            for token in p[row].nonzero().squeeze(-1).tolist()
        }
    assert len(found) == 4**LENGTH
    return found


def sampled(target: Target, draft: Draft, draft_token: str, k: int = 2) -> Counter[Text]:
    counts: Counter[Text] = Counter()
    decoding = Decoding("sampled", SAMPLING, draft_token)
    for begin in range(0, TEXTS, BATCH):
        seeds = list(range(begin, begin + BATCH))
        found = decode_speculative(target, draft, [PROMPT] * BATCH, k, LENGTH, decoding, seeds)
        counts.update(tuple([*d.tokens, *d.lookahead][:LENGTH]) for d in found)
    return counts


def z_score(counts: Counter[Text], exact: dict[Text, float]) -> float:
    """Chi-square over texts (rare ones together), as a normal deviate by Wilson and Hilferty."""
    rare = [text for text, chance in exact.items() if chance * TEXTS < 5]
    cells = [(counts[t], exact[t] * TEXTS) for t in exact if t not in rare]
    if rare:
        cells.append((sum(counts[t] for t in rare), sum(exact[t] for t in rare) * TEXTS))
    if sum(counts.values()) > sum(n for n, _ in cells):
        return math.inf  # a text that the target never says
    chi = sum((n - e) ** 2 / e for n, e in cells if e > 0)
    return normal_deviate(chi, len(cells) - 1)


def normal_deviate(chi: float, freedom: float) -> float:
    spread = 2 / (9 * freedom)
    return ((chi / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def detectable(freedom: int) -> float:
    """The smallest Cohen's w that is found with 99 % power, the noncentral chi-square by Patnaik."""
    spread = 2 / (9 * freedom)
    critical = freedom * (LEVEL_Z * math.sqrt(spread) + 1 - spread) ** 3
    shift = 0.0
    while True:
        shift += 0.1
        scale = (freedom + 2 * shift) / (freedom + shift)
        if normal_deviate(critical / scale, (freedom + shift) / scale) < -POWER_Z:
            return math.sqrt(shift / TEXTS)


def test_the_power_is_as_stated() -> None:
    assert 0.150 < detectable(63) < 0.160


@pytest.mark.parametrize("draft_token", ["sampled", "deterministic"])
@pytest.mark.parametrize(("noise", "k"), [(0.1, 1), (0.5, 2)])
def test_texts_are_distributed_as_the_targets(
    target: Target, exact: dict[Text, float], draft_token: str, noise: float, k: int
) -> None:
    found = z_score(sampled(target, CheatingDraft(target, noise), draft_token, k), exact)
    print(f"{draft_token}, noise {noise}, K={k}: z = {found:.2f}")
    assert found < LEVEL_Z


def test_a_trained_draft(target: Target, exact: dict[Text, float], trained_draft: Draft) -> None:
    assert z_score(sampled(target, trained_draft, "sampled"), exact) < LEVEL_Z


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
RIGHT: Rule = acceptance_modes.accept_sampled


def no_residual(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    n, _ = RIGHT(p, q, tokens, u)
    return n, p[torch.arange(len(n)), n]


def soft_ratio(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The q-ratio with a draft that is deterministic: as if its token had been drawn from p."""
    return RIGHT(p, p[:, :-1], tokens, u)


def bonus_before_last(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    n, following = RIGHT(p, q, tokens, u)
    return n, torch.where((n == tokens.shape[1])[:, None], p[:, -2], following)


@pytest.mark.parametrize(
    ("rule", "draft_token", "noise", "k"),
    [
        (no_residual, "sampled", 0.5, 2),
        (soft_ratio, "deterministic", 0.5, 2),
        (bonus_before_last, "sampled", 0.1, 1),
    ],
)
def test_wrong_rules_are_rejected(
    target: Target,
    exact: dict[Text, float],
    rule: Rule,
    draft_token: str,
    noise: float,
    k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptance_modes, "accept_sampled", rule)
    found = z_score(sampled(target, CheatingDraft(target, noise), draft_token, k), exact)
    print(f"{rule.__name__}: z = {found:.1f}")
    assert found > 2 * LEVEL_Z
