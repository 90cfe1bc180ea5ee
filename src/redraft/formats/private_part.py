"""A private part on disk: its tensors, and a card saying what it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..private.part import PrivatePart
from .folders import WEIGHTS, read_file, read_json, write_folder
from .load import StoredDraft

CARD = "private.json"


def save_private(folder: Path, part: PrivatePart) -> None:
    card = json.dumps({"method": part.method, **part.card}, indent=2) + "\n"
    write_folder(folder, part.tensors, {CARD: card})


def load_private(folder: Path) -> PrivatePart:
    card = read_json(folder / CARD)
    return PrivatePart(card.pop("method"), read_file(folder / WEIGHTS), card)


def check_belongs(part: PrivatePart, shared: StoredDraft) -> None:
    """Refuse a private part that was trained beside another shared draft."""
    expected = part.card.get("shared_hash")
    if expected is not None and expected != shared.hash():
        raise UserError(
            f"this private part was trained beside the shared draft {expected}, but "
            f"{shared.folder} is {shared.hash()}; fuse it with the draft named in its card "
            f"({part.card.get('shared', 'not recorded')})"
        )
