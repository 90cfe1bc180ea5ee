"""One process per folder or file: a lock that the system gives back when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from . import ranks
from .errors import UserError
from .files import writing

LOCK = ".lock"


@contextlib.contextmanager
def held(place: Path) -> Iterator[None]:
    """Hold a folder that is there, or a file, for the block; of several ranks, rank 0 holds it for all.

    Raises UserError at once if another process (or thread) does.
    """
    if ranks.size() == 1:
        with _held(place):
            yield
        return
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(_held(place))

        ranks.first(enter)
        yield


@contextlib.contextmanager
def _held(place: Path) -> Iterator[None]:
    what, path = "folder", place / LOCK
    if not place.is_dir():
        what, path = "file", place.with_name(f".{place.name}{LOCK}")
    lock = FileLock(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{place}: another redraft process{_holder(path)} works in this {what}; wait for "
                f"it, or name another {what}"
            ) from None
    try:
        with writing(path):
            # In place: a new file under this name would be another lock.
            path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """The holder's process id as part of the message; nothing where it cannot be read."""
    try:
        return f" (pid {int(path.read_text(encoding='utf-8'))})"
    except (OSError, ValueError):
        return ""
