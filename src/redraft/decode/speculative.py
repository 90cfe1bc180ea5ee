"""Speculative decoding with a chain of K drafted tokens, one prompt at a time, greedy.

One step: the draft proposes K tokens, the target reads them in one pass and makes its own choice
at K+1 positions, `verify` says how many are accepted, both caches forget the rest, and the draft
reads the accepted tokens again from the target's true features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..drafts.base import Draft
from ..target import Target
from .cache import new_cache, roll_back
from .verify import accept_greedy


@dataclass(frozen=True)
class Decoded:
    """An answer (stop token included), the tokens accepted in each step, and what ran past the end.

    Steps are counted in full, also the last one, whose tokens may run past the stop; `overrun`
    holds those.
    """

    tokens: list[int]
    accepted: list[int]
    overrun: list[int]


@torch.inference_mode()
def decode_speculative(
    target: Target, draft: Draft, prompt: Sequence[int], k: int, max_new_tokens: int
) -> Decoded:
    """Greedy decoding with a draft: the same tokens as `decode_plain`, in fewer target passes."""
    stop = set(target.stop_ids)
    cache, draft_cache = new_cache(target), draft.new_cache()
    reading = target.read(_row(prompt, target), draft.taps, cache)
    emitted = [int(reading.logits_BTV[0, -1].argmax())]
    state = draft.absorb(draft_cache, _row([*prompt[1:], emitted[0]], target), reading.features_BTF)
    accepted: list[int] = []
    while not _finished(emitted, stop, max_new_tokens):
        drafted = draft.propose(draft_cache, state, k)
        reading = target.read(_row([emitted[-1], *drafted], target), draft.taps, cache)
        chosen: list[int] = reading.logits_BTV[0].argmax(-1).tolist()
        n = accept_greedy(drafted, chosen)
        roll_back(cache, k - n)
        emitted += [*drafted[:n], chosen[n]]
        accepted.append(n)
        state = draft.absorb(
            draft_cache, _row(emitted[-n - 1 :], target), reading.features_BTF[:, : n + 1]
        )
    length = _answer_length(emitted, stop, max_new_tokens)
    return Decoded(emitted[:length], accepted, emitted[length:])


def _row(tokens: Sequence[int], target: Target) -> Tensor:
    return torch.tensor([list(tokens)], device=target.device)


def _finished(emitted: list[int], stop: set[int], max_new_tokens: int) -> bool:
    return _answer_length(emitted, stop, max_new_tokens) < len(emitted) or (
        emitted[-1] in stop or len(emitted) >= max_new_tokens
    )


def _answer_length(emitted: list[int], stop: set[int], max_new_tokens: int) -> int:
    """Tokens up to and including the first stop token, at most `max_new_tokens`."""
    for position, token in enumerate(emitted[:max_new_tokens]):
        if token in stop:
            return position + 1
    return min(len(emitted), max_new_tokens)
