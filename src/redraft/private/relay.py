"""Relay: a linear map of the target's features onto the base's, folded into the draft's `fc`.

    M = argmin ||X M^T - Y||^2 + penalty ||M - I||^2      X target's, Y base's features, on the same tokens
    fc' = fc (I + share (M - I))

The penalty pulls towards the identity, so that without evidence the draft stays the reused one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..drafts.base import Draft
from ..errors import UserError

PENALTY = 1e-2
"""Times the mean square of a feature, per position."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far to follow the map; the share with the smallest loss is taken, 0 being the reused draft."""


def mapped_layer(draft: Draft) -> nn.Linear:
    """The layer that only features enter. Raises UserError for a draft that has none."""
    fc: Any = getattr(draft, "fc", None)
    fc = getattr(fc, "base_layer", fc)  # beneath a low-rank pair
    if isinstance(fc, nn.Linear) and fc.in_features == draft.feature_size:
        return fc
    raise UserError(
        f"relay maps features where only features enter fc, which this {draft.kind} draft does not "
        "have; train it instead (expert, lora, full)"
    )


class FeatureMap:
    """Sums over positions from which the map follows; positions may come in any number of batches."""

    def __init__(self, size: int):
        self.size = size
        self.xx_FF = torch.zeros(size, size, dtype=torch.float64)
        self.dx_FF = torch.zeros(size, size, dtype=torch.float64)
        self.positions = 0

    def add(self, x_NF: Tensor, y_NF: Tensor) -> None:
        """Target's and base's features at the same positions."""
        x, y = x_NF.double().cpu(), y_NF.double().cpu()
        self.xx_FF += x.T @ x
        self.dx_FF += (y - x).T @ x
        self.positions += len(x)

    def solve(self, penalty: float = PENALTY) -> Tensor:
        """M [F, F], float64. Raises ValueError before anything was added."""
        if not self.positions:
            raise ValueError("no features were added")
        scale = penalty * float(self.xx_FF.diagonal().mean())
        eye = torch.eye(self.size, dtype=torch.float64)
        # (M - I) (XX + scale I) = DX, symmetric on the right.
        step_FF: Tensor = torch.linalg.solve(self.xx_FF + scale * eye, self.dx_FF.T)
        return eye + step_FF.T


def folded(fc_HF: Tensor, map_FF: Tensor, share: float) -> Tensor:
    """fc followed by a share of the map, in fc's dtype."""
    eye = torch.eye(len(map_FF), dtype=torch.float64)
    step = eye + share * (map_FF - eye)
    return (fc_HF.double().cpu() @ step).to(fc_HF)
