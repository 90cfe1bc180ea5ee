"""An FFN of routed experts, as an MTP head of a model with such layers has it.

    chosen, share = router(x)
    y             = sum over the chosen of share * expert(x), and a shared expert's output

Two routers. *softmax* (Qwen): p = softmax(gate x), the k most probable experts, their p divided by the sum of those k where
`normalised`; the shared expert's output is multiplied by sigmoid(shared_expert_gate x). *sigmoid* (GLM, DeepSeek-V3): s =
sigmoid(gate x); experts are chosen by s + bias, within the best groups, a group being as good as its two best; their s are
the shares, normalised, times `scale`; the shared expert is added whole.

Names are those of Transformers' modules, with the experts' weights packed. Experts and router are never trained: they are the
bulk of the head, and which of them run is the base's.

Shapes: M tokens, H hidden, E experts, I an expert's width, k experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import ACTIVATIONS
from ..routing import Expert, sum_of_chosen, wide

FROZEN = ("experts.", "gate.")
"""Beginnings of the names of what is never trained, within the FFN."""
BEST_OF_GROUP = 2


@dataclass(frozen=True)
class RoutedShape:
    """Numbers and widths of experts, and how they are chosen."""

    experts: int
    per_token: int
    width: int
    shared_width: int = 0
    """0: there is no shared expert."""
    normalised: bool = True
    sigmoid: bool = False
    groups: int = 1
    groups_per_token: int = 1
    scale: float = 1.0
    packed: bool = False
    """Whether the file holds the experts' weights as one tensor for all. The function is the same."""

    def __str__(self) -> str:
        shared = f" and a shared one of {self.shared_width}" if self.shared_width else ""
        return (
            f"{self.experts} experts of {self.width} neurons ({self.per_token} per token){shared}"
        )


class Router(nn.Module):
    """Which experts run for a token, and with which shares."""

    e_score_correction_bias: Tensor

    def __init__(self, hidden: int, shape: RoutedShape):
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(shape.experts, hidden))
        if shape.sigmoid:
            self.register_buffer("e_score_correction_bias", torch.zeros(shape.experts))

    def forward(self, x_MH: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and shares of the chosen experts, [M, k] each; shares in float32, or float64 of such an x."""
        if self.shape.sigmoid:
            chosen, share = self._sigmoid(x_MH)
        else:
            share, chosen = (
                F.linear(x_MH, self.weight)
                .softmax(-1, dtype=wide(x_MH))
                .topk(self.shape.per_token, dim=-1)
            )
        if self.shape.normalised:
            share = share / share.sum(-1, keepdim=True)
        return chosen, share * self.shape.scale

    def _sigmoid(self, x_MH: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_MH.device.type, enabled=False):
            logits = F.linear(x_MH.to(wide(x_MH)), self.weight.to(wide(x_MH)))
        score = logits.sigmoid()
        rank = score.detach() + self.e_score_correction_bias
        by_group = rank.view(len(rank), self.shape.groups, -1)
        if self.shape.groups_per_token < self.shape.groups:
            best = by_group.topk(BEST_OF_GROUP, dim=-1).values.sum(-1)
            kept = best.topk(self.shape.groups_per_token, dim=-1).indices
            left_out = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
            rank = by_group.masked_fill(left_out[..., None], -torch.inf).flatten(1)
        chosen = rank.topk(self.shape.per_token, dim=-1).indices
        return chosen, score.gather(1, chosen)


class PackedExperts(nn.Module):
    """All experts in two tensors: gate_up_proj [E, 2I, H], the gates first, and down_proj [E, H, I]."""

    def __init__(self, hidden: int, shape: RoutedShape, activation: str):
        super().__init__()
        E, wide_ = shape.experts, shape.width
        self.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * wide_, hidden))
        self.down_proj = nn.Parameter(torch.zeros(E, hidden, wide_))
        self.activation = activation

    def forward(self, index: int, x_MH: Tensor) -> Tensor:
        """What expert `index` makes of its tokens."""
        gate, up = F.linear(x_MH, self.gate_up_proj[index]).chunk(2, dim=-1)
        return F.linear(ACTIVATIONS[self.activation](gate) * up, self.down_proj[index])


class ShareGate(nn.Module):
    """sigmoid(w x), by which a shared expert's output is multiplied. No linear layer to adapters: its rank is 1."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid()


class RoutedFFN(nn.Module):
    """Routed experts behind their router, and the shared expert."""

    def __init__(self, hidden: int, shape: RoutedShape, activation: str):
        super().__init__()
        self.gate = Router(hidden, shape)
        self.experts = PackedExperts(hidden, shape, activation)
        self.shared_expert: Expert | None = None
        self.shared_experts: Expert | None = None
        if shape.shared_width and shape.sigmoid:
            self.shared_experts = Expert(hidden, shape.shared_width, activation)
        elif shape.shared_width:
            self.shared_expert = Expert(hidden, shape.shared_width, activation)
            self.shared_expert_gate = ShareGate(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x_MH = x.reshape(-1, x.shape[-1])
        chosen_Mk, share_Mk = self.gate(x_MH)
        y_MH = sum_of_chosen(x_MH, chosen_Mk, share_Mk, self.gate.shape.experts, self.experts)
        if self.shared_experts is not None:
            y_MH = y_MH + self.shared_experts(x_MH)
        if self.shared_expert is not None:
            y_MH = y_MH + self.shared_expert_gate(x_MH) * self.shared_expert(x_MH)
        return y_MH.view(x.shape)
