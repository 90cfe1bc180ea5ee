"""Chances of replay against the draft's decoding steps on the true tokens, and against live decoding.

The oracle takes the draft through `extend` and `step`, never through its rollout. Wrong rules (no
clamp, p and q swapped) run through both comparisons and stand outside each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from redraft.core.records import Answer, ExpectedSteps, Prompt, StepTrace
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.sampling import Sampling, probabilities
from redraft.drafts.base import Draft
from redraft.metrics import replay as replay_module
from redraft.metrics.acceptance import Steps
from redraft.metrics.live import live
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import expect, expected_walk, replay
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double
from tests.decoding.test_decode import pair64  # noqa: F401

Pair = tuple[Target, Draft]
Rule = Callable[[Tensor, Tensor], Tensor]
K, LONGEST, SEED = 4, 12, 5
SAMPLED = Decoding("sampled", Sampling(0.3), "sampled")
STANDARD_ERRORS = 4.0


def clamped(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(torch.ones_like(p), q / p)


def not_clamped(p: Tensor, q: Tensor) -> Tensor:
    return q / p


def swapped(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(q > 0, torch.minimum(torch.ones_like(p), p / q), 0.0)


@torch.inference_mode()
def said_with(pair: Pair, answer: Answer) -> tuple[Tensor, Tensor]:
    """The chances p and q [starts, K] that target and draft gave each true token.

    One start for each number of tokens emitted before a step, from 1 on.
    """
    target, draft = pair
    whole = torch.tensor([*answer.prompt, *answer.tokens])
    reading = target.read(whole[None], draft.aux_layers)
    own = probabilities(reading.logits_BTV[0], SAMPLED.sampling)
    starts = answer.length - 1
    ends = torch.arange(1, answer.length) + len(answer.prompt)
    longest = int(ends[-1]) - 1
    cache = draft.new_cache(whole[:1].expand(starts))
    state = draft.extend(
        cache,
        whole[1 : longest + 1].expand(starts, -1),
        reading.features_BTF[:, :longest].expand(starts, -1, -1),
        (ends - 1).tolist(),
    )
    p, q = torch.zeros(starts, K).double(), torch.zeros(starts, K).double()
    for step in range(K):
        said = whole[ends + step]
        logits = draft.logits(state)[:, 0]
        wide = torch.full((starts, target.vocab_size), float("-inf"), dtype=logits.dtype)
        wide[:, draft.to_target_ids(torch.arange(logits.shape[-1]))] = logits
        p[:, step] = own[ends + step - 1, said]
        q[:, step] = probabilities(wide, SAMPLED.sampling)[torch.arange(starts), said]
        state = draft.step(cache, said[:, None], state)
    return p, q


@pytest.mark.parametrize("own_vocabulary", [False, True])
def test_chances_are_those_of_decoding_step_by_step(
    pair64: Pair,  # noqa: F811
    target_folder: Path,
    prompts: list[Prompt],
    own_vocabulary: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = pair64
    if own_vocabulary:
        target = in_double(target_folder)
        pair = target, fresh_draft(target, vocab=40)
    answers = answer_all(pair[0], prompts[:6], LONGEST, K, SAMPLED.sampling, SEED)
    tables: dict[str, Tensor] = {}

    def noted(answer: Answer, table: Sequence[Sequence[float]], first: int) -> ExpectedSteps:
        begin = len(answer.prompt) - 1 - first
        tables[answer.id] = torch.tensor(table).double()[begin : begin + answer.length - 1]
        return expected_walk(answer, table, first)

    monkeypatch.setattr(replay_module, "expected_walk", noted)
    expect(*pair, answers, K, decoding=SAMPLED)
    found = torch.cat([tables[a.id] for a in answers])
    said = [said_with(pair, a) for a in answers]
    p, q = (torch.cat(parts) for parts in zip(*said, strict=True))
    # After a token outside the draft's vocabulary no step comes to the next.
    reached = (clamped(p, q) > 0).cumprod(1).roll(1, dims=1)
    reached[:, 0] = 1
    assert own_vocabulary == bool((reached == 0).any())
    assert torch.allclose(found, clamped(p, q) * reached, rtol=0, atol=1e-7)
    for wrong in (not_clamped, swapped):
        assert own_vocabulary or not torch.allclose(found, wrong(p, q), rtol=0, atol=1e-3)
    shifted = clamped(p, q).roll(1, dims=0)
    assert own_vocabulary or not torch.allclose(found, shifted, rtol=0, atol=1e-3)


def test_no_logits_are_computed_where_no_step_can_reach(
    pair64: Pair,  # noqa: F811
    prompts: list[Prompt],
) -> None:
    target, draft = pair64
    answers = answer_all(target, prompts[:6], LONGEST, K, Sampling(), SEED)
    asked: list[int] = []
    logits = draft.logits

    def counted(states: Tensor) -> Tensor:
        asked.append(states.shape[:-1].numel())
        return logits(states)

    draft.logits = counted  # type: ignore[method-assign]
    try:
        (runs,) = replay_module.accepted_runs(target, [draft], answers, K)
    finally:
        draft.logits = logits  # type: ignore[method-assign]
    for step, count in enumerate(asked):
        # A position asks for its token after so many accepted ones. Lookahead adds starts near an answer's end.
        reached = sum(run >= step for run_of in runs for run in run_of)
        assert reached <= count <= reached + K * len(answers)
    assert asked[0] < sum(len(a.prompt) + a.length for a in answers)


def tau_of(traces: Sequence[Steps]) -> tuple[float, float]:
    """Pooled tau, and its standard error over prompts (a ratio, by the delta method)."""
    steps = sum(t.steps for t in traces)
    ratio = sum(t.gained for t in traces) / steps
    spread = sum((t.gained - ratio * t.steps) ** 2 for t in traces)
    return 1 + ratio, math.sqrt(spread) / steps


def apart(one: Sequence[Steps], other: Sequence[Steps]) -> float:
    """How many standard errors two taus over different prompts are apart."""
    (a, error), (b, error_b) = tau_of(one), tau_of(other)
    return abs(a - b) / math.hypot(error, error_b)


def test_standard_errors_by_hand() -> None:
    assert tau_of([StepTrace("a", (2, 0), 5), StepTrace("b", (1,), 3)]) == (2.0, 0.0)
    assert tau_of([StepTrace("a", (3,), 5), StepTrace("b", (1,), 3)]) == (3.0, math.sqrt(2) / 2)


def many(prompts: Sequence[Prompt], begin: int, end: int) -> list[Prompt]:
    """The same prompts under other ids, which key other noise."""
    return [replace(p, id=f"{p.id}-{i}") for i in range(begin, end) for p in prompts]


def test_live_decoding_agrees_with_the_right_rule_only(
    pair64: Pair,  # noqa: F811
    prompts: list[Prompt],
) -> None:
    target, draft = pair64
    lived, _ = live(
        target, draft, many(prompts, 0, 9), K, LONGEST, decoding=SAMPLED, seed=SEED, batch_size=72
    )
    answers = answer_all(target, many(prompts, 9, 18), LONGEST, K, SAMPLED.sampling, SEED)
    said = [(a, *said_with((target, draft), a)) for a in answers if a.length > 1]

    def under(rule: Rule) -> list[ExpectedSteps]:
        return [expected_walk(a, rule(p, q).tolist(), len(a.prompt) - 1) for a, p, q in said]

    exact = expect(target, draft, answers, K, decoding=SAMPLED)
    assert tau_of(under(clamped)) == pytest.approx(tau_of(exact), abs=1e-7)
    right = [
        apart(lived, found)
        for found in (exact, replay(target, draft, answers, K, decoding=SAMPLED))
    ]
    wrong = [apart(lived, under(rule)) for rule in (not_clamped, swapped)]
    print(f"live {tau_of(lived)}, expected {tau_of(exact)}; apart {right}, wrong rules {wrong}")
    assert max(right) < STANDARD_ERRORS
    assert min(wrong) > STANDARD_ERRORS
