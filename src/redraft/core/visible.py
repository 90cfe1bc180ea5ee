"""Text of servers, models and files, made safe to print: a terminal obeys none of its characters."""

from __future__ import annotations

import re

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""`text` with control characters as their escapes (`\x1b`); newlines and tabs stay.

    Also escaped are marks that reverse the reading direction, and halves of characters, which cannot
    be written at all. Each character is escaped by itself, so pieces of a text can be shown one by one.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
