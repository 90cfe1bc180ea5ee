"""The kinds of draft that redraft knows: one row per kind. A folder is the first kind that recognises it."""

from __future__ import annotations

from ..core.errors import UserError, nearest
from .eagle import EAGLE
from .eagle3 import EAGLE3
from .kind import DraftKind, Layout
from .mtp import MTP
from .token_lm import TOKEN_LM

KINDS: tuple[DraftKind, ...] = (EAGLE3, EAGLE, MTP, TOKEN_LM)


def kind_names() -> list[str]:
    """In the order of the table; the first is what a from-scratch draft is by default."""
    return [kind.name for kind in KINDS]


def kind_named(name: str) -> DraftKind:
    """The row of that name. Raises UserError for an unknown one, with those that exist."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise UserError(f"unknown kind of draft '{name}'; {nearest(name, kind_names())}")


def formats() -> dict[str, tuple[DraftKind, Layout]]:
    """Every layout that is written, with the kind that it holds, by name."""
    return {
        layout.name: (kind, layout)
        for kind in KINDS
        for layout in kind.layouts
        if layout.lay_out is not None
    }


def format_named(name: str) -> tuple[DraftKind, Layout]:
    """The layout of that name and its kind. Raises UserError for an unknown one, with those that exist."""
    found = formats()
    if name not in found:
        raise UserError(f"unknown export format '{name}'; {nearest(name, found)}")
    return found[name]
