"""Rows that are token ids already, and the columns that mark which of them are the answer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MARKS = (
    "loss_mask",
    "labels",
    "assistant_masks",
    "assistant_mask",
    "assistant_tokens_mask",
    "completion_mask",
    "response_mask",
)
OTHER_MARKS = re.compile(r"(?i)(?!attention|special_tokens|padding|pad_).*(mask|weight|label)s?")
"""Columns that may mark the answer too, in a way that is not known."""
NO_LABEL = -100
"""What `labels` have in place of a token that is not learned."""


def split(row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Prompt and answer of a row with `input_ids`; the answer is the last run of marked tokens.

    Without a column that marks them all is prompt. Padding (`attention_mask` is 0) is cut off. Raises
    ValueError that names the column at fault.
    """
    tokens = token_ids("input_ids", row["input_ids"])
    present = range(len(tokens))
    if "attention_mask" in row:
        seen = _marks("attention_mask", row["attention_mask"], len(tokens))
        if not any(seen):
            raise ValueError("attention_mask is 0 for every token")
        present = range(seen.index(True), len(seen) - seen[::-1].index(True))
        if not all(seen[at] for at in present):
            raise ValueError("attention_mask has zeros between tokens, not only at the ends")
    found = {name: _supervised(name, row[name], tokens) for name in MARKS if name in row}
    kept = {name: [marks[at] for at in present] for name, marks in found.items()}
    tokens = tokens[present.start : present.stop]
    if not kept:
        if other := next((key for key in row if OTHER_MARKS.fullmatch(key)), None):
            raise ValueError(f"{other} may mark the answer; known marks: {', '.join(MARKS)}")
        return tokens, None
    (name, marks), *others = kept.items()
    for other, differing in others:
        if differing != marks:
            raise ValueError(f"{name} and {other} mark different tokens as the answer")
    if True not in marks:
        raise ValueError(f"{name} marks no token, so nothing says where the answer begins")
    end = len(marks) - marks[::-1].index(True)
    begin = end
    while begin and marks[begin - 1]:
        begin -= 1
    if begin == 0:
        raise ValueError(f"{name} marks the first token, so there is no prompt before the answer")
    return tokens[:begin], tokens[begin:end]


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise ValueError(f"{name} is not a list of token ids")
    return tuple(value)


def _supervised(name: str, value: Any, tokens: tuple[int, ...]) -> list[bool]:
    if name != "labels":
        return _marks(name, value, len(tokens))
    if not isinstance(value, list) or len(value) != len(tokens):
        raise ValueError(f"labels does not mark each of the {len(tokens)} input_ids")
    if any(label not in (NO_LABEL, token) for label, token in zip(value, tokens, strict=True)):
        raise ValueError(f"labels has other tokens than input_ids (and {NO_LABEL} for the prompt)")
    return [label != NO_LABEL for label in value]


def _marks(name: str, value: Any, length: int) -> list[bool]:
    if not isinstance(value, list) or len(value) != length:
        raise ValueError(f"{name} does not mark each of the {length} input_ids")
    if not all(isinstance(mark, int | float) and 0 <= mark < math.inf for mark in value):
        raise ValueError(f"{name} has values that are neither 0 nor a weight")
    return [mark > 0 for mark in value]
