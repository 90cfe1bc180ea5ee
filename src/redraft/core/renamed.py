"""Keys of stored records that have another name today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLD = {
    "gang": "trained_together",
    "overrun": "lookahead",
    "private": "adapter",
    "private_hash": "adapter_hash",
    "taps": "aux_layers",
    "verdict": "conclusion",
}


def with_today_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored record under today's names of its keys."""
    return {OLD.get(key, key): value for key, value in stored.items()}
