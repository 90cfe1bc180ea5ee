"""Live: the decoding loop itself, counted and timed."""

from __future__ import annotations

from collections.abc import Sequence

from ..console import Progress
from ..decode.speculative import decode_speculative
from ..drafts.base import Draft
from ..records import Answer, Prompt, StepTrace
from ..target import Target


def live(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    k: int,
    max_new_tokens: int,
    progress: Progress | None = None,
) -> tuple[list[StepTrace], list[Answer]]:
    """Decode every prompt greedily with the draft; the steps taken and the answers given."""
    traces, answers = [], []
    for prompt in prompts:
        decoded = decode_speculative(target, draft, prompt.tokens, k, max_new_tokens)
        length = len(decoded.tokens)
        stopped = decoded.tokens[-1] in target.stop_ids
        traces.append(StepTrace(prompt.id, tuple(decoded.accepted), length))
        answers.append(
            Answer(
                prompt.id,
                prompt.tokens,
                (*decoded.tokens, *decoded.overrun),
                length,
                "stop" if stopped else "length",
            )
        )
        if progress:
            progress.advance()
    return traces, answers
