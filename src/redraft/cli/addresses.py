"""Flags that name files at an address (s3://...): the command is given copies, and what it writes goes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..core import ranks
from ..core.errors import UserError
from ..core.remote import Mirror, is_address, kept_up

WRITTEN = ("out", "run", "folder", "bank")
"""Parameters whose files a command may write."""
OF_THIS_MACHINE = ("record", "metrics_file", "save_ids", "converted", "python")
"""Parameters that stay here."""


@contextlib.contextmanager
def at_hand(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of a command with the paths of copies in place of addresses, also in NAME=ADDRESS.

    Raises UserError for an address where none can be, and for one that cannot be reached.
    """
    mirrors: dict[str, Mirror] = {}
    local = {name: _local(name, value, mirrors) for name, value in given.items()}
    if not mirrors:
        yield local
        return
    if ranks.launched() > 1:
        raise UserError(
            f"{next(iter(mirrors))}: several processes of a job work on a folder that all of them see; copy it there"
        )
    for mirror in mirrors.values():
        mirror.fetch()
    written = {mirrors[v] for name, v in given.items() if name in WRITTEN and v in mirrors}
    with kept_up(sorted(written, key=lambda mirror: mirror.address)):
        yield local


def _local(name: str, value: Any, mirrors: dict[str, Mirror]) -> Any:
    if isinstance(value, list):
        return [_local(name, one, mirrors) for one in value]
    if not isinstance(value, str):
        return value
    label, sign, rest = value.partition("=")
    if not is_address(value):
        return f"{label}={_local(name, rest, mirrors)}" if sign and is_address(rest) else value
    if name in OF_THIS_MACHINE:
        raise UserError(
            f"--{name.replace('_', '-')} {value}: expected a path of this machine, found an address"
        )
    if value not in mirrors:
        mirrors[value] = Mirror(value)
    return str(mirrors[value].path)
