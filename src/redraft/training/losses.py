"""Losses, each named for what it computes. Sums over supervised tokens; the caller divides once.

p is the target's distribution, q the draft's, which lives on the draft vocabulary only. `kl` is
against p renormalised over that vocabulary. `tv` and `lk` are about acceptance, so what p puts
outside it is lost and counts.

Shapes: N supervised tokens, V target vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, smooth_l1_loss

from ..errors import UserError
from .chunks import sum_in_chunks

LK_ETA = 3.0
"""How fast `lk` turns from KL to total variation as acceptance rises."""
PAPER_KL = 0.1
"""Weight of the distributions beside the states in `paper`."""


@dataclass(frozen=True)
class Teacher:
    """What the target says at each supervised token, computed once for all rollout steps."""

    p_ND: Tensor
    """Its distribution, renormalised over the draft vocabulary."""
    entropy_N: Tensor
    """Of `p_ND`, in nats."""
    kept_N: Tensor
    """Its probability for the draft vocabulary as a whole: 1 where nothing is left out."""
    label_N: Tensor
    """Row of the answer's token in the draft vocabulary, -1 where it has none."""
    feature_NH: Tensor | None
    """What a draft's state stands for: its feature after the token before."""

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
            kept_N, rows_N = torch.ones_like(wide[:, 0]), labels_N
        else:
            whole_N = wide.logsumexp(-1)
            wide = wide.index_select(-1, draft_vocab)
            kept_N = (wide.logsumexp(-1) - whole_N).exp()
            rows_N = torch.searchsorted(draft_vocab, labels_N).clamp(max=len(draft_vocab) - 1)
            rows_N = rows_N.masked_fill(draft_vocab[rows_N] != labels_N, -1)
        log_p = wide.log_softmax(-1)
        p = log_p.exp()
        entropy_N = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
        return Teacher(p, entropy_N, kept_N, rows_N, feature_NH)

    def last(self, count: int) -> Teacher:
        """The last `count` tokens (views)."""
        begin = len(self.entropy_N) - count
        feature = None if self.feature_NH is None else self.feature_NH[begin:]
        return Teacher(
            self.p_ND[begin:],
            self.entropy_N[begin:],
            self.kept_N[begin:],
            self.label_N[begin:],
            feature,
        )


Loss = Callable[[Teacher, Tensor, Tensor | None], Tensor]
"""Teacher, the draft's logits [N, D] and its states [N, H] to a sum over tokens."""


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
    """Sum over tokens of -log q(answer's token); a token the draft does not speak adds nothing."""
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
            "this draft are none; it is for kind eagle, use another loss here (kl)"
        )
    dtype = teacher.p_ND.dtype
    states, features = student_states_NH.to(dtype), teacher.feature_NH.to(dtype)
    distance = smooth_l1_loss(states, features, reduction="none").mean(-1).sum()
    return distance + PAPER_KL * forward_kl(teacher, student_logits_ND)


LOSSES: dict[str, Loss] = {
    "kl": forward_kl,
    "tv": total_variation,
    "lk": lk_blend,
    "ce": hard_cross_entropy,
    "paper": features_and_kl,
}


def chunked_loss(
    name: str,
    draft_logits: Callable[[Tensor], Tensor],
    states_NH: Tensor,
    teacher_logits: Callable[[slice], Tensor],
    draft_vocab: Tensor | None,
    labels_N: Tensor,
    features_NH: Tensor | None,
    *,
    values: int,
) -> Tensor:
    """`LOSSES[name]` of all tokens, in memory that does not grow with the vocabulary.

    Logits exist for a few tokens at a time, at most `values` numbers of either model (but one
    token at least), and again in the backward pass. `draft_logits` turns states [n, H] into logits
    [n, D]; `teacher_logits` gives the target's [n, V] for a slice of the tokens.
    """
    loss = LOSSES[name]

    def served(tokens: slice) -> Tensor:
        # The target computes as it will be served, also where the draft trains under autocast.
        with torch.no_grad(), torch.autocast(states_NH.device.type, enabled=False):
            return teacher_logits(tokens)

    def of_chunk(states: Tensor, tokens: slice) -> Tensor:
        with torch.no_grad():
            feature = None if features_NH is None else features_NH[tokens]
            teacher = Teacher.from_logits(served(tokens), draft_vocab, labels_N[tokens], feature)
        return loss(teacher, draft_logits(states), states)

    vocabulary = served(slice(0, 1)).shape[-1]
    return sum_in_chunks(of_chunk, states_NH, max(1, values // vocabulary))


def _overlap(teacher: Teacher, student_logits_ND: Tensor) -> Tensor:
    """alpha [N] = sum of min(p, q) over the draft vocabulary, p as it is over the target's whole."""
    q_ND = student_logits_ND.to(teacher.p_ND.dtype).softmax(-1)
    return torch.minimum(teacher.p_ND * teacher.kept_N[:, None], q_ND).sum(-1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
