"""Relay, in closed form: a map of features folded into `fc`, and an expert's down projection.

A linear map takes the target's features to the base's:

    M = argmin ||X M^T - Y||^2 + penalty ||M - I||^2      X target's, Y base's features, on the same tokens
    fc' = fc (I + share (M - I))

The penalty pulls towards the identity, so that without evidence the draft stays the unadapted one.

An expert adds D a to its FFN's output, a [W] being what its neurons say. With g the loss's gradient at
that output, the loss is taken as quadratic, its curvature as an average (the Kronecker form of
Gauss-Newton, K-FAC, arXiv 1503.05671, from the gradients themselves), and the step solved for:

    step = -(E[g g^T] + penalty)^-1 E[g a^T] (E[a a^T] + penalty)^-1        [H, W]

Its length is not known (the curvature is the gradients' own), so it is searched along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..drafts.base import Draft

PENALTY = 1e-2
"""Times the mean square of a feature, per position."""
DAMPING = 1.0
"""Times the mean of a curvature's diagonal, for either side of an expert's step."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far to follow the map; the share with the smallest loss is taken, 0 being the unadapted draft."""


def maps_features(draft: Draft) -> bool:
    """Whether a draft has a layer that only features enter, which the map can be folded into."""
    fc = _fc(draft)
    return isinstance(fc, nn.Linear) and fc.in_features == draft.feature_size


def mapped_layer(draft: Draft) -> nn.Linear:
    """That layer. Raises UserError for a draft that has none."""
    if maps_features(draft):
        found: nn.Linear = _fc(draft)
        return found
    raise UserError(
        f"feature-map maps features where only features enter fc, which this {draft.kind} draft does not "
        "have; fit an expert (feature-map+expert), or train (expert, lora, full)"
    )


def _fc(draft: Draft) -> Any:
    fc: Any = getattr(draft, "fc", None)
    return getattr(fc, "base_layer", fc)  # beneath a low-rank pair


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


class DownFit:
    """Sums over positions from which an expert's down projection follows; any number of batches."""

    def __init__(self, hidden: int, width: int):
        self.gg_HH = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.ga_HW = torch.zeros(hidden, width, dtype=torch.float64)
        self.aa_WW = torch.zeros(width, width, dtype=torch.float64)
        self.positions = 0

    def add(self, a_NW: Tensor, g_NH: Tensor) -> None:
        """What the neurons said, and the loss's gradient at the FFN's output, position by position."""
        a, g = a_NW.double().cpu(), g_NH.double().cpu()
        self.gg_HH += g.T @ g
        self.ga_HW += g.T @ a
        self.aa_WW += a.T @ a
        self.positions += len(a)

    def solve(self, penalty: float = DAMPING) -> Tensor:
        """The step [H, W], float64. Raises ValueError before anything was added."""
        if not self.positions:
            raise ValueError("no positions were added")
        left = _damped(self.gg_HH / self.positions, penalty)
        right = _damped(self.aa_WW / self.positions, penalty)
        half_HW = torch.linalg.solve(left, self.ga_HW / self.positions)
        step_WH: Tensor = torch.linalg.solve(right, half_HW.T)
        return -step_WH.T


def _damped(square: Tensor, penalty: float) -> Tensor:
    scale = penalty * float(square.diagonal().mean())
    return square + max(scale, 1e-30) * torch.eye(len(square), dtype=square.dtype)
