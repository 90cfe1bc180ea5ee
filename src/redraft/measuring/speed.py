"""Wall-clock speed against plain decoding: paired, interleaved, with the spread over repeats."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import GenerationConfig

from ..console import Progress
from ..decode.plain import decode_plain
from ..decode.speculative import decode_speculative
from ..drafts.base import Draft
from ..records import Prompt, Throughput
from ..target import Target

Runner = Callable[[Prompt], list[int]]


def runners(
    target: Target, drafts: Mapping[str, Draft], k: int, max_new_tokens: int
) -> dict[str, Runner]:
    """The contestants: our plain loop, Transformers' `generate`, and one per draft."""
    found: dict[str, Runner] = {
        "plain": lambda prompt: decode_plain(target, prompt.tokens, max_new_tokens),
        "generate": lambda prompt: generate(target, prompt, max_new_tokens),
    }
    for name, draft in drafts.items():

        def run(prompt: Prompt, draft: Draft = draft) -> list[int]:
            return decode_speculative(target, draft, [prompt.tokens], k, max_new_tokens)[0].tokens

        found[name] = run
    return found


def race(
    contestants: Mapping[str, Runner], prompts: Sequence[Prompt], repeats: int
) -> tuple[dict[str, Throughput], dict[str, list[list[int]]]]:
    """Time every contestant on every prompt in turn, after one warm-up each.

    Returns throughput (total tokens over total seconds of the median repeat, with the range) and
    the answers each gave. The order rotates, so that drift of the machine hits all alike.
    """
    names = list(contestants)
    for name in names:
        contestants[name](prompts[0])
    seconds = {name: [0.0] * repeats for name in names}
    answers: dict[str, list[list[int]]] = {name: [] for name in names}
    with Progress("speed", repeats * len(prompts), "prompts") as progress:
        for repeat in range(repeats):
            for at, prompt in enumerate(prompts):
                shift = (repeat + at) % len(names)
                for name in names[shift:] + names[:shift]:
                    began = time.perf_counter()
                    answer = contestants[name](prompt)
                    seconds[name][repeat] += time.perf_counter() - began
                    if repeat == 0:
                        answers[name].append(answer)
                progress.advance()
    results = {}
    for name in names:
        tokens = sum(len(answer) for answer in answers[name])
        rates = sorted(tokens / spent for spent in seconds[name])
        results[name] = Throughput(
            name, rates[len(rates) // 2], rates[0], rates[-1], repeats, len(prompts), tokens
        )
    return results, answers


@torch.inference_mode()
def generate(target: Target, prompt: Prompt, max_new_tokens: int) -> list[int]:
    """Transformers' own greedy `generate`, as a user would call it."""
    ids = torch.tensor([prompt.tokens], device=target.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(target.stop_ids),
        pad_token_id=target.stop_ids[0],
    )
    mask = torch.ones_like(ids)
    output = target.model.generate(ids, attention_mask=mask, generation_config=config)
    row: list[int] = output[0, ids.shape[1] :].tolist()
    return row
