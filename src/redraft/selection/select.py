"""Selection: which samples are worth training on, within a budget.

Samples are taken from the highest score down until the budget is full (see `scores.py`). Near-
duplicates of a better sample come last; with coverage the clusters take turns.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import Budget, SelectConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.files import write_text
from ..core.records import Answer, Prompt
from ..prompts.disk_list import Picked
from .near_duplicates import clusters, near_duplicates
from .scoring import Scorers, score

ANSWER_TOKENS = 100
"""What an answer is taken to have where it is not known yet."""


@dataclass(frozen=True)
class Scored:
    """One sample's score and fate, as written to selection.jsonl, in the order in which they are kept.

    `tokens` are those that were scored: the answer's, or the prompt's when prompts are.
    """

    id: str
    score: float
    tokens: int
    kept: bool
    duplicate_of: str | None = None
    cluster: int | None = None


@dataclass(frozen=True)
class Selection:
    """All samples in order, and what scoring them cost (see `scoring.Scores`)."""

    samples: list[Scored]
    tokens: int
    flops: float
    seconds: float

    @property
    def kept(self) -> list[Scored]:
        return [sample for sample in self.samples if sample.kept]

    def summary(self) -> str:
        kept, copies = self.kept, sum(s.duplicate_of is not None for s in self.samples)
        text = f"kept {len(kept)} of {len(self.samples)}, {sum(s.tokens for s in kept):,} tokens"
        if copies:
            text += (
                f"; {copies} near-duplicates, {sum(s.duplicate_of is not None for s in kept)} kept"
            )
        return text


def select(
    samples: Sequence[Answer], config: SelectConfig, models: Scorers | None = None
) -> Selection:
    """Score every sample and keep the best within the budget, in order of falling worth.

    Raises UserError when a score lacks a model, and for a budget that keeps nothing.
    """
    if config.by == "prompts" and config.budget.strip().endswith("t"):
        raise UserError(
            f"budget '{config.budget}' counts answers' tokens, and with --by prompts there are no "
            "answers yet; use a count (500) or a share (0.5)"
        )
    if not samples:
        raise UserError("there is nothing to choose from: no answers, or no prompts")
    found, budget = score(samples, config, models or Scorers()), config.budget_value
    order = sorted(range(len(samples)), key=lambda i: (-found.values[i], samples[i].id))
    all_fit = len(within_budget([s.length for s in samples], budget)) == len(samples)
    compared = bool(config.duplicates) and not all_fit
    tokens = [s.whole for s in samples] if config.coverage or compared else []
    groups = clusters(tokens, config.coverage, config.seed) if config.coverage else None
    if groups:
        order = _taking_turns(order, groups)
    copies: dict[int, int] = {}
    if compared:
        copies = near_duplicates(tokens, order, config.duplicates)
        order.sort(key=lambda i: i in copies)
    kept = set(within_budget([samples[i].length for i in order], budget))
    rows = [
        Scored(
            samples[i].id,
            found.values[i],
            samples[i].length,
            rank in kept,
            samples[copies[i]].id if i in copies else None,
            groups[i] if groups else None,
        )
        for rank, i in enumerate(order)
    ]
    if budget.kind == "count" and len(kept) < budget.number:
        say(f"the budget asks for {budget.text} samples, the pool has {len(kept)}: all are kept")
    return Selection(rows, found.tokens, found.flops, found.seconds)


def write_selection(path: Path, selection: Selection) -> None:
    write_text(path, "".join(json.dumps(asdict(s)) + "\n" for s in selection.samples))


def read_selection(path: Path) -> list[Scored]:
    """Raises UserError when the file is damaged."""
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
        return [Scored(**json.loads(line)) for line in rows]
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(
            f"{path} is damaged ({problem}); write it again with redraft select"
        ) from None


def kept_answers(answers: Sequence[Answer], selection: Path | None) -> list[Answer]:
    """The answers to train on: of those that a selection file keeps, if any, the ones of two tokens or more.

    Raises UserError when the selection keeps others.
    """
    kept = _kept([a.id for a in answers], selection) if selection else range(len(answers))
    return [answers[i] for i in kept if answers[i].length >= 2]


def kept_prompts(prompts: Sequence[Prompt], selection: Path) -> Sequence[Prompt]:
    """The prompts that a selection file keeps. Raises UserError when it keeps others."""
    return Picked(prompts, _kept([prompt.id for prompt in prompts], selection))


def most_kept(pool: int, budget: Budget) -> int:
    """About how many of a pool's samples a budget keeps, before any is answered; of `auto` all."""
    kept = {
        "count": budget.number,
        "share": budget.number * pool,
        "tokens": budget.number / ANSWER_TOKENS,
    }.get(budget.kind, pool)
    return min(pool, max(round(kept), 1))


def _kept(ids: Sequence[str], selection: Path) -> list[int]:
    kept = {sample.id for sample in read_selection(selection) if sample.kept}
    found = [i for i, name in enumerate(ids) if name in kept]
    if len(found) < len(kept):
        raise UserError(
            f"{selection} keeps {len(kept)} samples, of which {len(found)} are here; name the file that "
            "was chosen from"
        )
    return found


def within_budget(lengths: Sequence[int], budget: Budget) -> list[int]:
    """Ranks kept under a budget. A sample that is longer than the tokens left is passed over.

    Raises UserError for budget auto, and for a budget that keeps nothing.
    """
    if budget.auto:
        raise UserError("budget 'auto' answers prompts in rounds, which redraft adapt does")
    if budget.kind == "tokens":
        kept, left = [], int(budget.number)
        for rank, length in enumerate(lengths):
            if length <= left:
                left -= length
                kept.append(rank)
    else:
        scale = len(lengths) if budget.kind == "share" else 1
        kept = list(range(min(round(budget.number * scale), len(lengths))))
    if not kept:
        raise UserError(f"budget '{budget.text}' keeps none of the {len(lengths)} samples")
    return kept


def _taking_turns(order: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The best of each cluster, then the second best of each, and so on."""
    queues: dict[int, list[int]] = {}
    for i in order:
        queues.setdefault(groups[i], []).append(i)
    rounds = itertools.zip_longest(*queues.values())
    return [i for turn in rounds for i in turn if i is not None]
