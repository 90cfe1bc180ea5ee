"""General prompts that the target makes up: it goes on where a user's turn begins.

A chat template puts the user's text between fixed pieces. Given only the piece before it, a model that was
tuned on conversations writes what a user might ask (Magpie, arXiv 2406.08464). A fine-tune learns answers,
rarely questions, so what it asks is still as mixed as what its base was tuned on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..core.console import Progress
from ..core.errors import UserError
from ..core.records import Prompt
from ..decoding.batched import generate_answers, plan_generation
from ..decoding.sampling import Sampling
from ..models.target import Target

SAMPLING = Sampling(temperature=1.0, top_p=0.95)
LONGEST = 64
"""Tokens; a question that has not ended by then ends with its last whole sentence."""
SHORTEST = 8
"""Characters."""
BATCH = 64
PATIENCE = 4
"""Questions tried for each one wanted, before it is given up."""
PLACE = "redraft-question"
WAY_OUT = (
    "name a file of them with --general-prompts, or say --guard off and leave --general-share out"
)
SENTENCE = re.compile(r".*[.?!:](?=\s|$)", re.DOTALL)


class TooFewError(UserError):
    """There are not enough general prompts."""


def made_up_questions(target: Target, count: int, seed: int = 0) -> list[str]:
    """Different questions, in an order that `seed` decides: `count` of them, fewer of a target that repeats itself.

    Raises TooFewError where the template does not show where a user's turn begins.
    """
    before, after = _around_question(target)
    opening = target.checked(list(target.tokenizer.encode(before, add_special_tokens=False)))
    found: dict[str, str] = {}
    with Progress("general prompts", count, "prompts") as progress:
        for text in _tries(target, opening, after, PATIENCE * count, seed):
            if text is None or text.casefold() in found:
                continue
            found[text.casefold()] = text
            progress.advance()
            if len(found) == count:
                break
    return list(found.values())


def _around_question(target: Target) -> tuple[str, str]:
    """The template's text before and after a user's only message."""
    try:
        pieces = target.render_text([{"role": "user", "content": PLACE}]).split(PLACE)
    except (UserError, ValueError) as problem:  # no template, or one that refuses such a message
        raise TooFewError(f"no general prompts can be made up ({problem}): {WAY_OUT}") from None
    if len(pieces) != 2 or not pieces[0]:
        raise TooFewError(
            f"the chat template of {target.name} does not show where a user's turn begins, so no general "
            f"prompts can be made up: {WAY_OUT}"
        )
    return pieces[0], pieces[1]


def _tries(
    target: Target, opening: list[int], after: str, most: int, seed: int
) -> Iterator[str | None]:
    """What the target writes as a user's text; None for what is no question."""
    end = after.strip().split("\n")[0]
    for begin in range(0, most, BATCH):
        batch = [Prompt(f"general-{i}", opening) for i in range(begin, min(begin + BATCH, most))]
        plan = plan_generation(batch, BATCH, BATCH * (len(opening) + LONGEST), LONGEST)
        for answers in generate_answers(
            target, batch, plan, sampling=SAMPLING, max_new_tokens=LONGEST, lookahead=0, seed=seed
        ):
            for answer in answers:
                yield _question(target, list(answer.answer), end)


def _question(target: Target, tokens: list[int], end: str) -> str | None:
    """The text up to where the turn ends, or its last whole sentence; None where there is none, and where it
    holds the template's own tokens."""
    ended = bool(tokens) and tokens[-1] in target.stop_ids
    text = str(target.tokenizer.decode(tokens[:-1] if ended else tokens))
    if end and end in text:
        text = text.split(end)[0]
    elif not ended:
        whole = SENTENCE.match(text)
        text = whole.group() if whole else ""
    text = text.strip()
    special = any(token in text for token in target.tokenizer.all_special_tokens)
    return text if len(text) >= SHORTEST and not special else None
