"""`redraft export --verify`: the written folder, read by a second reader, computes what was exported."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import UserError
from .load import StoredDraft

TOLERANCE = 1e-5
"""Largest relative difference of a logit; rotary frequencies are float32 on one side."""


@torch.no_grad()
def check_export(stored: StoredDraft, folder: Path) -> float:
    """Compare logits of chains; returns the worst relative difference.

    Raises UserError when the folder computes another function than `stored`.
    """
    worst = stored.row.second_reading(stored.build(dtype=torch.float64), folder)
    if not worst < TOLERANCE:
        raise UserError(
            f"{folder}: read back apart, the folder computes another function than what was "
            f"exported (logits differ by {worst:.2g} of their size); do not serve it, and please "
            "report this"
        )
    return worst
