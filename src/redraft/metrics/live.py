"""Live: the decoding loop itself, counted and timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..config import RegenerateConfig
from ..core.console import Progress
from ..core.records import Answer, Prompt, StepTrace
from ..core.rng import derived_seed
from ..decoding.acceptance_modes import Decoding
from ..decoding.batched import plan_live
from ..decoding.speculative import decode_speculative
from ..drafts.base import Draft
from ..models.target import Target


def live(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    k: int,
    max_new_tokens: int,
    progress: Progress | None = None,
    *,
    decoding: Decoding | None = None,
    seed: int = 0,
    batch_size: int = 1,
    batch_tokens: int = RegenerateConfig.batch_tokens,
) -> tuple[list[StepTrace], list[Answer]]:
    """Decode every prompt with the draft; the steps taken and the answers given.

    A prompt's noise is that of its answer in a replay under the same `seed`. Batches are bounded as
    in `plan_generation`, with the prompts in their order.
    """
    decoding = decoding or Decoding()
    keyed = asdict(decoding.sampling) if decoding.sampling.temperature else {}
    traces, answers = [], []
    for indices in plan_live(prompts, batch_size, batch_tokens, max_new_tokens + k):
        batch = [prompts[i] for i in indices]
        seeds = [derived_seed(seed, "answer", prompt.id) for prompt in batch]
        rows = [prompt.tokens for prompt in batch]
        found = decode_speculative(
            target, draft, rows, k, max_new_tokens, decoding, seeds, reserve=k
        )
        for prompt, row_seed, decoded in zip(batch, seeds, found, strict=True):
            length = len(decoded.tokens)
            finish = "stop" if decoded.tokens[-1] in target.stop_ids else "length"
            tokens = (*decoded.tokens, *decoded.lookahead)
            own = {**keyed, "seed": row_seed} if keyed else {}
            traces.append(StepTrace(prompt.id, tuple(decoded.accepted), length))
            answers.append(Answer(prompt.id, prompt.tokens, tokens, length, finish, **own))
        if progress:
            progress.advance(len(batch))
    return traces, answers
