"""What a step costs on this machine, and the number of drafted tokens that follows from it.

Predicted speed-up of K drafted tokens: tau(K) / (K c + v(K)), where tau(K) = 1 + sum over k of the
product of the first k acceptance rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from ..core.records import KChoice, Prompt, StepCost
from ..decoding.acceptance_modes import Decoding
from ..drafts.base import Draft
from ..models.kv_cache import PromptCache
from ..models.target import Target
from .acceptance import per_position
from .measure import own_steps

MOST = 8
"""The largest K that is tried."""
REPEATS = 15
PROBE_TOKENS = 64


@torch.inference_mode()
def measure_cost(
    target: Target,
    draft: Draft,
    prompt: Sequence[int],
    *,
    most: int = MOST,
    rows: int = 1,
    repeats: int = REPEATS,
) -> StepCost:
    """Time the parts of a step after `prompt` (token ids), in turn, `rows` copies at a time."""
    tokens = torch.tensor([list(prompt)] * rows, device=target.device)
    cache, draft_cache = (
        PromptCache(target, tokens, draft.aux_layers),
        draft.new_cache(tokens[:, 0]),
    )
    reading = cache.reading
    last = reading.logits_BTV[:, -1].argmax(-1, keepdim=True)
    following = torch.cat([tokens[:, 1:], last], 1)
    state = draft.extend(draft_cache, following, reading.features_BTF)

    def read(count: int, aux_layers: Sequence[int]) -> None:
        cache.read(last.expand(-1, count), aux_layers).logits_BTV.argmax(-1).tolist()

    def draft_step() -> None:
        draft.logits(draft.step(draft_cache, last, state)).argmax(-1)

    jobs: list[Callable[[], None]] = [lambda: read(1, ()), draft_step]
    jobs += [lambda count=k + 1: read(count, draft.aux_layers) for k in range(most + 1)]  # type: ignore[misc]
    taken: list[list[float]] = [[] for _ in jobs]
    for repeat in range(repeats + 2):
        for job, seconds in zip(jobs, taken, strict=True):
            began = time.perf_counter()
            job()
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            if repeat >= 2:  # two rounds of warm-up
                seconds.append(time.perf_counter() - began)
            cache.back()
        draft.extend(draft_cache, last, reading.features_BTF[:, -1:])  # drops the drafted steps
    plain, drafting, *verify = map(median, taken)
    return StepCost(plain, drafting, tuple(verify), rows, len(prompt), repeats)


def speedup(cost: StepCost, rates: Sequence[float], k: int) -> float:
    """Predicted speed-up of K drafted tokens, from acceptance rates by position."""
    tau, reached = 1.0, 1.0
    for rate in rates[:k]:
        reached *= rate
        tau += reached
    return tau / (k * cost.c + cost.v(k))


def choose_k(cost: StepCost, rates: Sequence[float], steps: int) -> KChoice:
    """The K with the largest predicted speed-up; the smaller one of two that tie."""
    predicted = tuple(speedup(cost, rates, k) for k in range(1, len(rates) + 1))
    return KChoice(predicted.index(max(predicted)) + 1, predicted, tuple(rates), steps, cost)


def auto_k(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    decoding: Decoding | None = None,
    rows: int = 1,
) -> KChoice:
    """Choose K from a short run on prompts and the costs after the first of them."""
    traces, _ = own_steps(target, draft, prompts, MOST, PROBE_TOKENS, decoding)
    cost = measure_cost(target, draft, prompts[0].tokens, rows=rows)
    steps = [trace for trace in traces if trace.steps]
    rates = per_position(steps, MOST) if steps else (0.0,) * MOST
    return choose_k(cost, rates, sum(len(trace.accepted) for trace in steps))
