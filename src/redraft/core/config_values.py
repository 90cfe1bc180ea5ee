"""Typed reading of a JSON object that others wrote: config.json, redraft.json, an index.

A value is taken unchanged or refused by one sentence with file, key, expected and found; nothing is
cast. `null` counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import UserError

MOST = 1 << 31
"""Integers stay below this: token ids are stored in four bytes."""


@dataclass(frozen=True)
class ConfigValues:
    """The values of one object; `where` names the file in messages."""

    raw: Mapping[str, Any]
    where: str

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer from 1 on; without a `default` the key is required."""
        found: int = self._read(key, is_positive, "a positive integer below 2^31", default)
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; without a `default` the key is required."""
        found: float = self._read(key, is_number, "a finite number above 0", default)
        return found

    def flag(self, key: str, default: bool = False) -> bool:
        found: bool = self._read(key, is_flag, "true or false", default)
        return found

    def text(self, key: str, default: str) -> str:
        found: str = self._read(key, is_text, "a text", default)
        return found

    def integers(self, key: str, least: int = 0) -> tuple[int, ...]:
        """A list of integers from `least` on; empty where the key is absent."""
        expected = f"a list of integers from {least} on"
        return tuple(self._read(key, lambda found: is_integers(found, least), expected, ()))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty where the key is absent."""
        return tuple(self._read(key, is_texts, "a list of texts", ()))

    def inside(self, key: str) -> ConfigValues:
        """The object under a key; empty where the key is absent."""
        raw = self._read(key, is_object, "an object", {})
        return ConfigValues(raw, f"{self.where}, {key}")

    def given(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise UserError(f"{self.where}: expected {expected} as {key}, found {shown(self.raw[key])}")

    def _read(self, key: str, fits: Callable[[Any], bool], expected: str, default: Any) -> Any:
        found = self.raw.get(key)
        if found is None:
            if default is None:
                raise UserError(f"{self.where}: expected a key '{key}' ({expected}), found none")
            return default
        if not fits(found):
            self.refuse(key, expected)
        return found


def is_positive(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 0 < found < MOST


def is_number(found: Any) -> bool:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    return 0 < found < 1 << 63 if isinstance(found, int) else found > 0 and math.isfinite(found)


def is_flag(found: Any) -> bool:
    return isinstance(found, bool)


def is_text(found: Any) -> bool:
    return isinstance(found, str)


def is_texts(found: Any) -> bool:
    return isinstance(found, list) and all(map(is_text, found))


def is_integers(found: Any, least: int = 0) -> bool:
    return isinstance(found, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and least <= item < MOST
        for item in found
    )


def is_object(found: Any) -> bool:
    return isinstance(found, dict)


def shown(found: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:77]}..."


def architectures_of(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The architectures that a config.json names; none where the value is no list of texts."""
    found = raw.get("architectures")
    return tuple(found) if isinstance(found, list) and is_texts(found) else ()
