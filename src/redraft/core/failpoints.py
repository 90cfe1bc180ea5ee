"""Named places where a test may break the work: before, amid and after each change on the disk.

`point` does nothing until a test arms it with a callable, which gets the point's name and may raise
whatever it wants to see survived. Nothing else in the package sets `armed`.
"""

from __future__ import annotations

from collections.abc import Callable

armed: Callable[[str], None] | None = None


def point(name: str) -> None:
    """A place named `name` where a crash would be interesting."""
    if armed is not None:
        armed(name)
