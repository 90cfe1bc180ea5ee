"""The one way from logits to a token: temperature, top-k, top-p, min-p, then a draw.

Temperature 0 is a point mass here, not a branch elsewhere.

Shapes: V vocabulary, last; any dimensions before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep everything."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, settings: Any) -> Sampling:
        """How an answer was drawn, or answers are to be drawn, by the four settings of the same names."""
        return cls(settings.temperature, settings.top_k, settings.top_p, settings.min_p)


def scores(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits over temperature, -inf for every token that is cut; float32 (float64 stays).

    At temperature 0 all but the first largest logit are cut. The cuts follow each other as in
    Transformers: top-k (ties with the k-th stay), top-p (the smallest set of most likely tokens whose
    mass reaches p), min-p (at least min_p times the most likely). Each keeps at least one token.
    """
    wide = logits_V if logits_V.dtype == torch.float64 else logits_V.float()
    if sampling.temperature == 0:
        best = wide.argmax(-1, keepdim=True)
        return torch.full_like(wide, NEVER).scatter_(-1, best, 0.0)
    scaled = wide / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, NEVER)
    if sampling.top_p < 1:
        ranked, order = scaled.softmax(-1).sort(descending=True, stable=True)
        cut = ranked.cumsum(-1) - ranked >= sampling.top_p
        scaled = scaled.masked_fill(torch.zeros_like(cut).scatter_(-1, order, cut), NEVER)
    if sampling.min_p > 0:
        p_V = scaled.softmax(-1)
        weak = p_V < sampling.min_p * p_V.amax(-1, keepdim=True)
        scaled = scaled.masked_fill(weak, NEVER)
    return scaled


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are drawn from, in float32 (float64 stays)."""
    return scores(logits_V, sampling).softmax(-1)


def draw(p_V: Tensor, uniform: Tensor) -> Tensor:
    """One token per distribution by inverting its cumulative sum at uniform numbers in [0, 1)."""
    cumulative = p_V.cumsum(-1)
    aim = uniform.to(cumulative)[..., None] * cumulative[..., -1:]
    # The first token whose cumulative mass exceeds the aim; its own mass is never zero.
    found = torch.searchsorted(cumulative, aim, right=True).squeeze(-1)
    last = p_V.shape[-1] - 1 - (p_V > 0).flip(-1).int().argmax(-1)  # rounding may aim past the end
    return torch.minimum(found, last)
