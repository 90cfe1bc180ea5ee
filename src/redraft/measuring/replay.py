"""Replay: the exact acceptance of a draft on answers that the target has already given.

The draft is run on the true tokens (its rollout), which is what decoding computes as long as the
drafted tokens are accepted; at the first difference a step ends. So one saved set of answers
scores any draft and K without a decoding loop. With a draft that picks its likeliest token this
holds at any temperature: y_j is accepted exactly when it equals the drafted token.

Shapes: B batch, T tokens, S chain starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batches import Batch, collate, plan_once
from ..drafts.base import Draft
from ..errors import UserError
from ..records import Answer, StepTrace
from ..target import Target

BATCH_TOKENS = 8192


@torch.inference_mode()
def replay(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    k: int,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[StepTrace]:
    """The verification steps that live decoding with this draft would take, in `answers`' order.

    For drafts that pick their likeliest token; one that samples would need its probabilities here.
    Raises UserError when an answer lacks the overrun (see `check_overrun`).
    """
    check_overrun(answers, k)
    traces: dict[int, StepTrace] = {}
    lengths = [len(a.prompt) + a.length + k - 1 for a in answers]
    for indices in plan_once(lengths, batch_tokens):
        batch = collate([answers[i] for i in indices], target.device, overrun=True)
        run_BS = accepted_runs(target, draft, batch, k).tolist()
        for row, index in enumerate(indices):
            traces[index] = walk(answers[index], run_BS[row], batch.first)
    return [traces[i] for i in range(len(answers))]


def check_overrun(answers: Sequence[Answer], k: int) -> None:
    """Raise UserError unless each answer holds K-1 tokens past its end, so that no step is cut."""
    for answer in answers:
        if len(answer.tokens) < answer.length + k - 1:
            raise UserError(
                f"answer {answer.id} holds {len(answer.tokens) - answer.length} tokens past its "
                f"end, replay at K={k} needs {k - 1}; regenerate it with --overrun {k}"
            )


def accepted_runs(target: Target, draft: Draft, batch: Batch, k: int) -> Tensor:
    """How many drafted tokens each chain start from `batch.first` on would have accepted: [B, S]."""
    tokens, first = batch.tokens_BT, batch.first
    features = target.read(tokens, draft.taps).features_BTF
    starts = max(tokens.shape[1] - 2 - first, 0)
    alive = torch.ones(len(tokens), starts, dtype=torch.bool, device=tokens.device)
    runs = torch.zeros(len(tokens), starts, dtype=torch.long, device=tokens.device)
    for step, states in enumerate(draft.rollout(tokens, features, first, k)):
        drafted = draft.to_target_ids(draft.logits(states).argmax(-1))
        count = drafted.shape[1]
        hit = torch.zeros_like(alive)
        hit[:, :count] = drafted == tokens[:, first + step + 2 : first + step + 2 + count]
        alive &= hit
        runs += alive
    return runs


def walk(answer: Answer, runs: Sequence[int], first: int) -> StepTrace:
    """Follow the steps of one answer: each begins where the one before it ended."""
    accepted: list[int] = []
    emitted = 1
    while emitted < answer.length:
        start = len(answer.prompt) + emitted - 2
        accepted.append(runs[start - first])
        emitted += accepted[-1] + 1
    return StepTrace(answer.id, tuple(accepted), answer.length)
