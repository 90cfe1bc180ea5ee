"""Prompts: JSONL rows in, rendered through the target's own chat template.

A row that cannot be used is counted and its line named; the rest is kept.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..formats.chat import Message, messages_of, split_answer
from ..records import Prompt
from ..target import Target

SHORTEST_ROOM = 32
"""A prompt must leave this many positions of the context for its answer."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts kept, and for each row left out: line number and reason."""

    source: str
    prompts: tuple[Prompt, ...]
    left_out: tuple[tuple[int, str], ...]

    def summary(self) -> str:
        text = f"{len(self.prompts)} prompts from {self.source}"
        if self.left_out:
            line, reason = self.left_out[0]
            text += f"; {len(self.left_out)} left out (first: line {line}: {reason})"
        return text


def read_prompts(source: str, target: Target, limit: int | None = None) -> PromptSet:
    """Read and render a JSONL file (optionally gzip).

    Rows that cannot be used, and repeats of a prompt, are left out and counted. Raises UserError
    when no prompt is left.
    """
    prompts: list[Prompt] = []
    left_out: list[tuple[int, str]] = []
    seen: set[str] = set()
    rendered: dict[tuple[int, ...], str] = {}
    for number, line in _lines(source):
        if limit is not None and len(prompts) >= limit:
            break
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
            name = str(row.get("id", f"line-{number}"))
            name = name if name not in seen else f"{name}@{number}"
            prompt = _render(name, messages_of(row), target)
            if prompt.tokens in rendered:
                raise ValueError(f"the same prompt as {rendered[prompt.tokens]}")
            prompts.append(prompt)
            seen.add(name)
            rendered[prompt.tokens] = name
        except json.JSONDecodeError as problem:
            reason = "the line is empty" if not line.strip() else f"not valid JSON: {problem.msg}"
            left_out.append((number, reason))
        except ValueError as problem:
            left_out.append((number, str(problem)))
    if not prompts:
        reasons = "\n  ".join(f"{source}, line {n}: {why}" for n, why in left_out[:5])
        raise UserError(
            f"{source}: no prompts left after reading {len(left_out)} lines\n  {reasons}".rstrip()
        )
    return PromptSet(source, tuple(prompts), tuple(left_out))


def split_prompts(
    prompts: Sequence[Prompt], evaluation: int, heldout: int, seed: int
) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
    """Disjoint prompts to adapt on, to stop early by, and to measure on.

    The last two take at most a quarter of the prompts each. Raises UserError with fewer than 8.
    """
    if len(prompts) < 8:
        raise UserError(
            f"{len(prompts)} prompts are too few to adapt, stop early and measure on disjoint ones; "
            "8 is the least, a few hundred are useful"
        )
    order = list(range(len(prompts)))
    random.Random(f"split/{seed}").shuffle(order)
    evaluation, heldout = (min(n, len(prompts) // 4) for n in (evaluation, heldout))
    shuffled = [prompts[i] for i in order]
    return (
        shuffled[evaluation + heldout :],
        shuffled[evaluation : evaluation + heldout],
        shuffled[:evaluation],
    )


def _render(name: str, messages: list[Message], target: Target) -> Prompt:
    asked, reply = split_answer(messages)
    if not asked or asked[-1]["role"] == "assistant":
        raise ValueError("the conversation does not end in a user turn or one answer to it")
    tokens = tuple(target.render(asked))
    if len(tokens) + SHORTEST_ROOM > target.max_positions:
        raise ValueError(
            f"the prompt is {len(tokens)} tokens long, the target's context is {target.max_positions}"
        )
    reference = None
    if reply is not None:
        whole = target.render([*asked, reply], answered=True)
        if tuple(whole[: len(tokens)]) == tokens:
            reference = tuple(whole[len(tokens) :])
    return Prompt(name, tokens, reference)


def _lines(source: str) -> Iterator[tuple[int, str]]:
    path = Path(source)
    if not path.is_file():
        raise UserError(f"prompts {source}: no such file; expected JSONL, optionally .gz")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:  # type: ignore[operator]
            yield from enumerate(stream, 1)
    except (OSError, EOFError, UnicodeDecodeError) as problem:
        raise UserError(f"prompts {source} could not be read to the end: {problem}") from None
