"""The two ways a command can end badly, kept apart.

`UserError` is the user's mistake: one sentence that says what was looked at, what was expected,
what was found and what to do. The command line prints it without a traceback and exits with 2.
Anything else that escapes is our fault and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is complete by itself; nothing already written is lost."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint ending a message about an unknown `word`: the closest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"
