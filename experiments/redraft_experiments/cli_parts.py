"""What the commands of this package share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redraft.cli.bundles import OutputFlags
from redraft.core.errors import UserError


def show_cells(
    output: OutputFlags,
    cells: Sequence[Any],
    show: Callable[[Any], None],
    record: str | None,
    every: Sequence[Any],
) -> None:
    """Show a bench's cells, and write `every` cell of its folder to the file `record`."""
    from redraft.core.files import write_text
    from redraft.core.records import to_json

    if record:
        write_text(Path(record), "".join(json.dumps(to_json(cell)) + "\n" for cell in every))
    output.show({"cells": [to_json(cell) for cell in cells]}, lambda: show(cells))


def numbers(flag: str, text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} takes numbers, for example 1,4,16; got '{text}'") from None
    if min(found) < 1:
        raise UserError(f"{flag} takes numbers from 1 on; got '{text}'")
    return found
