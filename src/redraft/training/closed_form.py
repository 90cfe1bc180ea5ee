"""Starts in closed form: what `feature-map` and `weight-sync` change in a draft before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import put
from ..adapters.expert import widenable
from ..adapters.feature_map import (
    SHARES,
    DownFit,
    FeatureMap,
    folded,
    mapped_layer,
    maps_features,
)
from ..adapters.table import Method
from ..adapters.weight_sync import renewed
from ..config import TrainConfig
from ..core.console import say
from ..core.records import Answer
from ..drafts.base import Draft
from ..models.batching import collate
from ..models.target import Target
from .teacher_batch import TeacherBatch, read_teacher_batch, rollout_loss

FITTED_ON = 32
"""Batches whose features the map is fitted on."""
CHOSEN_ON = 4
"""The last batches decide how far a step is followed; an expert is not fitted on them."""
ROUNDS = 8
LENGTHS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Lengths tried of a step of an expert's down projection; 0 stays where it is."""


@dataclass(frozen=True)
class Fitted:
    """The tensors that changed (CPU, by stored name), and the tokens read for it: by the target and
    its base, and by the draft, a backward pass counting as two readings."""

    tensors: dict[str, Tensor]
    target_tokens: int = 0
    draft_tokens: int = 0
    seconds: float = 0.0


def fit_closed_form(
    target: Target,
    base: Target | None,
    draft: Draft,
    method: Method,
    config: TrainConfig,
    answers: Sequence[Answer],
    plan: list[list[int]],
) -> Fitted:
    """Fit the method's starts in place.

    `base` is there for every method that has a start (see `preconditions.py`).
    """
    changed: dict[str, Tensor] = {}
    read = searched = 0
    began = time.monotonic()
    if "weight-sync" in method.closed_form and base is not None:
        found = renewed(draft, base, target)
        if not found:
            say(
                "weight-sync: the draft holds no copy of the base's tensors that changed; nothing to do"
            )
        changed |= found
        put(draft, found)
    if "feature-map" in method.closed_form and base is not None:
        teacher_batches = [
            _teacher_batch(target, draft, answers, indices) for indices in plan[:FITTED_ON]
        ]
        sizes = [teacher_batch.batch.tokens_BT.numel() for teacher_batch in teacher_batches]
        if maps_features(draft):
            changed |= _map_features(base, draft, config, teacher_batches)
            read += sum(sizes)
            searched += len(SHARES) * sum(sizes[-CHOSEN_ON:])
        if method.expert:
            changed |= _fit_experts(draft, config, teacher_batches)
            fitted = 3 * sum(sizes[:-CHOSEN_ON] or sizes)
            searched += ROUNDS * (fitted + len(LENGTHS) * sum(sizes[-CHOSEN_ON:]))
        read += sum(sizes)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in changed.items()}
    return Fitted(tensors, read, searched, time.monotonic() - began)


def _teacher_batch(
    target: Target, draft: Draft, answers: Sequence[Answer], indices: Sequence[int]
) -> TeacherBatch:
    batch = collate([answers[i] for i in indices], target.device)
    return read_teacher_batch(target, batch, draft.aux_layers)


def _map_features(
    base: Target, draft: Draft, config: TrainConfig, teacher_batches: Sequence[TeacherBatch]
) -> dict[str, Tensor]:
    """Fold the map into fc, in place, as far as it lowers the loss."""
    fc = mapped_layer(draft)
    fitted = FeatureMap(draft.feature_size)
    with torch.no_grad():
        for teacher_batch in teacher_batches:
            batch = teacher_batch.batch
            real = (
                torch.arange(batch.tokens_BT.shape[1], device=base.device) < batch.ends_B[:, None]
            )
            theirs = base.read(batch.tokens_BT, draft.aux_layers, keep=1).features_BTF
            x, y = (_entering(draft, fc, f) for f in (teacher_batch.features_BTF, theirs))
            fitted.add(x[real], y[real])
        map_FF, old = fitted.solve(), fc.weight.detach().clone()

        def follow(share: float) -> None:
            fc.weight.copy_(folded(old, map_FF, share) if share else old)

        said = _search(follow, SHARES, draft, config, teacher_batches)
    say(f"feature-map: map of features from {fitted.positions:,} positions, loss by share {said}")
    return {"fc.weight": fc.weight}


def _fit_experts(
    draft: Draft, config: TrainConfig, teacher_batches: Sequence[TeacherBatch]
) -> dict[str, Tensor]:
    """Fit the experts' down projections, in place, in ROUNDS steps each searched along."""
    downs = {
        f"{name}.private.down_proj.weight": ffn.private.down_proj
        for name, ffn in widenable(draft).items()
        if ffn.private is not None
    }
    for round_ in range(ROUNDS):
        fits = _gather(draft, config, teacher_batches, list(downs.values()))
        steps = [fit.solve() for fit in fits]
        olds = [down.weight.detach().clone() for down in downs.values()]

        def follow(share: float, steps: list[Tensor] = steps, olds: list[Tensor] = olds) -> None:
            for down, old, step in zip(downs.values(), olds, steps, strict=True):
                down.weight.copy_(old + share * step.to(old))

        with torch.no_grad():
            said = _search(follow, LENGTHS, draft, config, teacher_batches)
        say(f"feature-map: expert, step {round_ + 1} of {ROUNDS}, loss by length {said}")
    return {name: down.weight for name, down in downs.items()}


def _gather(
    draft: Draft,
    config: TrainConfig,
    teacher_batches: Sequence[TeacherBatch],
    downs: Sequence[nn.Linear],
) -> list[DownFit]:
    """What each projection reads, and the loss's gradient at what it gives, over all teacher batches."""
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
        for teacher_batch in teacher_batches[:-CHOSEN_ON] or teacher_batches:
            loss, count = rollout_loss(teacher_batch, draft, config)
            torch.autograd.backward([loss * count], inputs=[down.weight for down in downs])
    finally:
        for hook in hooks:
            hook.remove()
        for down, was in zip(downs, wanted, strict=True):
            down.weight.requires_grad_(was)
            down.weight.grad = None
    return fits


def _search(
    follow: Callable[[float], None],
    shares: Sequence[float],
    draft: Draft,
    config: TrainConfig,
    teacher_batches: Sequence[TeacherBatch],
) -> str:
    """Follow a step as far as the loss of CHOSEN_ON batches is smallest; says what was tried."""
    losses = {}
    for share in shares:
        follow(share)
        found = [
            float(rollout_loss(teacher_batch, draft, config)[0])
            for teacher_batch in teacher_batches[-CHOSEN_ON:]
        ]
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
