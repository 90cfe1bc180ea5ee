"""Closed-form initialisation: what `weight-sync` and `feature-map` change in a draft before training."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from ..adapters.kind import FitBatch, Fitted, kinds_of
from ..adapters.table import Method
from ..config import TrainConfig
from ..core.records import Answer
from ..drafts.base import Draft
from ..models.batching import collate
from ..models.target import Target
from .teacher_batch import read_teacher_batch, rollout_loss

FITTED_ON = 32
"""Batches that are looked at."""


def fit_closed_form(
    target: Target,
    base: Target | None,
    draft: Draft,
    method: Method,
    config: TrainConfig,
    answers: Sequence[Answer],
    plan: list[list[int]],
) -> Fitted:
    """Fit the method's closed-form adapters in place, one after the other.

    `base` is there for every method that has one (see `preconditions.py`).
    """

    def batches() -> list[FitBatch]:
        return [fit_batch(indices) for indices in plan[:FITTED_ON]]

    def fit_batch(indices: list[int]) -> FitBatch:
        batch = collate([answers[i] for i in indices], target.device)
        read = read_teacher_batch(target, batch, draft.aux_layers)
        return FitBatch(batch, read.features_BTF, lambda: rollout_loss(read, draft, config))

    found, began = Fitted(), time.monotonic()
    for kind in kinds_of(method):
        if kind.row.closed_form and base is not None:
            fitted = kind.fit(draft, target, base, batches)
            found = Fitted(
                found.tensors | {n: t.detach().cpu().clone() for n, t in fitted.tensors.items()},
                found.target_tokens + fitted.target_tokens,
                found.draft_tokens + fitted.draft_tokens,
            )
    return dataclasses.replace(found, seconds=time.monotonic() - began)
