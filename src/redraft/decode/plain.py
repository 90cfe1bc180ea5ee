"""Plain decoding, one token per target pass: the reference that speculation must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..target import Target
from .cache import new_cache


@torch.inference_mode()
def decode_plain(target: Target, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The target's greedy answer to `prompt` (token ids), stop token included."""
    stop = set(target.stop_ids)
    cache = new_cache(target)
    window = torch.tensor([list(prompt)], device=target.device)
    emitted: list[int] = []
    while len(emitted) < max_new_tokens:
        logits = target.read(window, (), cache).logits_BTV
        token = logits[0, -1].argmax()
        emitted.append(int(token))
        if emitted[-1] in stop:
            break
        window = token.view(1, 1)
    return emitted
