"""What was understood of a prompts file: the rendered rows, and what is wrong with them.

Mistakes of the chat template are the most common cause of a bad draft, and they show only in the
rendered text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..core.records import Prompt
from ..models.target import Target
from .prompts import AS_THEY_ARE, PromptSet, alike, generation_prompt
from .stopping import names, special_ids


@dataclass(frozen=True)
class Span:
    """Text of a rendered row. `supervised` text is what a draft would be trained on."""

    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One row as the target sees it; `turns` counts the user turns that it will answer."""

    id: str
    turns: int
    prompt_tokens: int
    answer_tokens: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Inspection:
    """A prompts file in figures, its first rows rendered, and warnings.

    Lengths are in tokens: the smallest, the median and the largest. `reasons` counts the rows left
    out (of the first thousand) by reason, `lines` is the first row of each, from 1.
    """

    source: str
    kept: int
    left_out: int
    reasons: dict[str, int]
    lines: dict[str, int]
    shapes: dict[str, int]
    prompt_lengths: tuple[int, int, int]
    answer_lengths: tuple[int, int, int] | None
    conversations: int
    warnings: tuple[str, ...]
    rows: tuple[Shown, ...] = field(default=())


def inspect_prompts(found: PromptSet, target: Target, rows: int) -> Inspection:
    """Look at all prompts kept, and render the first `rows`."""
    prompts: list[int] = []
    answers: list[int] = []
    shown: list[Shown] = []
    unfinished = conversations = 0
    for prompt in found.prompts:
        prompts.append(len(prompt.tokens))
        conversations += bool(prompt.later)
        if prompt.reference:
            answers.append(len(prompt.reference))
            unfinished += not set(prompt.reference) & set(target.stop_ids)
        if len(shown) < rows:
            shown.append(_shown(prompt, target))
    reasons: Counter[str] = Counter()
    lines: dict[str, int] = {}
    for number, reason in found.left_out:
        reasons[alike(reason)] += 1
        lines.setdefault(alike(reason), number)
    return Inspection(
        source=found.source,
        kept=len(found.prompts),
        left_out=found.left_out_count,
        reasons=dict(reasons.most_common()),
        lines=lines,
        shapes=found.shapes,
        prompt_lengths=_spread(prompts),
        answer_lengths=_spread(answers) if answers else None,
        conversations=conversations,
        warnings=(*found.notes, *_warnings(found, target, unfinished, len(answers))),
        rows=tuple(shown),
    )


def _warnings(found: PromptSet, target: Target, unfinished: int, answers: int) -> Iterator[str]:
    templated = len(found.prompts) > sum(found.shapes.get(shape, 0) for shape in AS_THEY_ARE)
    if templated and generation_prompt(target) == "":
        yield (
            "the chat template writes nothing that has the target answer (it ignores "
            "add_generation_prompt), so the target continues the user's text"
        )
    begin = target.tokenizer.bos_token_id
    first = found.prompts[0].tokens
    if begin is not None and first[:2] == (begin, begin):
        yield "prompts begin with two beginning-of-text tokens; the target was trained on one"
    if unfinished:
        yield (
            f"{unfinished} of {answers} answers in the file hold no stop token under this template "
            f"(stop tokens: {names(target, target.stop_ids)}), so nothing teaches a draft where answers end"
        )


def _shown(prompt: Prompt, target: Target) -> Shown:
    reference = prompt.reference or ()
    return Shown(
        prompt.id,
        1 + sum(len(turn) > 1 for turn in prompt.later),
        len(prompt.tokens),
        len(reference),
        (*_spans(prompt.tokens, target, False), *_spans(reference, target, True)),
    )


def _spans(tokens: Sequence[int], target: Target, supervised: bool) -> Iterator[Span]:
    """Tokens as text, each special token by itself."""
    special = special_ids(target)
    run: list[int] = []
    for token in tokens:
        if token in special:
            if run:
                yield Span(target.tokenizer.decode(run), supervised, False)
                run = []
            yield Span(str(target.tokenizer.convert_ids_to_tokens(token)), supervised, True)
        else:
            run.append(token)
    if run:
        yield Span(target.tokenizer.decode(run), supervised, False)


def _spread(lengths: list[int]) -> tuple[int, int, int]:
    ordered = sorted(lengths)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
