"""An adapter on disk: its tensors, the record of its training, and a card, the manifest.

The record (training.json) holds what clock and memory showed; the card holds nothing of it, so the
same training writes the same card.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..core.errors import UserError
from ..core.folders import WEIGHTS, read_file, read_json, state_hash, write_folder
from ..core.records import TrainRecord
from ..core.renamed import with_today_keys
from .load import StoredDraft

CARD = "adapter.json"
OLD_CARD = "private.json"
TRAINING = "training.json"


def save_adapter(folder: Path, adapter: Adapter) -> None:
    card = {"method": adapter.method, **adapter.card}
    files = {TRAINING: card.pop("train")} if "train" in card else {}
    texts = {n: json.dumps(v, indent=2) + "\n" for n, v in {**files, CARD: card}.items()}
    write_folder(folder, adapter.tensors, texts)


def load_adapter(folder: Path) -> Adapter:
    """An adapter as it was saved. Raises UserError for a missing, damaged or mixed folder."""
    old = not (folder / CARD).is_file() and (folder / OLD_CARD).is_file()
    name = OLD_CARD if old else CARD
    card = with_today_keys(read_json(folder / name))
    tensors = read_file(folder / WEIGHTS)
    if "method" not in card or card.get("adapter_hash") not in (None, state_hash(tensors)):
        raise UserError(
            f"{folder / WEIGHTS} is not what its card {name} describes; remove {folder} and train "
            "again"
        )
    if (folder / TRAINING).is_file():
        card["train"] = read_training(folder)
    return Adapter(card.pop("method"), tensors, card)


def read_training(folder: Path) -> dict[str, Any]:
    """The training record of a folder, as JSON types with the fields of `TrainRecord`."""
    try:
        record = with_today_keys(read_json(folder / TRAINING))
        missing = {field.name for field in dataclasses.fields(TrainRecord)} ^ set(record)
        if missing:
            raise UserError(f"{folder / TRAINING}: missing or unknown {', '.join(sorted(missing))}")
    except UserError as problem:
        raise UserError(f"{problem}; remove {folder} and train again") from None
    return record


def check_belongs(adapter: Adapter, shared: StoredDraft) -> None:
    """Refuse an adapter that was trained for another shared draft."""
    expected = adapter.card.get("shared_hash")
    if expected is not None and expected != shared.hash():
        raise UserError(
            f"this adapter was trained next to the shared draft {expected}, but "
            f"{shared.folder} is {shared.hash()}; merge it with the draft named in its card "
            f"({adapter.card.get('shared', 'not recorded')}), and with --target where the target's vocabulary grew"
        )
