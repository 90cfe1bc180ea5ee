"""Prompts: rows in, rendered through the target's own chat template.

A row that cannot be used is counted and its number named; the rest is kept. Rows are read one at a
time and what is kept lies in a pool on disk, so that a file of any size can be read.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..console import Waiting
from ..errors import UserError
from ..formats.chat import Understood, last_supervised, understand
from ..records import Prompt
from ..target import Target
from .pool import Picked, PromptPool
from .rows import read_rows
from .turns import check_room, first_turn

GIVEN_NAME = re.compile(r"#\d+$|^line-\d+$")
"""How later turns (see `turns.py`) and rows without an id are named; a row's own name of that form is
altered."""
REASONS_KEPT = 1000
"""Rows left out are all counted; this many are named."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts kept, and for each row left out (the first thousand) its number and the reason.

    `shapes` counts the rows by what they were understood to be; `notes` is what the template did to
    rows that were kept.
    """

    source: str
    prompts: Sequence[Prompt]
    left_out: tuple[tuple[int, str], ...]
    left_out_count: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        text = f"{len(self.prompts)} prompts from {self.source}"
        if self.left_out:
            line, reason = self.left_out[0]
            text += f"; {self.left_out_count} left out (first: line {line}: {reason})"
        return "\n  ".join([text, *self.notes])


def read_prompts(
    source: str,
    target: Target,
    limit: int | None = None,
    turns: str = "all",
    note: Callable[[Prompt, Any], None] | None = None,
) -> PromptSet:
    """Read and render a file or data set (see `rows.py`), up to `limit` prompts.

    Rows that cannot be used, and repeats of a prompt, are left out and counted. `turns` as in
    `turns.first_turn`. `note` is told each prompt kept and the row it came from. Raises UserError
    when no prompt is left.
    """
    reader = PromptReader(target, turns)
    with Waiting(f"reading {source}") as waiting:
        for number, row in read_rows(source):
            if limit is not None and len(reader.pool) >= limit:
                break
            prompt = reader.take(number, row)
            if prompt and note:
                note(prompt, row)
            waiting.tick(number, "rows")
    if not len(reader.pool):
        reasons = "\n  ".join(f"{source}, line {n}: {why}" for n, why in reader.left_out[:5])
        raise UserError(
            f"{source}: no prompts left after reading {reader.refused} lines\n  {reasons}".rstrip()
        )
    return PromptSet(
        source,
        reader.pool,
        tuple(reader.left_out),
        reader.refused,
        dict(reader.shapes),
        reader.notes(),
    )


class PromptReader:
    """Takes rows one by one. What it remembers of each prompt is a few dozen bytes."""

    def __init__(self, target: Target, turns: str = "all"):
        self.target, self.turns = target, turns
        self.pool = PromptPool()
        self.shapes: Counter[str] = Counter()
        self.left_out: list[tuple[int, str]] = []
        self.refused = 0
        self.system_rows = self.unjoined_rows = 0
        self._names: set[int] = set()
        self._rendered: dict[int, int] = {}
        self._drops_system: bool | None = None

    def take(self, number: int, row: object) -> Prompt | None:
        """The row's prompt, now in the pool; None when the row was left out."""
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
            understood = understand(row)
            name = str(row.get("id", ""))
            if hash(name) in self._names or GIVEN_NAME.search(name):
                name = f"{name}@{number}"
            name = name or f"line-{number}"
            prompt = self._render(name, understood)
            whole = hash((prompt.tokens, json.dumps(prompt.later)))
            same = self.pool[self._rendered[whole]] if whole in self._rendered else None
            if same and (same.tokens, same.later) == (prompt.tokens, prompt.later):
                raise ValueError(f"the same prompt as {same.id}")
        except ValueError as problem:
            self.refused += 1
            if len(self.left_out) < REASONS_KEPT:
                self.left_out.append((number, str(problem)))
            return None
        self._rendered[whole] = len(self.pool)
        if "id" in row:
            self._names.add(hash(name))
        self.shapes[understood.shape] += 1
        self.pool.add(prompt)
        return prompt

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._drops_system:
            notes.append(
                f"the chat template drops system prompts: {self.system_rows} rows have one that "
                "the target never sees; pass the template it is served with (--chat-template)"
            )
        if self.unjoined_rows:
            notes.append(
                f"in {self.unjoined_rows} rows the answer in the file does not continue the prompt "
                "under this template (it renders the two together otherwise), so it cannot be used"
            )
        return tuple(notes)

    def _render(self, name: str, found: Understood) -> Prompt:
        if found.tokens is not None:
            return self._of_tokens(name, found)
        if found.text is not None:
            return self._of_text(name, found.text)
        prompt = first_turn(name, found.messages, found.tools, self.target, self.turns)
        if found.messages[0]["role"] == "system":
            self.system_rows += 1
            if self._drops_system is None:
                without = self.target.render(found.messages[1:2])
                self._drops_system = self.target.render(found.messages[:2]) == without
        if found.messages[-1]["role"] == "assistant" and not (prompt.reference or prompt.later):
            self.unjoined_rows += 1
        return prompt

    def _of_tokens(self, name: str, found: Understood) -> Prompt:
        tokens = found.tokens or ()
        if max(tokens) >= self.target.vocab_size or min(tokens) < 0:
            raise ValueError(
                f"input_ids go up to {max(tokens)}, the target's vocabulary has "
                f"{self.target.vocab_size}: it was tokenised for another model"
            )
        if found.supervised is None:
            return Prompt(name, check_room(tokens, self.target.max_positions))
        begin, end = last_supervised(found.supervised)
        if begin == 0:
            raise ValueError("loss_mask marks the first token, so there is no prompt before it")
        return Prompt(
            name, check_room(tokens[:begin], self.target.max_positions), tokens[begin:end]
        )

    def _of_text(self, name: str, text: str) -> Prompt:
        """Text is taken as rendered already: the target continues it, after the last place where
        the template would have it answer, if the text has one."""
        asks = generation_prompt(self.target)
        at = text.rfind(asks) + len(asks) if asks and asks in text else len(text)
        tokens = tuple(encode(self.target, text[:at]))
        reply = tuple(self.target.tokenizer.encode(text[at:], add_special_tokens=False))
        return Prompt(name, check_room(tokens, self.target.max_positions), reply or None)


def generation_prompt(target: Target) -> str:
    """What the chat template writes to have the target answer; empty when it writes nothing."""
    if target.template is None and not getattr(target.tokenizer, "chat_template", None):
        return ""
    asked = [{"role": "user", "content": "x"}]
    without, begun = (
        str(
            target.tokenizer.apply_chat_template(
                asked, chat_template=target.template, add_generation_prompt=add, tokenize=False
            )
        )
        for add in (False, True)
    )
    return begun[len(without) :] if begun.startswith(without) else ""


def encode(target: Target, text: str) -> list[int]:
    """Token ids of rendered text; a beginning-of-text token it already has is not doubled."""
    begin = target.tokenizer.bos_token
    doubled = bool(begin) and text.startswith(begin)
    ids: list[int] = target.tokenizer.encode(text, add_special_tokens=not doubled)
    return ids


def split_prompts(
    prompts: Sequence[Prompt], evaluation: int, heldout: int, seed: int
) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
    """Disjoint prompts to adapt on, to stop early by, and to measure on.

    The last two take at most a quarter of the prompts each. Conversations that begin with the same
    words are one prompt at their first turn: of those, only what is measured on is kept, then what
    training is stopped by. Raises UserError with fewer than 8.
    """
    if len(prompts) < 8:
        raise UserError(
            f"{len(prompts)} prompts are too few to adapt, stop early and measure on disjoint ones; "
            "8 is the least, a few hundred are useful"
        )
    order = list(range(len(prompts)))
    random.Random(f"split/{seed}").shuffle(order)
    evaluation, heldout = (min(n, len(prompts) // 4) for n in (evaluation, heldout))
    shuffled = Picked(prompts, order)
    measured = shuffled[:evaluation]
    stopping = _without(shuffled[evaluation : evaluation + heldout], measured)
    return _without(shuffled[evaluation + heldout :], measured, stopping), stopping, measured


def _without(prompts: Sequence[Prompt], *others: Sequence[Prompt]) -> Picked:
    """The prompts whose tokens are not those of another."""
    taken = {prompt.tokens for some in others for prompt in some}
    return Picked(prompts, (i for i, prompt in enumerate(prompts) if prompt.tokens not in taken))
