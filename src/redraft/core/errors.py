"""The two ways a command can end badly, kept apart.

`UserError` is the user's mistake: one sentence that names what was looked at, what was expected,
what was found and what to do. The command line prints it without a traceback and exits with 2.
Anything else that escapes is our fault and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_REASON = 300
"""Characters of a library's own message that are shown."""


class UserError(Exception):
    """Bad input. The message is complete by itself; nothing already written is lost."""


@contextmanager
def as_sentence(what: str) -> Iterator[None]:
    """Whatever a library raises inside becomes a UserError that begins with `what`.

    For calls into Transformers, PEFT and what they build on: they have no class for a file, a config or
    a tokenizer that they cannot use, and code of every architecture raises what it likes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        raise UserError(f"{what}: {reason(problem)}") from problem


def reason(problem: BaseException) -> str:
    """A library's message in one line, shortened, after the error's class where that adds something."""
    if isinstance(problem, KeyError):
        return f"no entry {problem}"
    text = " ".join(str(problem).split()) or type(problem).__name__
    if isinstance(problem, TypeError | AttributeError | IndexError):
        text = f"{type(problem).__name__}: {text}"
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint ending a message about an unknown `word`: the closest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def check_known(what: str, words: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for the first of `words` that is not among the `known`."""
    known = list(known)
    for word in words:
        if word not in known:
            raise UserError(f"unknown {what} '{word}'; {nearest(word, known)}")
