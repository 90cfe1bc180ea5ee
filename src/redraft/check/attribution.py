"""Why a draft accepts less than on its base: the same draft, replayed with one thing put back at a time.

Two things feed a draft: the tokens to be matched and the states it reads. So between the base on its own answers
(native) and the target on its own lies a third case: the target's answers, read by the base. From native to there
is the output shift, from there to the target the representation shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.vocabulary_remap import miss_rate
from ..checkpoints.load import StoredDraft
from ..core.records import Answer
from ..metrics.acceptance import pooled_tau
from ..metrics.replay import BATCH_LOGITS, BATCH_TOKENS, replay
from ..models.batching import collate, plan_once
from ..models.target import Target


@dataclass(frozen=True)
class Causes:
    """Tau with one thing put back, and how far the two models are apart on the target's answers.

    `base_states` is tau on the target's answers with the base's states, its embedding and its head;
    `base_embedding` with the target's states but the base's embedding and head (None: the draft has its
    own, or they did not change). `divergence` is the mean KL of the base from the target in nats per
    token, `agreement` the share of tokens that are the base's most likely too, `cosine` the mean
    cosine of the states the draft reads (None: it reads none). `missed` and `missed_on_base` are the shares of
    the target's and the base's answers outside a reduced draft vocabulary. `left_out` answers hold tokens that
    the base lacks.
    """

    base_states: float
    base_embedding: float | None
    divergence: float
    agreement: float
    cosine: float | None
    missed: float
    missed_on_base: float
    left_out: int


def find_causes(
    target: Target,
    base: Target,
    stored: StoredDraft,
    answers: Sequence[Answer],
    native: Sequence[Answer],
    k: int,
) -> Causes | None:
    """Put back one thing at a time; None when the base can read none of the target's answers.

    `answers` are the target's, `native` the base's own; both hold K-1 lookahead tokens.
    """
    known = base.embedding_VH.shape[0]
    read = [a for a in answers if max((*a.prompt, *a.tokens)) < known]
    if not read:
        return None
    ours, theirs = stored.build(target), stored.build(base)
    moved = not all(
        torch.equal(ours_VH[:known], theirs_VH.to(ours_VH.device))
        for ours_VH, theirs_VH in zip(_shared(target), _shared(base), strict=False)
    )
    divergence, agreement, cosine = _apart(target, base, read, ours.aux_layers)
    put_back = theirs.to(target.device) if moved else None
    return Causes(
        base_states=pooled_tau(replay(base, theirs, read, k)),
        base_embedding=pooled_tau(replay(target, put_back, read, k))
        if put_back is not None
        else None,
        divergence=divergence,
        agreement=agreement,
        cosine=cosine,
        missed=miss_rate(ours.draft_vocab, answers),
        missed_on_base=miss_rate(ours.draft_vocab, native),
        left_out=len(answers) - len(read),
    )


@torch.inference_mode()
def _apart(
    target: Target, base: Target, answers: Sequence[Answer], aux_layers: Sequence[int]
) -> tuple[float, float, float | None]:
    """KL in nats per token, the share of agreeing tokens, and the mean cosine of the aux layers."""
    most = min(BATCH_TOKENS, max(BATCH_LOGITS // target.vocab_size, 1))
    divergence = cosine = 0.0
    hits = tokens = 0
    for indices in plan_once([len(a.prompt) + a.length for a in answers], most):
        rows = [answers[i] for i in indices]
        batch = collate(rows, target.device)
        ours = target.read(batch.tokens_BT, aux_layers)
        theirs = base.read(batch.tokens_BT.to(base.device), aux_layers)
        for b, answer in enumerate(rows):
            labelled = slice(len(answer.prompt) - 1, len(answer.prompt) + answer.length - 1)
            p_TV, q_TV = _both(ours.logits_BTV[b, labelled], theirs.logits_BTV[b, labelled])
            divergence += float((p_TV.exp() * (p_TV - q_TV)).nan_to_num(0.0).sum())
            labels_T = batch.tokens_BT[b, labelled.start + 1 : labelled.stop + 1]
            hits += int((q_TV.argmax(-1) == labels_T).sum())
            if aux_layers:
                x, y = (
                    r.features_BTF[b, labelled].float().view(answer.length, len(aux_layers), -1)
                    for r in (ours, theirs)
                )
                alike = torch.cosine_similarity(x, y.to(x.device), dim=-1)
                cosine += float(alike.mean(-1).sum())
            tokens += answer.length
    return divergence / tokens, hits / tokens, cosine / tokens if aux_layers else None


def _shared(model: Target) -> list[Tensor]:
    """The matrices that a draft may share: the embedding, and the head where it has one."""
    head = model.head_VH
    return [model.embedding_VH, *([] if head is None else [head])]


def _both(ours_TV: Tensor, theirs_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both over the tokens that both have."""
    shared = min(ours_TV.shape[-1], theirs_TV.shape[-1])
    p, q = (logits[:, :shared].double().log_softmax(-1) for logits in (ours_TV, theirs_TV))
    return p, q.to(p.device)
