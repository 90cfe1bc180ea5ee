"""What the losses of the table compute: sums over supervised tokens, which the caller divides once.

p is the target's distribution, q the draft's, which covers the draft vocabulary only. `kl` is against p
renormalised over that vocabulary. `tv` and `lk` are about acceptance, so p's mass outside it is lost
and counts.

Shapes: N supervised tokens, V target vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, smooth_l1_loss

from ..core.errors import UserError
from .table import TABLE, LossRow

LK_ETA = 3.0
"""How fast `lk` turns from KL to total variation as acceptance rises."""
PAPER_KL = 0.1
"""Weight of the distributions next to the states in `paper`."""


@dataclass(frozen=True)
class Teacher:
    """The target's output at each supervised token, computed once for all rollout steps."""

    p_ND: Tensor
    """Its distribution, renormalised over the draft vocabulary; no columns for losses of LABELS."""
    entropy_N: Tensor
    """Of `p_ND`, in nats."""
    kept_N: Tensor | None
    """Its probability of the draft vocabulary as a whole (1 where nothing is left out); None for
    losses that do not read it."""
    label_N: Tensor
    """Row of the answer's token in the draft vocabulary, -1 where it has none."""
    feature_NH: Tensor | None
    """The feature that a draft's state predicts: the target's at the token before."""

    @staticmethod
    def from_logits(
        logits_NV: Tensor,
        draft_vocab: Tensor | None,
        labels_N: Tensor,
        feature_NH: Tensor | None = None,
    ) -> Teacher:
        """From logits over the target's whole vocabulary and the answer's tokens (target's ids).

        `draft_vocab` holds ascending target ids [D], None for all. In float32; float64 stays.
        """
        wide = logits_NV.to(_wide(logits_NV))
        if draft_vocab is None:
            kept_N = torch.ones_like(wide[:, 0])
        else:
            whole_N = wide.logsumexp(-1)
            wide = wide.index_select(-1, draft_vocab)
            kept_N = (wide.logsumexp(-1) - whole_N).exp()
        return Teacher._of(wide, kept_N, draft_vocab, labels_N, feature_NH)

    @staticmethod
    def from_own_logits(
        logits_ND: Tensor,
        draft_vocab: Tensor | None,
        labels_N: Tensor,
        feature_NH: Tensor | None = None,
    ) -> Teacher:
        """The same from logits over the draft vocabulary alone, for losses that read no more."""
        wide = logits_ND.to(_wide(logits_ND))
        return Teacher._of(wide, None, draft_vocab, labels_N, feature_NH)

    @staticmethod
    def _of(
        logits_ND: Tensor,
        kept_N: Tensor | None,
        draft_vocab: Tensor | None,
        labels_N: Tensor,
        feature_NH: Tensor | None,
    ) -> Teacher:
        rows_N = labels_N
        if draft_vocab is not None:
            rows_N = torch.searchsorted(draft_vocab, labels_N).clamp(max=len(draft_vocab) - 1)
            rows_N = rows_N.masked_fill(draft_vocab[rows_N] != labels_N, -1)
        log_p = logits_ND.log_softmax(-1)
        p = log_p.exp()
        entropy_N = -(p * log_p.masked_fill_(p == 0, 0.0)).sum(-1)
        return Teacher(p, entropy_N, kept_N, rows_N, feature_NH)

    @staticmethod
    def joined(parts: Sequence[Teacher]) -> Teacher:
        """Several teachers' tokens, one after the other."""
        first = parts[0]
        return Teacher(
            torch.cat([part.p_ND for part in parts]),
            torch.cat([part.entropy_N for part in parts]),
            None if first.kept_N is None else torch.cat([p.kept_N for p in parts]),  # type: ignore[misc]
            torch.cat([part.label_N for part in parts]),
            None if first.feature_NH is None else torch.cat([p.feature_NH for p in parts]),  # type: ignore[misc]
        )

    def last(self, count: int) -> Teacher:
        """The last `count` tokens (views)."""
        return self.part(slice(len(self.label_N) - count, None))

    def part(self, tokens: slice) -> Teacher:
        """Some of the tokens (views)."""
        return Teacher(
            self.p_ND[tokens],
            self.entropy_N[tokens],
            None if self.kept_N is None else self.kept_N[tokens],
            self.label_N[tokens],
            None if self.feature_NH is None else self.feature_NH[tokens],
        )


@dataclass(frozen=True)
class Loss:
    """A row of the table with its function: of the teacher, the draft's logits [N, D] and its states
    [N, H], to a sum over tokens."""

    row: LossRow
    compute: Callable[[Teacher, Tensor, Tensor | None], Tensor]

    def __call__(
        self, teacher: Teacher, student_logits_ND: Tensor, student_states_NH: Tensor | None = None
    ) -> Tensor:
        return self.compute(teacher, student_logits_ND, student_states_NH)


def forward_kl(teacher: Teacher, student_logits_ND: Tensor, _: Tensor | None = None) -> Tensor:
    """Sum over tokens of KL(p || q) in nats, p renormalised over the draft vocabulary.

    The gradient is that of soft cross-entropy, which is how it is computed: cross-entropy less the
    entropy of p.
    """
    wide = student_logits_ND.to(teacher.p_ND.dtype)
    return cross_entropy(wide, teacher.p_ND, reduction="sum") - teacher.entropy_N.sum()


def total_variation(teacher: Teacher, student_logits_ND: Tensor, _: Tensor | None = None) -> Tensor:
    """Sum over tokens of 1 - sum min(p, q): the chance that a sampled draft token is rejected."""
    return (1 - _overlap(teacher, student_logits_ND)).sum()


def lk_blend(teacher: Teacher, student_logits_ND: Tensor, _: Tensor | None = None) -> Tensor:
    """Sum over tokens of w KL + (1 - w) TV with w = exp(-eta alpha), alpha = 1 - TV held constant.

    Source: the hybrid LK loss of arXiv 2602.23881 (eta 3, its best). KL leads while little is
    accepted, where TV has hardly a gradient; TV leads later. The paper takes one w per batch and
    draft position from the mean alpha; here each token has its own, as in vLLM's speculators, so
    that a sum does not depend on what else is in the batch.
    """
    wide = student_logits_ND.to(teacher.p_ND.dtype)
    kl_N = cross_entropy(wide, teacher.p_ND, reduction="none") - teacher.entropy_N
    alpha_N = _overlap(teacher, student_logits_ND)
    w_N = (-LK_ETA * alpha_N.detach()).exp()
    return (w_N * kl_N + (1 - w_N) * (1 - alpha_N)).sum()


def hard_cross_entropy(
    teacher: Teacher, student_logits_ND: Tensor, _: Tensor | None = None
) -> Tensor:
    """Sum over tokens of -log q(answer's token); a token outside the draft vocabulary adds nothing."""
    wide = student_logits_ND.to(teacher.p_ND.dtype)
    return cross_entropy(wide, teacher.label_N, ignore_index=-1, reduction="sum")


def features_and_kl(
    teacher: Teacher, student_logits_ND: Tensor, student_states_NH: Tensor | None
) -> Tensor:
    """Sum over tokens of SmoothL1(state, target's feature), averaged over H, plus 0.1 KL.

    Source: EAGLE (arXiv 2401.15077), and EDA (arXiv 2603.09527) after it, whose soft cross-entropy
    has the gradient of KL. Raises UserError where there is no feature to compare a state with.
    """
    if teacher.feature_NH is None or student_states_NH is None:
        raise UserError(
            "loss 'paper' compares the draft's states with the target's features, and the states of "
            "this draft are none; use another loss here (kl)"
        )
    dtype = teacher.p_ND.dtype
    states, features = student_states_NH.to(dtype), teacher.feature_NH.to(dtype)
    distance = smooth_l1_loss(states, features, reduction="none").mean(-1).sum()
    return distance + PAPER_KL * forward_kl(teacher, student_logits_ND)


def _overlap(teacher: Teacher, student_logits_ND: Tensor) -> Tensor:
    """alpha [N] = sum of min(p, q) over the draft vocabulary, p being over the target's whole."""
    assert teacher.kept_N is not None, "a loss about acceptance reads the whole vocabulary"
    q_ND = student_logits_ND.to(teacher.p_ND.dtype).softmax(-1)
    return torch.minimum(teacher.p_ND * teacher.kept_N[:, None], q_ND).sum(-1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def load(row: LossRow) -> Loss:
    """A row with its function. Raises TypeError, naming the row, when there is none."""
    if row.function not in globals():
        raise TypeError(f"loss '{row.name}': functions.py has no {row.function}")
    return Loss(row, globals()[row.function])


LOSSES: dict[str, Loss] = {row.name: load(row) for row in TABLE}
