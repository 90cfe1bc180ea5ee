"""Losses, each named for what it computes. Sums over supervised tokens; the caller divides once.

Shapes: N supervised tokens, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Teacher:
    """The target's distribution at each supervised token, computed once for all rollout steps."""

    p_ND: Tensor
    entropy_N: Tensor

    @staticmethod
    def from_logits(logits_ND: Tensor) -> Teacher:
        """From the target's logits over the draft vocabulary, renormalised by the softmax.

        In float32; float64 stays.
        """
        wide = torch.float64 if logits_ND.dtype == torch.float64 else torch.float32
        log_p = logits_ND.to(wide).log_softmax(-1)
        p = log_p.exp()
        return Teacher(p, -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1))

    def last(self, count: int) -> Teacher:
        """The last `count` tokens (a view)."""
        begin = len(self.entropy_N) - count
        return Teacher(self.p_ND[begin:], self.entropy_N[begin:])


def forward_kl(teacher: Teacher, student_logits_ND: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q) in nats.

    p is the target's distribution over the draft vocabulary, q the draft's. The gradient is that
    of soft cross-entropy, which is how it is computed: cross-entropy less the entropy of p.
    """
    wide = student_logits_ND.to(teacher.p_ND.dtype)
    return cross_entropy(wide, teacher.p_ND, reduction="sum") - teacher.entropy_N.sum()
