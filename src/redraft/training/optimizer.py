"""How adapter tensors are moved: AdamW, its learning rates by part, and their schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..adapters.table import ADAPTERS, Method
from ..config import TrainConfig
from ..drafts.base import Draft

AUTO_LR = 0.4
"""The automatic peak learning rate is this over the hidden size: 1e-4 at 4096, as published."""
PRIVATE_LR = 4.0
"""Times that where only some of the draft is trained: the rates tuned for such rows of the methods
bench (`rate` in docs/results/methods.jsonl) are two to four times those of whole drafts."""


def peak_rate(config: TrainConfig, draft: Draft) -> float:
    whole = any(ADAPTERS[part].whole for part in config.method_value.parts)
    return config.lr or AUTO_LR * (1.0 if whole else PRIVATE_LR) / draft.hidden_size


def make_optimizer(
    trainable: list[tuple[str, nn.Parameter]], method: Method, config: TrainConfig, draft: Draft
) -> torch.optim.AdamW:
    """AdamW(.9, .95); vectors and what starts at zero (down projections, B) are never decayed."""
    peak, shares = peak_rate(config, draft), config.lr_parts_value
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        zero_started = name.endswith(("private.down_proj.weight", "lora_B.weight"))
        # What no part owns are new rows of a remapped head, whose other rows must not move.
        part = next((p for p in method.parts if Method("", (p,)).owns(name)), None)
        decays = parameter.dim() > 1 and not zero_started and part is not None
        decay = config.weight_decay if decays else 0.0
        groups.setdefault((peak * shares.get(part or "", 1.0), decay), []).append(parameter)
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
