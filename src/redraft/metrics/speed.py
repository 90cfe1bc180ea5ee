"""Wall-clock speed against plain decoding: paired, interleaved, with the spread over repeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from ..core.console import Progress
from ..core.records import Prompt, Throughput
from ..decoding.batched import generate_answers
from ..decoding.plain import decode_plain
from ..decoding.sampling import Sampling
from ..decoding.speculative import decode_speculative
from ..drafts.base import Draft
from ..models.target import Target

Runner = Callable[[Sequence[Prompt]], list[list[int]]]
"""Decodes prompts together; their answers."""


def plain(target: Target, max_new_tokens: int) -> Runner:
    """Our plain loop: the single one for one prompt, the batched one for more."""

    def run(prompts: Sequence[Prompt]) -> list[list[int]]:
        if len(prompts) == 1:
            return [decode_plain(target, prompts[0].tokens, max_new_tokens)]
        batches = generate_answers(
            target,
            prompts,
            [range(len(prompts))],
            sampling=Sampling(),
            max_new_tokens=max_new_tokens,
            lookahead=0,
            seed=0,
        )
        return [list(answer.answer) for batch in batches for answer in batch]

    return run


def drafted(target: Target, draft: Draft, k: int, max_new_tokens: int) -> Runner:
    """Our speculative loop."""

    def run(prompts: Sequence[Prompt]) -> list[list[int]]:
        rows = [prompt.tokens for prompt in prompts]
        return [d.tokens for d in decode_speculative(target, draft, rows, k, max_new_tokens)]

    return run


def transformers_generate(target: Target, max_new_tokens: int, **more: Any) -> Runner:
    """Transformers' own greedy `generate`, as a user would call it; `more` are its arguments."""

    @torch.inference_mode()
    def run(prompts: Sequence[Prompt]) -> list[list[int]]:
        stop = set(target.stop_ids)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(target.stop_ids),
            pad_token_id=target.stop_ids[0],
        )
        longest = max(len(p.tokens) for p in prompts)
        pads = [longest - len(p.tokens) for p in prompts]
        filler = target.stop_ids[0]
        padded = [[*[filler] * n, *p.tokens] for n, p in zip(pads, prompts, strict=True)]
        ids = torch.tensor(padded, device=target.device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pads], device=target.device)
        output = target.model.generate(ids, attention_mask=mask, generation_config=config, **more)
        return [_until_stop(row, stop) for row in output[:, longest:].tolist()]

    return run


def _until_stop(row: list[int], stop: set[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
    return row[:end]


def race(
    contestants: Mapping[str, Runner], batches: Sequence[Sequence[Prompt]], repeats: int
) -> tuple[dict[str, Throughput], dict[str, list[list[int]]]]:
    """Time every contestant on every batch of prompts in turn, after one warm-up each.

    Returns throughput (total tokens over total seconds of the median repeat, with the range) and
    the answers each gave. The order rotates, so that drift of the machine hits all alike.
    """
    names = list(contestants)
    for name in names:
        contestants[name](batches[0])
    seconds = {name: [0.0] * repeats for name in names}
    answers: dict[str, list[list[int]]] = {name: [] for name in names}
    with Progress("speed", repeats * len(batches), "batches") as progress:
        for repeat in range(repeats):
            for at, batch in enumerate(batches):
                shift = (repeat + at) % len(names)
                for name in names[shift:] + names[:shift]:
                    began = time.perf_counter()
                    found = contestants[name](batch)
                    seconds[name][repeat] += time.perf_counter() - began
                    if repeat == 0:
                        answers[name] += found
                progress.advance()
    results = {}
    for name in names:
        tokens = sum(len(answer) for answer in answers[name])
        rates = sorted(tokens / spent for spent in seconds[name])
        prompts = sum(map(len, batches))
        results[name] = Throughput(
            name, rates[len(rates) // 2], rates[0], rates[-1], repeats, prompts, tokens
        )
    return results, answers


@contextmanager
def forwards_timed(target: Target, draft: Draft) -> Iterator[list[float]]:
    """Collects the seconds that the models' forward passes take, one entry per pass."""
    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = call(*args, **kwargs)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            spent.append(time.perf_counter() - began)
            return found

        return wrapper

    places = [(target, "read"), *((draft, name) for name in ("extend", "step", "logits"))]
    for owner, name in places:
        owner.__dict__[name] = timed(getattr(owner, name))
    try:
        yield spent
    finally:
        for owner, name in places:
            del owner.__dict__[name]
