"""Prompts: rows in, rendered through the target's own chat template.

A row that cannot be used is counted and its number named; the rest is kept. Rows are read one at a
time and what is kept lies in a pool on disk, so that a file of any size can be read.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.console import Waiting
from ..core.errors import UserError
from ..core.records import Prompt
from ..core.remote import address_of
from ..models.target import Target
from .chat import Understood, understand
from .disk_list import Picked, PromptPool
from .messages import Message
from .rows import read_rows
from .stopping import end_of_turn_note
from .turns import check_context, first_turn

GIVEN_NAME = re.compile(r"#\d+$|^line-\d+$")
"""How later turns (see `turns.py`) and rows without an id are named; a row's own name of that form is
altered."""
REASONS_KEPT = 1000
"""Rows left out are all counted; this many are named."""
LONGEST_REASON, LONGEST_NAME = 400, 200
"""Characters."""
COLUMNS_KEPT, COLUMNS_NAMED = 100, 8
"""Columns that were not read: so many are counted, so many named."""
AS_THEY_ARE = ("text", "input_ids", "answer")
"""Shapes of rows that the chat template does not render."""


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
        text = f"{len(self.prompts)} prompts from {address_of(self.source)}"
        if self.left_out:
            line, reason = self.left_out[0]
            text += f"; {self.left_out_count} left out (first: line {line}: {reason})"
        return "\n  ".join([text, *(f"warning: {note}" for note in self.notes)])


def alike(reason: str) -> str:
    """A reason without what differs from row to row."""
    return re.sub(
        r"same prompt as .*", "same prompt as an earlier row", re.sub(r"(?<![\w-])\d+", "…", reason)
    )


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
        same = reader.refused > 1 and len({alike(why) for _, why in reader.left_out}) == 1
        reasons = [f"{source}, line {n}: {why}" for n, why in reader.left_out[: 1 if same else 5]]
        head = f"{source}: no prompts left after reading {reader.refused} lines"
        head += ", all for the same reason" if same else ""
        raise UserError("\n  ".join([head, *reasons]))
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
        self.unread: Counter[str] = Counter()
        self.left_out: list[tuple[int, str]] = []
        self.refused = 0
        self.unjoined_rows = 0
        self._names: set[int] = set()
        self._rendered: dict[int, int] = {}
        self._has: Counter[str] = Counter()
        self._drops: dict[str, bool] = {}
        self._asks: str | None = None

    def take(self, number: int, row: object) -> Prompt | None:
        """The row's prompt, now in the pool; None when the row was left out."""
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
            understood = understand(row)
            prompt = self._render(self._name(number, row), understood)
            whole = hash((prompt.tokens, json.dumps(prompt.later)))
            same = self.pool[self._rendered[whole]] if whole in self._rendered else None
            if same and (same.tokens, same.later) == (prompt.tokens, prompt.later):
                raise ValueError(f"the same prompt as {same.id}")
        except (ValueError, RecursionError) as problem:
            self.refused += 1
            if len(self.left_out) < REASONS_KEPT:
                self.left_out.append((number, str(problem)[:LONGEST_REASON]))
            return None
        self._rendered[whole] = len(self.pool)
        if "id" in row:
            self._names.add(hash(prompt.id))
        self.shapes[understood.shape] += 1
        self.unread.update(
            name
            for name in understood.unread
            if name in self.unread or len(self.unread) < COLUMNS_KEPT
        )
        self.pool.add(prompt)
        return prompt

    def _name(self, number: int, row: dict[str, Any]) -> str:
        given = row.get("id")
        name = str(given)[:LONGEST_NAME] if isinstance(given, str | int | float) else ""
        if hash(name) in self._names or GIVEN_NAME.search(name):
            name = f"{name}@{number}"
        return name or f"line-{number}"

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.unread:
            most = self.unread.most_common(COLUMNS_NAMED)
            others = len(self.unread) - len(most)
            named = [f"{name} ({count} row{'s' * (count > 1)})" for name, count in most]
            named += [f"{others} others"] if others else []
            notes.append(
                f"columns {', '.join(named)} are not read; where one belongs to the question, add its text there"
            )
        for what, rows in self._has.items():
            if self._drops[what]:
                notes.append(
                    f"the chat template drops {what}: {rows} row{'s' * (rows > 1)} with them, which the target "
                    "never sees; pass the template it is served with (--chat-template)"
                )
        if self.unjoined_rows:
            notes.append(
                f"in {self.unjoined_rows} rows the answer in the file does not continue the prompt "
                "under this template (it renders the two together otherwise), so it cannot be used"
            )
        rendered = len(self.pool) > sum(self.shapes[shape] for shape in AS_THEY_ARE)
        if rendered and (note := end_of_turn_note(self.target)):
            notes.append(note)
        return tuple(notes)

    def _render(self, name: str, found: Understood) -> Prompt:
        if found.tokens is not None:
            return self._of_tokens(name, found.tokens, found.answer)
        if found.text is not None:
            return self._of_text(name, found.text)
        prompt = first_turn(
            name, found.messages, found.tools, self.target, self.turns, found.variables
        )
        for what in _parts(found):
            self._has[what] += 1
            if what not in self._drops:
                self._drops[what] = drops(self.target, what)
        if found.messages[-1]["role"] == "assistant" and not (prompt.reference or prompt.later):
            self.unjoined_rows += 1
        return prompt

    def _of_tokens(
        self, name: str, tokens: tuple[int, ...], answer: tuple[int, ...] | None
    ) -> Prompt:
        both, rows = (*tokens, *(answer or ())), self.target.embedding_VH.shape[0]
        if max(both) >= rows or min(both) < 0:
            raise ValueError(
                f"input_ids go from {min(both)} to {max(both)}, the target's vocabulary has {rows}: "
                "they are another model's"
            )
        return Prompt(name, check_context(tokens, self.target.max_positions), answer)

    def _of_text(self, name: str, text: str) -> Prompt:
        """Text is taken as rendered already: the target continues it, after the last place where
        the template would have it answer, if the text has one."""
        if self._asks is None:
            self._asks = generation_prompt(self.target) or ""
        asks = self._asks
        at = text.rfind(asks) + len(asks) if asks and asks in text else len(text)
        tokens = tuple(encode(self.target, text[:at]))
        reply = encode(self.target, text[at:], begins=False)
        return Prompt(name, check_context(tokens, self.target.max_positions), reply or None)


def _parts(found: Understood) -> Iterator[str]:
    """What a conversation has that some chat templates ignore."""
    if found.messages[0]["role"] == "system":
        yield "system prompts"
    if found.tools:
        yield "tools"
    if any("tool_calls" in message for message in found.messages):
        yield "tool calls"


def drops(target: Target, what: str) -> bool:
    """Whether the chat template writes the same with `what` as without; a refusal is no drop."""
    asked, function = {"role": "user", "content": "x"}, {"name": "f", "arguments": {}}
    call = {"id": "call00000", "type": "function", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "y", "name": "f", "tool_call_id": "call00000"}
    tool = {"type": "function", "function": {"name": "f", "description": "z", "parameters": {}}}
    having: dict[str, tuple[list[Message], list[Message] | None]] = {
        "system prompts": ([{"role": "system", "content": "y"}, asked], None),
        "tools": ([asked], [tool]),
        "tool calls": ([asked, called, result], None),
    }
    messages, tools = having[what]
    bare = [
        {key: value for key, value in message.items() if key != "tool_calls"}
        for message in messages
        if message["role"] != "system"
    ]
    try:
        return target.render_text(messages, tools=tools) == target.render_text(bare)
    except ValueError:
        return False


def generation_prompt(target: Target) -> str | None:
    """What the chat template writes to have the target answer; empty when it writes nothing, None when
    it refuses a question alone."""
    if not target.template_text:
        return ""
    asked = [{"role": "user", "content": "x"}]
    try:
        without, begun = (
            target.render_text(asked, answered=answered) for answered in (True, False)
        )
    except ValueError:
        return None
    return begun[len(without) :] if begun.startswith(without) else ""


def encode(target: Target, text: str, *, begins: bool = True) -> list[int]:
    """Token ids of rendered text. A text that `begins` a row gets the tokenizer's beginning-of-text
    token, unless it has it already."""
    begin = target.tokenizer.bos_token
    doubled = bool(begin) and text.startswith(begin)
    return target.checked(
        list(target.tokenizer.encode(text, add_special_tokens=begins and not doubled))
    )


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
