"""The one door from logits to a token: temperature, top-k, top-p, then a draw.

Temperature 0 is a point mass here, not a branch elsewhere.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy, top_k 0 and top_p 1 keep everything."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V] that tokens are drawn from, in float32 (float64 stays).

    At temperature 0 all mass lies on the first largest logit. Top-k and top-p keep at least one
    token; top-p keeps the smallest set of likeliest tokens whose mass reaches p.
    """
    wide = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    if sampling.temperature == 0:
        return torch.zeros_like(wide).scatter_(-1, wide.argmax(-1, keepdim=True), 1.0)
    scaled = wide / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    p_BV = scaled.softmax(-1)
    if sampling.top_p < 1:
        ranked, order = p_BV.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(before >= sampling.top_p, 0.0)
        p_BV = torch.zeros_like(p_BV).scatter_(-1, order, ranked)
        p_BV = p_BV / p_BV.sum(-1, keepdim=True)
    return p_BV


def draw(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution at uniform numbers in [0, 1)."""
    cumulative = p_BV.cumsum(-1)
    aim = uniform_B.to(cumulative)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative mass exceeds the aim; its own mass is never zero.
    return (
        torch.searchsorted(cumulative, aim, right=True).squeeze(-1).clamp_(max=p_BV.shape[-1] - 1)
    )
