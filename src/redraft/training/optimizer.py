"""How adapter tensors are moved: AdamW, its learning rates by adapter, and their schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..adapters.kind import adapter_of, kinds_of
from ..adapters.table import Method
from ..config import TrainConfig
from ..drafts.base import Draft

AUTO_LR = 0.4
"""The automatic peak learning rate of a whole draft, over the hidden size: 1e-4 at 4096, as published."""


def peak_rate(config: TrainConfig, draft: Draft) -> float:
    return config.lr or AUTO_LR * config.method_value.rate / draft.hidden_size


def make_optimizer(
    trainable: list[tuple[str, nn.Parameter]], method: Method, config: TrainConfig, draft: Draft
) -> torch.optim.AdamW:
    """AdamW(.9, .95); vectors and what starts at zero (down projections, B) are never decayed."""
    peak, shares, kinds = peak_rate(config, draft), config.lr_parts_value, kinds_of(method)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        # What no adapter trains are new rows of a remapped head, whose other rows must not move.
        kind = adapter_of(name, kinds)
        decays = parameter.dim() > 1 and kind is not None and not kind.starts_at_zero(name)
        share = shares.get(kind.name, 1.0) if kind is not None else 1.0
        decay = config.weight_decay if decays else 0.0
        groups.setdefault((peak * share, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": d, "peak": rate} for (rate, d), ps in groups.items()],
        lr=peak,
        betas=(0.9, 0.95),
    )


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    rising = max(round(steps * warmup), 1)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(steps - rising, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
