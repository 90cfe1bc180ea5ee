"""A pool of prompts that stays on disk: a sequence of any length in little memory.

Prompts are written to a temporary file as they come and read back one at a time. A small pool never
leaves memory. The file has no name and goes with the process.

How long each prompt is stays in memory, because batches are planned by it (see `batches.lengths_of`).
"""

from __future__ import annotations

import json
import tempfile
import threading
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from ..core.records import Prompt
from ..models.batching import lengths_of

MEMORY = 1 << 25
"""Bytes of prompts kept in memory before they go to disk."""


class PromptPool(Sequence[Prompt]):
    """Prompts in the order they were added. Threads may read it at the same time."""

    def __init__(self, prompts: Iterable[Prompt] = (), memory: int = MEMORY):
        self._file = tempfile.SpooledTemporaryFile(max_size=memory)  # noqa: SIM115
        self._closed_form, self._lengths = array("q"), array("i")
        self._place = threading.Lock()  # of the file's position
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: Prompt) -> None:
        with self._place:
            self._closed_form.append(self._file.seek(0, 2))
            self._file.write(json.dumps(prompt.to_row()).encode() + b"\n")
        self._lengths.append(len(prompt.tokens))

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens each prompt has."""
        return self._lengths

    def __len__(self) -> int:
        return len(self._closed_form)

    @overload
    def __getitem__(self, at: int) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> Picked: ...
    def __getitem__(self, at: int | slice) -> Prompt | Picked:
        if isinstance(at, slice):
            return Picked(self, range(len(self))[at])
        with self._place:
            self._file.seek(self._closed_form[at])
            line = self._file.readline()
        return Prompt.from_row(json.loads(line))


class Picked(Sequence[Prompt]):
    """Some prompts of a sequence, by index, in a chosen order."""

    def __init__(self, whole: Sequence[Prompt], indices: Iterable[int]):
        self._whole, self._indices = whole, array("q", indices)

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens each prompt has."""
        lengths = lengths_of(self._whole)
        return array("i", (lengths[at] for at in self._indices))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> Picked: ...
    def __getitem__(self, at: int | slice) -> Prompt | Picked:
        if isinstance(at, slice):
            return Picked(self._whole, self._indices[at])
        return self._whole[self._indices[at]]
