"""Batched plain decoding: many prompts, stated sampling, one token per row and target pass.

Sampled answers are those of acceptance mode `seeded`: the noise of a row is keyed by a seed of its
own (from the run's seed and the prompt's id) and the position. So an answer does not depend on
which prompts were answered next to it, nor on where an interrupted run resumed, and live decoding
with its seed gives it again. Rows that are finished leave the batch.

Shapes: B batch (rows still running), T tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ..core.records import Answer, Prompt
from ..core.rng import derived_seed
from ..models.batching import lengths_of, plan_in_order, plan_once
from ..models.kv_cache import keep_rows, new_cache
from ..models.target import Target
from .acceptance_modes import MODES
from .context_length import check_prompts
from .noise import seeds_tensor
from .sampling import Sampling, scores


def plan_generation(
    prompts: Sequence[Prompt], batch_size: int, batch_tokens: int, new_tokens: int
) -> list[list[int]]:
    """Batches of prompt indices, sorted by length so that little is padded.

    A batch is at most `batch_size` rows, and its rows times the longest prompt with `new_tokens` (the
    longest answer and its lookahead) are at most `batch_tokens`: the positions that the KV cache may
    come to hold. A prompt that alone exceeds them is a batch of its own.
    """
    return plan_once(_filled(prompts, new_tokens), batch_tokens, batch_size)


def plan_live(
    prompts: Sequence[Prompt], batch_size: int, batch_tokens: int, new_tokens: int
) -> list[list[int]]:
    """The same with the prompts in their order."""
    return plan_in_order(_filled(prompts, new_tokens), batch_tokens, batch_size)


def _filled(prompts: Sequence[Prompt], new_tokens: int) -> Sequence[int]:
    """The positions that each prompt takes with its longest answer."""
    return array("q", (length + new_tokens for length in lengths_of(prompts)))


def generate_answers(
    target: Target,
    prompts: Sequence[Prompt],
    plan: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    lookahead: int,
    seed: int,
) -> Iterator[list[Answer]]:
    """The target's answers, batch by batch of the plan.

    Each answer ends with a stop token or after `max_new_tokens` (or the context), and is followed
    by `lookahead` further tokens of the target's own. Raises UserError for prompts that fill the context.
    """
    for indices in plan:
        batch = [prompts[i] for i in indices]
        check_prompts(target, [prompt.tokens for prompt in batch])
        rows = _decode(target, batch, sampling, max_new_tokens, lookahead, seed)
        yield [
            _answer(
                prompt,
                row,
                target.stop_ids,
                _space(target, prompt, max_new_tokens, lookahead),
                lookahead,
                sampling,
                derived_seed(seed, "answer", prompt.id),
            )
            for prompt, row in zip(batch, rows, strict=True)
        ]


@torch.inference_mode()
def _decode(
    target: Target,
    batch: list[Prompt],
    sampling: Sampling,
    max_new_tokens: int,
    lookahead: int,
    seed: int,
) -> list[list[int]]:
    """Token ids of each row, up to `lookahead` past its stop."""
    device = target.device
    longest = max(len(p.tokens) for p in batch)
    limits = [_space(target, p, max_new_tokens, lookahead) + lookahead for p in batch]
    steps = max(limits)
    padding = [longest - len(p.tokens) for p in batch]
    window = torch.tensor(
        [[0] * pad + list(p.tokens) for pad, p in zip(padding, batch, strict=True)], device=device
    )
    pad_B = torch.tensor(padding, device=device)
    rules = MODES["seeded" if sampling.temperature else "greedy"]
    seeds_B = seeds_tensor([derived_seed(seed, "answer", p.id) for p in batch], device)
    stop_ids = torch.tensor(target.stop_ids, device=device)
    cache = new_cache(target)
    output_BT = torch.zeros(len(batch), steps, dtype=torch.long, device=device)
    left_B = torch.tensor(limits, device=device)  # tokens still to come; shrinks at a row's stop
    rows_B = torch.arange(len(batch), device=device)
    for step in range(steps):
        logits_BV = _forward(target, window, pad_B, longest + step, cache)
        at_B1 = torch.full((len(rows_B), 1), step, device=device)
        scores_B1V = scores(logits_BV, sampling)[:, None]
        token_B = rules.choose(scores_B1V, at_B1, seeds_B[rows_B])[:, 0]
        output_BT[rows_B, step] = token_B
        left_B -= 1
        stopped = torch.isin(token_B, stop_ids)
        left_B = torch.where(stopped, left_B.clamp(max=lookahead), left_B)
        running = left_B > 0
        if not bool(running.any()):
            break
        # Leaving costs a copy of the cache, so rows leave an eighth of the batch at a time.
        if int(running.sum()) <= len(rows_B) - max(len(rows_B) // 8, 1):
            keep = running.nonzero().squeeze(-1)
            keep_rows(cache, keep)
            pad_B, left_B, rows_B, token_B = (x[keep] for x in (pad_B, left_B, rows_B, token_B))
        window = token_B[:, None]
    return [row[:most] for row, most in zip(output_BT.tolist(), limits, strict=True)]


def _space(target: Target, prompt: Prompt, max_new_tokens: int, lookahead: int) -> int:
    """The longest answer to a prompt that leaves its lookahead inside the context."""
    return min(max_new_tokens, max(target.max_positions - len(prompt.tokens) - lookahead, 1))


def _forward(target: Target, window_BT: Tensor, pad_B: Tensor, total: int, cache: object) -> Tensor:
    """Logits of the last position of left-padded rows; `total` counts the cached positions too."""
    positions = torch.arange(total, device=window_BT.device)[None]
    mask = positions >= pad_B[:, None]
    shifted = (positions - pad_B[:, None]).clamp(min=0)[:, -window_BT.shape[1] :]
    padded = bool((pad_B > 0).any())
    output = target.model(
        input_ids=window_BT,
        attention_mask=mask.long() if padded else None,
        position_ids=shifted,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _answer(
    prompt: Prompt,
    row: list[int],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    lookahead: int,
    sampling: Sampling,
    seed: int,
) -> Answer:
    at = next((i for i, token in enumerate(row[:max_new_tokens]) if token in stop_ids), None)
    length = min(len(row), max_new_tokens) if at is None else at + 1
    finish = "length" if at is None else "stop"
    kept = tuple(row[: length + lookahead])
    keyed = {**asdict(sampling), "seed": seed} if sampling.temperature else {}
    return Answer(prompt.id, prompt.tokens, kept, length, finish, **keyed)
