"""Is the output with a draft the output without one? Token for token, near-ties audited.

A greedy difference is excused only where the target's two best logits, read again over the common
prefix, lie closer than 8 units in the last place of its dtype: there the order of a sum decides,
not the draft. Excused prompts are counted, never hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..records import Lossless, Prompt
from ..target import Target

ULPS = 8


def compare(
    target: Target,
    prompts: Sequence[Prompt],
    plain: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
) -> Lossless:
    """Compare answers with those of plain decoding, prompt by prompt."""
    identical = excused = 0
    for prompt, reference, found in zip(prompts, plain, other, strict=True):
        if list(reference) == list(found):
            identical += 1
        elif is_near_tie(target, prompt, reference, found):
            excused += 1
    return Lossless(len(prompts), identical, excused)


@torch.inference_mode()
def is_near_tie(
    target: Target, prompt: Prompt, reference: Sequence[int], found: Sequence[int]
) -> bool:
    """Whether two answers first differ where the target itself is undecided."""
    shared = 0
    while shared < min(len(reference), len(found)) and reference[shared] == found[shared]:
        shared += 1
    if shared == min(len(reference), len(found)):
        return False  # one answer merely ends earlier: no tie explains that
    prefix = torch.tensor([[*prompt.tokens, *reference[:shared]]], device=target.device)
    logits_V = target.read(prefix, ()).logits_BTV[0, -1]
    best = logits_V.topk(2)
    unit = torch.finfo(logits_V.dtype).eps * best.values[0].abs().clamp(min=1.0)
    tied = bool(best.values[0] - best.values[1] < ULPS * unit)
    return tied and {reference[shared], found[shared]} == set(best.indices.tolist())
