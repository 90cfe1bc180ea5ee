"""An FFN of routed experts: what EDA's reference code trains where redraft trains one private expert.

Source: EDA (arXiv 2603.09527) and its published code. There are two groups, shared and private,
each with its own router. Per token and group, p = softmax(gate x), the k most probable experts run,
and their outputs are added with their p divided by the sum of those k. The groups are added.

With one expert in a group and k = 1 its weight is exactly 1, whatever the gate says: one of each
is a plain wider FFN. Otherwise the sum depends on the token, and no dense layer is equal to it.

Shapes: M tokens, H hidden, E experts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..routing import Expert, sum_of_chosen, wide


@dataclass(frozen=True)
class RoutedShape:
    """Numbers of experts, how many of them run for a token, and the width of a private one.

    A shared expert is as wide as the layer's `intermediate_size`.
    """

    shared: int
    private: int
    top_k_shared: int
    top_k_private: int
    private_width: int

    @property
    def dense(self) -> bool:
        """Whether the routers have nothing to choose: one expert of each group."""
        return self.shared == self.private == 1

    def __str__(self) -> str:
        return (
            f"{self.shared} shared experts ({self.top_k_shared} per token), "
            f"{self.private} private ({self.top_k_private} per token)"
        )


class RoutedExperts(nn.Module):
    """Shared and private experts behind their routers."""

    def __init__(self, hidden: int, width: int, shape: RoutedShape, activation: str):
        super().__init__()
        self.shape = shape
        self.shared_gate = nn.Linear(hidden, shape.shared, bias=False)
        self.private_gate = nn.Linear(hidden, shape.private, bias=False)
        self.shared_experts = nn.ModuleList(
            [Expert(hidden, width, activation) for _ in range(shape.shared)]
        )
        self.private_experts = nn.ModuleList(
            [Expert(hidden, shape.private_width, activation) for _ in range(shape.private)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x_MH = x.reshape(-1, x.shape[-1])
        shared = _mix(x_MH, self.shared_gate, self.shared_experts, self.shape.top_k_shared)
        private = _mix(x_MH, self.private_gate, self.private_experts, self.shape.top_k_private)
        return (shared + private).view(x.shape)


def _mix(x_MH: Tensor, gate: nn.Module, experts: nn.ModuleList, k: int) -> Tensor:
    """One group's share of the output [M, H]. Routers decide in float32; float64 stays."""
    p_Mk, chosen_Mk = gate(x_MH).softmax(-1, dtype=wide(x_MH)).topk(k, dim=-1)
    share_Mk = p_Mk / p_Mk.sum(-1, keepdim=True)
    return sum_of_chosen(
        x_MH, chosen_Mk, share_Mk, len(experts), lambda index, x: experts[index](x), idle=True
    )
