"""Whether answers are the target's own: what they cost it against what its own to the same prompts do.

The target draws answers of its own at temperature 1 to the same prompts. Greedy answers cost it less than
those; answers of another model, or of people, cost it more, and a draft trained on them learns what its target
does not say. (The target's entropy along the given answers would not do: off its own ways it is unsure, and
the bar would rise with what is measured.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.records import Answer, Prompt
from ..decoding.sampling import Sampling
from ..metrics.measure import GENERATE_TOKENS, answer_all
from ..metrics.replay import BATCH_LOGITS, BATCH_TOKENS
from ..models.batching import collate, plan_once
from ..models.target import Target

LOOKED_AT = 32
"""Answers read; they are spread evenly over those there are."""
LONGEST = 256
"""Tokens of an answer that are looked at, and drawn."""
GREEDY = 0.97
"""The share of most likely tokens from which answers are taken for greedy ones; near-ties may fall otherwise."""
NOTICED = 0.1
"""Nats per token above the target's own that are worth a warning, if three standard errors agree."""


@dataclass(frozen=True)
class Cost:
    """What answers cost a target, in nats per token: `nll` is -log p of their tokens, with its standard
    `error` over answers, `entropy` that of p at the same positions. `agreement` is the share of tokens
    that are the target's most likely."""

    tokens: int
    nll: float
    error: float
    entropy: float
    agreement: float


@dataclass(frozen=True)
class OnPolicy:
    """`nll` is what the answers cost, `expected` what those cost that the target drew itself, in nats
    per token; `error` is the standard error of their difference. `agreement` as in `Cost`."""

    answers: int
    tokens: int
    nll: float
    expected: float
    error: float
    agreement: float

    @property
    def own(self) -> bool:
        excess = self.nll - self.expected
        return excess <= max(NOTICED, 3 * self.error)

    def describe(self) -> str:
        text = (
            f"the answers' tokens cost the target {self.nll:.2f} nats each, answers that it draws itself "
            f"{self.expected:.2f} (+- {self.error:.2f}); {self.agreement:.0%} are its most likely "
            f"({self.answers} answers, {self.tokens:,} tokens)"
        )
        if self.own and self.agreement >= GREEDY:
            return f"{text}: they are its own greedy ones, or nearly"
        if self.own:
            return (
                f"{text}. They may be its own, if they were sampled at a temperature near 1; likelihood shows no "
                "more than that. Of its greedy answers all tokens are the most likely: if these are what somebody "
                "else wrote, or you serve greedily, have it answer the same prompts (leave --answers out)"
            )
        return (
            f"warning: {text}. They are not this target's own: a draft trained on them learns what "
            "the target does not say; have it answer the same prompts (leave --answers out)"
        )


def check_on_policy(
    target: Target, answers: Sequence[Answer], batch_tokens: int = GENERATE_TOKENS
) -> OnPolicy:
    """Read up to 32 of the answers, which are not empty, and as many that the target draws, in batches
    of at most `batch_tokens` (see `plan_generation`)."""
    step = max(len(answers) / LOOKED_AT, 1.0)
    some = [answers[int(i * step)] for i in range(min(LOOKED_AT, len(answers)))]
    longest = min(max(answer.length for answer in some), LONGEST)
    asked = [Prompt(answer.id, answer.prompt) for answer in some]
    drawn = answer_all(
        target, asked, longest, 0, Sampling(temperature=1.0), batch_tokens=batch_tokens
    )
    given, own = cost(target, some), cost(target, drawn)
    error = math.hypot(given.error, own.error)
    return OnPolicy(len(some), given.tokens, given.nll, own.nll, error, given.agreement)


@torch.inference_mode()
def cost(target: Target, answers: Sequence[Answer]) -> Cost:
    """Read answers, their first LONGEST tokens, with the target."""
    most = min(BATCH_TOKENS, max(BATCH_LOGITS // target.vocab_size, 1))
    counts = [min(answer.length, LONGEST) for answer in answers]
    costs, entropies, hits = [0.0] * len(answers), 0.0, 0
    for indices in plan_once([len(a.prompt) + a.length for a in answers], most):
        batch = collate([answers[i] for i in indices], target.device)
        logits_BTV = target.read(batch.tokens_BT, ()).logits_BTV
        for row, i in enumerate(indices):
            begin = len(answers[i].prompt)
            end = begin + counts[i]
            log_p_TV = logits_BTV[row, begin - 1 : end - 1].double().log_softmax(-1)
            said_T = batch.tokens_BT[row, begin:end]
            costs[i] = -float(log_p_TV.gather(-1, said_T[:, None]).sum())
            entropies -= float((log_p_TV.exp() * log_p_TV).nan_to_num(0.0).sum())
            hits += int((log_p_TV.argmax(-1) == said_T).sum())
    total = sum(counts)
    mean = sum(costs) / total
    squares = sum((c - mean * n) ** 2 for c, n in zip(costs, counts, strict=True))
    return Cost(total, mean, math.sqrt(squares) / total, entropies / total, hits / total)
