"""How adapter tensors are moved: AdamW or Muon, their learning rates by adapter, and the schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..adapters.kind import adapter_of, kinds_of
from ..adapters.table import Method
from ..config import TrainConfig
from ..drafts.base import Draft

AUTO_LR = 0.4
"""The automatic peak learning rate of a whole draft, over the hidden size: 1e-4 at 4096, as published."""
MUON = "muon"


def peak_rate(config: TrainConfig, draft: Draft) -> float:
    return config.lr or AUTO_LR * config.method_value.rate / draft.hidden_size


def make_optimizers(
    trainable: list[tuple[str, nn.Parameter]], method: Method, config: TrainConfig, draft: Draft
) -> list[torch.optim.Optimizer]:
    """What moves the tensors: AdamW(.9, .95), with `optimizer: muon` Muon for matrices next to it.

    Vectors and what starts at zero (down projections, B) are never decayed. Heads stay with AdamW, as is usual with
    Muon (Jordan 2024): their rows are tokens, most of which a batch does not hold. Muon's steps are scaled to the
    size of AdamW's (arXiv 2502.16982), so one learning rate serves both.
    """
    peak, shares, kinds = peak_rate(config, draft), config.lr_parts_value, kinds_of(method)
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        # What no adapter trains are new rows of a remapped head, whose other rows must not move.
        kind = adapter_of(name, kinds)
        decays = parameter.dim() > 1 and kind is not None and not kind.starts_at_zero(name)
        share = shares.get(kind.name, 1.0) if kind is not None else 1.0
        decay = config.weight_decay if decays else 0.0
        muon = config.optimizer == MUON and parameter.dim() == 2 and "head" not in name
        groups.setdefault((muon, peak * share, decay), []).append(parameter)

    def of(muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": ps, "weight_decay": decay, "peak": rate}
            for (is_muon, rate, decay), ps in groups.items()
            if is_muon == muon
        ]

    found: list[torch.optim.Optimizer] = []
    if of(False):
        found.append(torch.optim.AdamW(of(False), lr=peak, betas=(0.9, 0.95)))
    if of(True):
        found.append(torch.optim.Muon(of(True), lr=peak, adjust_lr_fn="match_rms_adamw"))
    return found


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    rising = max(round(steps * warmup), 1)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(steps - rising, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
