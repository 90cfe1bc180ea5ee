"""Selection: which answered prompts are worth training on, within a budget.

A score is a pure function; samples are taken from the highest score down until the budget is
full. Here: `random`, the baseline that every other score has to beat.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import SelectConfig
from ..errors import UserError
from ..records import Answer


@dataclass(frozen=True)
class Scored:
    """One sample's score and fate, as written to selection.jsonl."""

    id: str
    score: float
    tokens: int
    kept: bool


def select(answers: Sequence[Answer], config: SelectConfig) -> list[Scored]:
    """Score every answer and keep the best within the budget; in order of falling score."""
    scores = random_scores(answers, config.seed)
    order = sorted(range(len(answers)), key=lambda i: (-scores[i], answers[i].id))
    kept = set(within_budget([answers[i].length for i in order], config.budget))
    return [
        Scored(answers[i].id, scores[i], answers[i].length, rank in kept)
        for rank, i in enumerate(order)
    ]


def random_scores(answers: Sequence[Answer], seed: int) -> list[float]:
    """A uniform draw per sample, keyed by its id, so that it does not depend on the order."""
    return [random.Random(f"{seed}/{answer.id}").random() for answer in answers]


def within_budget(lengths: Sequence[int], budget: str) -> range:
    """Ranks kept under a budget: a count ('500'), a share ('0.5') or tokens ('20000t').

    Raises UserError for anything else, and for a budget that keeps nothing.
    """
    text = budget.strip()
    try:
        if text.endswith("t"):
            room, kept = int(text[:-1]), 0
            while kept < len(lengths) and room >= lengths[kept]:
                room -= lengths[kept]
                kept += 1
        elif "." in text:
            share = float(text)
            if not 0 < share <= 1:
                raise ValueError
            kept = round(share * len(lengths))
        else:
            kept = min(int(text), len(lengths))
    except ValueError:
        raise UserError(
            f"budget '{budget}' is not a count (500), a share between 0 and 1 (0.5) or a number of "
            "tokens (20000t)"
        ) from None
    if kept <= 0:
        raise UserError(f"budget '{budget}' keeps none of the {len(lengths)} samples")
    return range(kept)
