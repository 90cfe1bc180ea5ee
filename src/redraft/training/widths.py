"""`--width auto`: which widths of an expert are tried, and which is taken."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.expert import widenable
from ..drafts.base import Draft

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Widths tried, as shares of the shared FFN's."""
GOOD_ENOUGH = 0.99


def shared_width(draft: Draft) -> int:
    """Neurons of the draft's (widest) shared FFN."""
    return max(ffn.width for ffn in widenable(draft).values())


def candidate_widths(shared: int) -> list[int]:
    """Ascending widths to try next to `shared` neurons."""
    return sorted({max(1, round(shared * share)) for share in SHARES})


def resolve_width(width: int | float, shared: int) -> int:
    """A share (a float) of the `shared` neurons as a number; a number as it is."""
    return width if isinstance(width, int) else max(1, round(width * shared))


def smallest_good(widths: Sequence[int], taus: Sequence[float]) -> int:
    """The smallest width whose held-out tau is within 1 % of the best."""
    best = max(taus)
    return min(w for w, tau in zip(widths, taus, strict=True) if tau >= GOOD_ENOUGH * best)
