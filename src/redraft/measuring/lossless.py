"""Is the output with a draft the output without one? Token for token, near-ties audited.

A difference is excused only where the target itself is undecided: read again over the common
prefix, both tokens could have been chosen had the logits been off by 8 units in the last place of
their dtype (each is that close to the best one, and not further than that behind a cut by top-k, top-p
or min-p). There the order of a sum decides, not the draft.
Excused prompts are counted, never hidden.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..decode.modes import Decoding
from ..decode.noise import gumbel, seeds_tensor
from ..decode.sampling import scores
from ..records import Lossless, Prompt
from ..target import Target

ULPS = 8


def compare(
    target: Target,
    prompts: Sequence[Prompt],
    plain: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
    decoding: Decoding | None = None,
    seeds: Sequence[int] | None = None,
) -> Lossless:
    """Compare answers (greedy, or seeded) with those of plain decoding, prompt by prompt."""
    identical = excused = 0
    decoding, seeds = decoding or Decoding(), seeds or [0] * len(prompts)
    for prompt, reference, found, seed in zip(prompts, plain, other, seeds, strict=True):
        if list(reference) == list(found):
            identical += 1
        elif is_near_tie(target, prompt, reference, found, decoding, seed):
            excused += 1
    return Lossless(len(prompts), identical, excused)


@torch.inference_mode()
def is_near_tie(
    target: Target,
    prompt: Prompt,
    reference: Sequence[int],
    found: Sequence[int],
    decoding: Decoding | None = None,
    seed: int = 0,
) -> bool:
    """Whether two answers first differ where the target itself is undecided."""
    decoding = decoding or Decoding()
    shared = 0
    while shared < min(len(reference), len(found)) and reference[shared] == found[shared]:
        shared += 1
    if shared == min(len(reference), len(found)):
        return False  # one answer merely ends earlier: no tie explains that
    prefix = torch.tensor([[*prompt.tokens, *reference[:shared]]], device=target.device)
    logits_V = target.read(prefix, ()).logits_BTV[0, -1]
    unit = torch.finfo(logits_V.dtype).eps * float(logits_V.abs().max().clamp(min=1.0))
    slack = ULPS * unit / (decoding.sampling.temperature or 1.0)
    ranked_V = logits_V if decoding.mode == "greedy" else logits_V / decoding.sampling.temperature
    if decoding.mode == "seeded":
        at = torch.tensor([[shared]], device=target.device)
        ranked_V = ranked_V + gumbel(seeds_tensor([seed], target.device), at, len(logits_V))[0, 0]
    certain, possible = (_kept(logits_V, decoding, by) for by in (-slack, slack))
    least = ranked_V[certain].max() - slack
    return all(
        bool(possible[token] & (ranked_V[token] >= least))
        for token in (reference[shared], found[shared])
    )


def _kept(logits_V: Tensor, decoding: Decoding, slack: float) -> Tensor:
    """The tokens that the cuts leave, bool [V], were the logits over temperature off by `slack`."""
    s = decoding.sampling
    if decoding.mode == "greedy":
        return torch.ones_like(logits_V, dtype=torch.bool)
    kept = torch.ones_like(logits_V, dtype=torch.bool)
    if 0 < s.top_k < len(logits_V):
        scaled_V = logits_V / s.temperature
        kept = scaled_V >= scaled_V.topk(s.top_k).values[-1] - slack
    moved = replace(s, top_k=0, top_p=min(s.top_p + slack, 1.0), min_p=s.min_p * (1 - slack))
    return kept & torch.isfinite(scores(logits_V.masked_fill(~kept, float("-inf")), moved))
