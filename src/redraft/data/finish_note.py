"""A warning where no answer ended by itself: often the target's stop tokens are not those it writes."""

from __future__ import annotations

from ..target import Target
from ..visible import visible

ENOUGH = 8
"""Fewer answers than this may all be long by chance."""


def unfinished_note(answers_finished: int, total: int, target: Target) -> str | None:
    """The warning for `total` answers of which so many ended with a stop token; None where it is not due."""
    if answers_finished or total < ENOUGH:
        return None
    names = target.tokenizer.convert_ids_to_tokens(list(target.stop_ids))
    stops = ", ".join(f"{name} ({i})" for name, i in zip(names, target.stop_ids, strict=True))
    return (
        f"WARNING: none of {total} answers ended by itself; all were cut at the length limit. The target's "
        f"stop tokens are {visible(stops) or 'none'}: if it ends its answers with another token, add that one "
        "to eos_token_id in its generation_config.json; otherwise raise the length limit"
    )
