"""Starts in closed form: what `relay` and `refresh` change in a draft before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import collate
from ..config import TrainConfig
from ..console import say
from ..drafts.base import Draft
from ..errors import UserError
from ..methods import Method
from ..private.part import put
from ..private.refresh import renewed
from ..private.relay import SHARES, FeatureMap, folded, mapped_layer
from ..records import Answer
from ..target import Target
from .lesson import read_lesson, rollout_loss

FITTED_ON = 32
"""Batches whose features the map is fitted on."""
CHOSEN_ON = 4
"""Batches on whose loss the share of the map is chosen."""


def fit_starts(
    target: Target,
    base: Target | None,
    draft: Draft,
    method: Method,
    config: TrainConfig,
    answers: Sequence[Answer],
    plan: list[list[int]],
) -> dict[str, Tensor]:
    """Fit the method's starts in place; returns the tensors that changed, by stored name.

    Raises UserError without the base model, and for a draft that a start does not apply to.
    """
    changed: dict[str, Tensor] = {}
    if method.starts and base is None:
        raise UserError(
            f"method {method.name} compares the target with the model it was tuned from: name that "
            "with --base"
        )
    if "refresh" in method.starts and base is not None:
        found = renewed(draft, base, target)
        if not found:
            say(
                "refresh: the draft holds no copy of the base's tensors that changed; nothing to do"
            )
        changed |= found
        put(draft, found)
    if "relay" in method.starts and base is not None:
        relayed = _relay(target, base, draft, config, answers, plan)
        changed |= relayed
    return {name: tensor.detach().cpu().clone() for name, tensor in changed.items()}


def _relay(
    target: Target,
    base: Target,
    draft: Draft,
    config: TrainConfig,
    answers: Sequence[Answer],
    plan: list[list[int]],
) -> dict[str, Tensor]:
    fc = mapped_layer(draft)
    batches = [
        collate([answers[i] for i in indices], target.device) for indices in plan[:FITTED_ON]
    ]
    fitted = FeatureMap(draft.feature_size)
    with torch.no_grad():
        for batch in batches:
            real = (
                torch.arange(batch.tokens_BT.shape[1], device=target.device) < batch.ends_B[:, None]
            )
            x, y = (
                _entering(draft, fc, model.read(batch.tokens_BT, draft.taps, keep=1).features_BTF)
                for model in (target, base)
            )
            fitted.add(x[real], y[real])
        map_FF, old = fitted.solve(), fc.weight.detach().clone()
        lessons = [read_lesson(target, batch, draft.taps) for batch in batches[:CHOSEN_ON]]
        losses = {}
        for share in SHARES:
            fc.weight.copy_(folded(old, map_FF, share))
            losses[share] = sum(float(rollout_loss(each, draft, config)[0]) for each in lessons)
        best = min(SHARES, key=losses.__getitem__)
        fc.weight.copy_(folded(old, map_FF, best) if best else old)
    said = ", ".join(f"{share:g}: {loss / len(lessons):.3f}" for share, loss in losses.items())
    say(f"relay: {fitted.positions:,} positions, loss by share of the map {said}")
    return {"fc.weight": fc.weight}


def _entering(draft: Any, fc: nn.Module, features_BTF: Tensor) -> Tensor:
    """What enters fc: the features, normed where the draft norms them."""
    caught: list[Tensor] = []
    hook = fc.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        draft.first_state(features_BTF.to(next(fc.parameters()).dtype))
    finally:
        hook.remove()
    return caught[0]
