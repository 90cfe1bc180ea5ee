"""Plain decoding, one token per target pass: the reference that speculation must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models.kv_cache import new_cache
from ..models.target import Target
from .acceptance_modes import Decoding
from .context_length import check_prompts
from .logits_pipeline import LogitsPipeline
from .noise import seeds_tensor


@torch.inference_mode()
def decode_plain(
    target: Target,
    prompt: Sequence[int],
    max_new_tokens: int,
    decoding: Decoding | None = None,
    seed: int = 0,
    logits_pipeline: LogitsPipeline | None = None,
) -> list[int]:
    """The target's answer to `prompt` (token ids), stop token included; greedy unless told.

    It ends at a stop token, after `max_new_tokens`, or where the context is full. Raises UserError
    for an empty prompt, and one that fills the context.
    """
    check_prompts(target, [prompt])
    decoding = decoding or Decoding()
    logits_pipeline = logits_pipeline or LogitsPipeline(decoding.sampling)
    seeds_B = seeds_tensor([seed], target.device)
    stop = set(target.stop_ids)
    cache = new_cache(target)
    window = torch.tensor([list(prompt)], device=target.device)
    emitted: list[int] = []
    while len(emitted) < min(max_new_tokens, target.max_positions - len(prompt)):
        logits_11V = target.read(window, (), cache, keep=1).logits_BTV
        processed_11V = logits_pipeline.processed(
            logits_11V, lambda row, position: [*prompt, *emitted]
        )
        at_11 = torch.tensor([[len(emitted)]], device=target.device)
        window = decoding.rules.choose(
            decoding.scores(logits_pipeline, processed_11V), at_11, seeds_B
        )
        emitted.append(int(window))
        if emitted[-1] in stop:
            break
    return emitted
