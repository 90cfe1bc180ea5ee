"""The time that a chat template writes into prompts, kept next to what was rendered with it.

Templates such as Llama 3.1's and Granite's write the date. Rendered the next day, every prompt would be
another and no answer could be used again. So the time of the first rendering is kept, and used when the same
work goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from ..core import ranks
from ..core.console import say
from ..core.errors import UserError
from ..core.folders import read_json
from ..models.target import Target

RENDERED_AT = "rendered_at"
"""The key under which JSON files keep it."""


def writes_date(target: Target) -> bool:
    """Whether the target's chat template asks for the time."""
    return "strftime_now" in target.template_text


def kept_time(target: Target) -> dict[str, str]:
    """What a record of work with this target keeps: the time, if the template asks for it."""
    return {RENDERED_AT: target.rendered_at.isoformat()} if writes_date(target) else {}


def continue_time(target: Target, records: Iterable[Path]) -> None:
    """Render with the time that the first of these JSON files keeps, where the template asks for it."""
    if not writes_date(target):
        return

    def kept() -> tuple[datetime, Path | None]:
        for path in records:
            try:
                return datetime.fromisoformat(read_json(path)[RENDERED_AT]), path
            except (UserError, KeyError, TypeError, ValueError):
                continue  # none there, or none in it
        return target.rendered_at, None

    target.rendered_at, path = ranks.first(kept)
    if path is not None:
        day = f"{target.rendered_at:%Y-%m-%d %H:%M:%S}"
        say(f"the chat template writes the date: prompts are rendered as of {day}, kept in {path}")
