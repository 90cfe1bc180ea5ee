"""Token ids in four bytes each: what records of prompts and answers keep them in.

As a tuple of Python integers a token takes about 36 bytes, and 100,000 answers would fill 2 GB.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class Tokens(Sequence[int]):
    """An immutable sequence of token ids, equal to a tuple or list of the same ids.

    It hashes like the tuple. A slice, and a sum with other ids, is a `Tokens` again. Raises TypeError
    for what is no whole number, and OverflowError for an id that does not fit 32 bits.
    """

    __slots__ = ("_ids",)

    def __init__(self, ids: Iterable[int] = ()):
        self._ids: array[int] = ids._ids if isinstance(ids, Tokens) else _stored(ids)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Tokens: ...
    def __getitem__(self, at: int | slice) -> int | Tokens:
        return _around(self._ids[at]) if isinstance(at, slice) else self._ids[at]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __add__(self, other: Iterable[int]) -> Tokens:
        return _around(self._ids + Tokens(other)._ids)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Tokens):
            return self._ids == other._ids
        if isinstance(other, tuple | list):
            return len(self) == len(other) and tuple(self._ids) == tuple(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._ids))

    def __repr__(self) -> str:
        return f"Tokens({self._ids.tolist()})"

    def __copy__(self) -> Tokens:
        return self

    def __deepcopy__(self, memo: object) -> Tokens:
        return self

    def __reduce__(self) -> tuple[type[Tokens], tuple[list[int]]]:
        return Tokens, (self._ids.tolist(),)


def _stored(ids: Iterable[int]) -> array[int]:
    """A new array of the ids. Packing takes half the time, and files hold lists."""
    if isinstance(ids, list):
        with contextlib.suppress(struct.error):  # the array names the mistake
            return array("i", struct.pack(f"{len(ids)}i", *ids))
    return array("i", ids)


def _around(ids: array[int]) -> Tokens:
    """Tokens that take over an array instead of copying it."""
    tokens = Tokens()
    tokens._ids = ids
    return tokens


def plain(value: object) -> list[int]:
    """Tokens as JSON has them: the `default` of `json.dumps`. Raises TypeError for anything else."""
    if isinstance(value, Tokens):
        return value._ids.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
