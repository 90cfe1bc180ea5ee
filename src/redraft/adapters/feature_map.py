"""The feature map, in closed form: folded into `fc`; and an expert's down projection.

A linear map takes the target's features to the base's:

    M = argmin ||X M^T - Y||^2 + penalty ||M - I||^2      X target's, Y base's features, on the same tokens
    fc' = fc (I + share (M - I))

The penalty pulls towards the identity, so that without evidence the draft stays the unadapted one.

An expert adds D a to its FFN's output, a [W] being its neurons' activations. With g the loss's gradient at
that output, the loss is taken as quadratic, its curvature as an average (the Kronecker form of
Gauss-Newton, K-FAC, arXiv 1503.05671, from the gradients themselves), and the step solved for:

    step = -(E[g g^T] + penalty)^-1 E[g a^T] (E[a a^T] + penalty)^-1        [H, W]

Its length is not known (the curvature is the gradients' own), so it is searched along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.console import say
from ..core.errors import UserError
from ..drafts.base import Draft
from ..drafts.layers import GatedFFN
from ..models.target import Target
from .kind import AdapterKind, FitBatch, Fitted, Setup
from .table import Method

PENALTY = 1e-2
"""Times the mean square of a feature, per position."""
DAMPING = 1.0
"""Times the mean of a curvature's diagonal, for either side of an expert's step."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far to follow the map; the share with the smallest loss is taken, 0 being the unadapted draft."""
CHOSEN_ON = 4
"""The last batches decide how far a step is followed; an expert is not fitted on them."""
ROUNDS = 8
LENGTHS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Lengths tried of a step of an expert's down projection; 0 stays where it is."""


class FeatureMapping(AdapterKind):
    def check(self, draft: Draft, method: Method, setup: Setup) -> None:
        if "expert" not in method.adapters:
            mapped_layer(draft)

    def written(self, draft: Draft) -> list[str]:
        return [name for name, _ in draft.named_parameters()]

    def fit(
        self, draft: Draft, target: Target, base: Target, batches: Callable[[], list[FitBatch]]
    ) -> Fitted:
        seen = batches()
        sizes = [one.size for one in seen]
        tensors: dict[str, Tensor] = {}
        read, searched = sum(sizes), 0
        if maps_features(draft):
            tensors |= _map_features(base, draft, seen)
            read += sum(sizes)
            searched += len(SHARES) * sum(sizes[-CHOSEN_ON:])
        if downs := _down_projections(draft):
            tensors |= _fit_experts(downs, seen)
            fitted = 3 * sum(sizes[:-CHOSEN_ON] or sizes)
            searched += ROUNDS * (fitted + len(LENGTHS) * sum(sizes[-CHOSEN_ON:]))
        return Fitted(tensors, read, searched)


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
        """The neurons' activations, and the loss's gradient at the FFN's output, position by position."""
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


# -- on a draft --------------------------------------------------------------------------------


def _map_features(base: Target, draft: Draft, batches: Sequence[FitBatch]) -> dict[str, Tensor]:
    """Fold the map into fc, in place, as far as it lowers the loss."""
    fc = mapped_layer(draft)
    fitted = FeatureMap(draft.feature_size)
    with torch.no_grad():
        for one in batches:
            batch = one.batch
            real = (
                torch.arange(batch.tokens_BT.shape[1], device=base.device) < batch.ends_B[:, None]
            )
            theirs = base.read(batch.tokens_BT, draft.aux_layers, keep=1).features_BTF
            x, y = (_entering(draft, fc, f) for f in (one.features_BTF, theirs))
            fitted.add(x[real], y[real])
        map_FF, old = fitted.solve(), fc.weight.detach().clone()

        def follow(share: float) -> None:
            fc.weight.copy_(folded(old, map_FF, share) if share else old)

        tried = _search(follow, SHARES, batches)
    say(f"feature-map: map of features from {fitted.positions:,} positions, loss by share {tried}")
    return {"fc.weight": fc.weight}


def _down_projections(draft: Draft) -> dict[str, nn.Linear]:
    """The experts' down projections, by stored name."""
    return {
        f"{name}.private.down_proj.weight": module.private.down_proj
        for name, module in draft.named_modules()
        if isinstance(module, GatedFFN) and module.private is not None
    }


def _fit_experts(downs: dict[str, nn.Linear], batches: Sequence[FitBatch]) -> dict[str, Tensor]:
    """Fit the experts' down projections, in place, in ROUNDS steps each searched along."""
    for round_ in range(ROUNDS):
        fits = _gather(batches, list(downs.values()))
        steps = [fit.solve() for fit in fits]
        olds = [down.weight.detach().clone() for down in downs.values()]

        def follow(share: float, steps: list[Tensor] = steps, olds: list[Tensor] = olds) -> None:
            for down, old, step in zip(downs.values(), olds, steps, strict=True):
                down.weight.copy_(old + share * step.to(old))

        with torch.no_grad():
            tried = _search(follow, LENGTHS, batches)
        say(f"feature-map: expert, step {round_ + 1} of {ROUNDS}, loss by length {tried}")
    return {name: down.weight for name, down in downs.items()}


def _gather(batches: Sequence[FitBatch], downs: Sequence[nn.Linear]) -> list[DownFit]:
    """What each projection reads, and the loss's gradient at its output, over all batches but the last."""
    fits = [DownFit(down.out_features, down.in_features) for down in downs]
    hooks = []
    for down, fit in zip(downs, fits, strict=True):

        def keep(_: nn.Module, inputs: tuple[Tensor], output: Tensor, fit: DownFit = fit) -> None:
            a = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda g: fit.add(a, g.flatten(0, -2)))  # type: ignore[no-untyped-call]

        hooks.append(down.register_forward_hook(keep))
    wanted = [down.weight.requires_grad for down in downs]
    try:
        for down in downs:
            down.weight.requires_grad_(True)  # so that a gradient reaches what it gives
        for one in batches[:-CHOSEN_ON] or batches:
            loss, count = one.loss()
            torch.autograd.backward([loss * count], inputs=[down.weight for down in downs])
    finally:
        for hook in hooks:
            hook.remove()
        for down, was in zip(downs, wanted, strict=True):
            down.weight.requires_grad_(was)
            down.weight.grad = None
    return fits


def _search(
    follow: Callable[[float], None], shares: Sequence[float], batches: Sequence[FitBatch]
) -> str:
    """Follow a step as far as the loss of CHOSEN_ON batches is smallest; returns what was tried."""
    losses = {}
    for share in shares:
        follow(share)
        found = [float(one.loss()[0]) for one in batches[-CHOSEN_ON:]]
        losses[share] = sum(found) / len(found)
    follow(min(shares, key=losses.__getitem__))
    return ", ".join(f"{share:g}: {loss:.3f}" for share, loss in losses.items())


def _entering(draft: Any, fc: nn.Module, features_BTF: Tensor) -> Tensor:
    """What enters fc: the features, normed where the draft norms them."""
    caught: list[Tensor] = []
    hook = fc.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        draft.first_state(features_BTF.to(next(fc.parameters()).dtype))
    finally:
        hook.remove()
    return caught[0]
