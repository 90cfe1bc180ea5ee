"""What a selection kept and left out: samples from its top, its middle and its bottom, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.records import Answer
from ..models.target import Target
from .select import Scored

WHERE = ("top", "middle", "bottom")


@dataclass(frozen=True)
class Example:
    """A sample, its rank from 1, and its text: the prompt, then the answer (empty for prompts)."""

    where: str
    rank: int
    sample: Scored
    prompt: str
    answer: str


def explain(
    samples: Sequence[Scored], answers: Mapping[str, Answer], target: Target, count: int = 3
) -> list[Example]:
    """`count` samples each from the top, the middle and the bottom of the order, or all if fewer."""
    middle = max((len(samples) - count) // 2, 0)
    begins = {"top": 0, "middle": middle, "bottom": max(len(samples) - count, 0)}
    ranks = {
        rank: where
        for where in reversed(WHERE)
        for rank in range(begins[where], min(begins[where] + count, len(samples)))
    }
    found = []
    for rank in sorted(ranks):
        answer = answers[samples[rank].id]
        texts = [target.tokenizer.decode(list(t)) for t in (answer.prompt, answer.answer)]
        found.append(Example(ranks[rank], rank + 1, samples[rank], *texts))
    return found
