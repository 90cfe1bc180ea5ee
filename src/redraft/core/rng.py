"""Random numbers keyed by a seed and a place in the work, so that a resumed run draws the same."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, *place: object) -> torch.Generator:
    """A CPU generator for one place in the work, independent of all others."""
    return torch.Generator().manual_seed(derived_seed(seed, *place))


def derived_seed(seed: int, *place: object) -> int:
    """A seed for one place in the work, 56 bits, unrelated to those of all others."""
    key = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return int.from_bytes(key[:7], "little")
