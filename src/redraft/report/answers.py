"""The two answers that the page shows: which, and where each of their tokens comes from.

Of the measured answers that are at least half as long as the longest, ranked by their gain in tau,
the page shows the median one (the lower of two) and the one that gains most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..core.records import Answer
from ..core.report_record import ShownAnswer

MOST_TOKENS = 256
"""An answer is shown up to this many tokens."""


def choose_answers(
    answers: Sequence[Answer],
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> tuple[ShownAnswer, ...]:
    """The answers to show, given the accepted tokens of each step, answer by answer."""
    least = max((answer.length for answer in answers), default=0) / 2
    ranked = sorted(
        (tau_of(after[i]) - tau_of(before[i]), i)
        for i, answer in enumerate(answers)
        if answer.length >= least and before[i]
    )
    if not ranked:
        return ()
    chosen = {"median gain": ranked[(len(ranked) - 1) // 2], "largest gain": ranked[-1]}
    if len(ranked) == 1:
        del chosen["median gain"]
    return tuple(
        ShownAnswer(
            answers[i].id,
            f"{name} of {len(ranked)} answers",
            answers[i].length,
            tuple(token_texts(answers[i].answer[:MOST_TOKENS], decode)),
            tuple(before[i]),
            tuple(after[i]),
        )
        for name, (_, i) in chosen.items()
    )


def tau_of(accepted: Sequence[int]) -> float:
    """Tau of one answer, from the accepted tokens of each step."""
    return 1 + sum(accepted) / len(accepted)


def token_texts(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text that each token adds; empty where it is only a part of a character."""
    shown = 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            yield ""
            continue
        yield text[shown:]
        shown = len(text)


def token_kinds(accepted: Sequence[int], k: int) -> list[list[str]]:
    """Where the tokens of an answer come from: the prefill, then step by step.

    The last step may reach past the answer's end.
    """
    ends = ("bonus" if count == k else "recovered" for count in accepted)
    steps = zip(accepted, ends, strict=True)
    return [["first"], *([*["accepted"] * count, end] for count, end in steps)]


def coloured(
    shown: ShownAnswer, accepted: Sequence[int], k: int
) -> tuple[list[list[tuple[str, str]]], dict[str, int]]:
    """The shown tokens step by step, each with its kind; and how many of each kind the whole answer has."""
    steps, counts, at = [], dict.fromkeys(("accepted", "recovered", "bonus"), 0), 0
    for kinds in token_kinds(accepted, k):
        kept = kinds[: shown.length - at]
        steps.append(list(zip(kept, shown.tokens[at : at + len(kept)], strict=False)))
        at += len(kept)
        for kind in counts:
            counts[kind] += kept.count(kind)
    return [step for step in steps if step], counts
