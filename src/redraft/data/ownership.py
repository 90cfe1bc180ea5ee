"""Whether answers are the target's own: their likelihood under it against what its own would have.

If y is drawn from the target's distribution p, -log p(y) is on average p's entropy, position by
position. Greedy answers are likelier than that; answers of another model, or of people, are less
likely, and a draft trained on them learns what its target does not say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..batches import collate, plan_once
from ..measuring.replay import BATCH_LOGITS, BATCH_TOKENS
from ..records import Answer
from ..target import Target

LOOKED_AT = 64
"""Answers read; they are spread evenly over those there are."""
NOTICED = 0.1
"""Nats per token above the target's own that are worth a warning, if three standard errors agree."""


@dataclass(frozen=True)
class Ownership:
    """In nats per token: `surprise` is -log p of the answers' tokens, `expected` the entropy of p at
    the same positions. `error` is the standard error of their difference over answers. `agreement`
    is the share of tokens that are the target's likeliest."""

    answers: int
    tokens: int
    surprise: float
    expected: float
    error: float
    agreement: float

    @property
    def own(self) -> bool:
        excess = self.surprise - self.expected
        return excess <= max(NOTICED, 3 * self.error)

    def describe(self) -> str:
        text = (
            f"the answers' tokens cost the target {self.surprise:.2f} nats each, its own would cost "
            f"{self.expected:.2f} (+- {self.error:.2f}); {self.agreement:.0%} are its likeliest "
            f"({self.answers} answers, {self.tokens:,} tokens)"
        )
        if self.own:
            return text
        return (
            f"warning: {text}. They are not this target's own: a draft trained on them learns what "
            "the target does not say; have it answer the same prompts (leave --answers out)"
        )


@torch.inference_mode()
def ownership(target: Target, answers: Sequence[Answer]) -> Ownership:
    """Read up to 64 of the answers, which are not empty, with the target."""
    step = max(len(answers) / LOOKED_AT, 1.0)
    some = [answers[int(i * step)] for i in range(min(LOOKED_AT, len(answers)))]
    most = min(BATCH_TOKENS, max(BATCH_LOGITS // target.vocab_size, 1))
    costs, entropies, hits, counts = [], [], 0, []
    for indices in plan_once([len(a.prompt) + a.length for a in some], most):
        rows = [some[i] for i in indices]
        batch = collate(rows, target.device)
        logits_BTV = target.read(batch.tokens_BT, ()).logits_BTV
        for row, answer in enumerate(rows):
            begin, end = len(answer.prompt), len(answer.prompt) + answer.length
            log_p_TV = logits_BTV[row, begin - 1 : end - 1].double().log_softmax(-1)
            said_T = batch.tokens_BT[row, begin:end]
            costs.append(-float(log_p_TV.gather(-1, said_T[:, None]).sum()))
            entropies.append(-float((log_p_TV.exp() * log_p_TV).nan_to_num(0.0).sum()))
            hits += int((log_p_TV.argmax(-1) == said_T).sum())
            counts.append(answer.length)
    total = sum(counts)
    excess = (sum(costs) - sum(entropies)) / total
    squares = sum(
        (cost - entropy - excess * count) ** 2
        for cost, entropy, count in zip(costs, entropies, counts, strict=True)
    )
    return Ownership(
        len(some),
        total,
        sum(costs) / total,
        sum(entropies) / total,
        math.sqrt(squares) / total,
        hits / total,
    )
