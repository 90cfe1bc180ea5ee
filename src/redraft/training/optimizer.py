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
BY_TOKEN = ("lm_head.", "embed_tokens.")
"""Parts of the names of tensors that have a row for each token."""
Groups = dict[tuple[float, float], list[nn.Parameter]]
"""Parameters by peak learning rate and weight decay."""


def peak_rate(config: TrainConfig, draft: Draft) -> float:
    return config.lr or AUTO_LR * config.method_value.rate / draft.hidden_size


def make_optimizers(
    trainable: list[tuple[str, nn.Parameter]], method: Method, config: TrainConfig, draft: Draft
) -> list[torch.optim.Optimizer]:
    """What moves the tensors: AdamW(.9, .95), with `optimizer: muon` Muon for matrices next to it.

    Vectors and what starts at zero (down projections, B) are never decayed. Heads and embeddings stay with AdamW, as is
    usual with Muon (Jordan 2024): a batch holds few of the tokens that their rows stand for. Muon's steps are scaled to the
    size of AdamW's (arXiv 2502.16982), so one learning rate serves both.
    """
    peak, shares, kinds = peak_rate(config, draft), config.lr_parts_value, kinds_of(method)
    adamw: Groups = {}
    muon: Groups = {}
    for name, parameter in trainable:
        # What no adapter trains are new rows of a remapped head, whose other rows must not move.
        kind = adapter_of(name, kinds)
        decays = parameter.dim() > 1 and kind is not None and not kind.starts_at_zero(name)
        share = shares.get(kind.name, 1.0) if kind is not None else 1.0
        decay = config.weight_decay if decays else 0.0
        by_token = any(part in name for part in BY_TOKEN)
        by_muon = config.optimizer == MUON and parameter.dim() == 2 and not by_token
        (muon if by_muon else adamw).setdefault((peak * share, decay), []).append(parameter)
    found: list[torch.optim.Optimizer] = []
    if adamw:
        found.append(torch.optim.AdamW(_listed(adamw), lr=peak, betas=(0.9, 0.95)))
    if muon:
        found.append(torch.optim.Muon(_listed(muon), lr=peak, adjust_lr_fn="match_rms_adamw"))
    return found


def _listed(groups: Groups) -> list[dict[str, Any]]:
    return [
        {"params": parameters, "weight_decay": decay, "peak": rate}
        for (rate, decay), parameters in groups.items()
    ]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    rising = max(round(steps * warmup), 1)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(steps - rising, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
