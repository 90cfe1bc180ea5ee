"""Routed experts: the sum over those that a router chose, which drafts of several kinds have in their FFN.

Shapes: M tokens, H hidden, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import ACTIVATIONS


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)). Not a `GatedFFN`: widening one would change it for some tokens only."""

    def __init__(self, hidden: int, width: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(
            ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        )
        return y


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which a router decides: float32; float64 stays."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sum_of_chosen(
    x_MH: Tensor,
    chosen_Mk: Tensor,
    share_Mk: Tensor,
    experts: int,
    run: Callable[[int, Tensor], Tensor],
    *,
    idle: bool = False,
) -> Tensor:
    """Every token's sum over its experts of share * run(expert, x), [M, H].

    An expert runs on its own tokens at once, so no more than M * k rows are held. Experts that no token chose run when `idle`,
    on none, and so get a gradient of zeros.
    """
    k = chosen_Mk.shape[1]
    order = chosen_Mk.flatten().argsort(stable=True)
    counts = _counts(chosen_Mk, experts)
    shares = share_Mk.flatten()[order].to(x_MH.dtype)
    y_MH = torch.zeros_like(x_MH)
    end = 0
    for index, count in enumerate(counts):
        if not count and not idle:
            continue
        begin, end = end, end + count
        rows = order[begin:end] // k
        own = shares[begin:end, None] * run(index, x_MH[rows])
        y_MH.index_add_(0, rows, own.to(y_MH.dtype))
    return y_MH


def _counts(chosen_Mk: Tensor, experts: int) -> list[int]:
    """How many tokens chose each expert; as many each where there are shapes alone."""
    if chosen_Mk.is_meta:
        each, more = divmod(chosen_Mk.numel(), experts)
        return [each + (index < more) for index in range(experts)]
    return chosen_Mk.flatten().bincount(minlength=experts).tolist()
