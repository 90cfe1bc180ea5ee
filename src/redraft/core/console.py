"""What a person sees while waiting: progress with rate and ETA on stderr, silenced by `--quiet`.

On a terminal a bar is drawn; elsewhere (a log file, CI) a line appears every ten seconds.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.status import Status

from . import ranks
from .visible import visible

LOG_EVERY_SECONDS = 10.0

console = Console(stderr=True, highlight=False)
_quiet = False


def set_quiet(quiet: bool) -> None:
    global _quiet
    _quiet = quiet or not ranks.is_first()


def say(text: str) -> None:
    """A line of progress for the person; nothing when quiet."""
    if not _quiet:
        console.print(visible(text), markup=False)


class Progress:
    """A bar over `total` steps. `note` is the latest figure worth seeing next to it."""

    def __init__(self, label: str, total: int, unit: str = "it"):
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.note = ""
        self._started = self._logged = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if not _quiet and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, note="", rate="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not _quiet and kind is None:
            self._log()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self.done += steps
        if note is not None:
            self.note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note, rate=self._rate())
        elif not _quiet and time.monotonic() - self._logged > LOG_EVERY_SECONDS:
            self._log()

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        return f"{self.done / elapsed:,.1f} {self.unit}/s"

    def _log(self) -> None:
        self._logged = time.monotonic()
        elapsed = self._logged - self._started
        line = f"{self.label}: {self.done}/{self.total}, {self._rate()}, {elapsed:.0f} s"
        if 0 < self.done < self.total:
            line += f", eta {elapsed / self.done * (self.total - self.done):.0f} s"
        print(f"{line}  {self.note}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201


class Waiting:
    """Waiting for something whose length is not known: a spinner, or a line every ten seconds."""

    def __init__(self, label: str):
        self.label = label
        self._started = self._logged = time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> Waiting:
        if not _quiet and console.is_terminal:
            self._status = console.status(self.label)
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def tick(self, done: int = 0, unit: str = "") -> None:
        """Still waiting: call this now and then, with what has been done so far if it is counted."""
        now = time.monotonic()
        text = f"{self.label}: {now - self._started:.0f} s"
        if unit:
            text += f", {done:,} {unit}, {done / max(now - self._started, 1e-9):,.0f}/s"
        if self._status is not None:
            self._status.update(text)
        elif not _quiet and now - self._logged > LOG_EVERY_SECONDS:
            self._logged = now
            print(text, file=sys.stderr, flush=True)  # noqa: T201
