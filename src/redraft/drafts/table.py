"""The kinds of draft redraft knows: one row per kind."""

from __future__ import annotations

from .eagle import EagleDraft
from .eagle3 import Eagle3Draft

KINDS: dict[str, type[EagleDraft] | type[Eagle3Draft]] = {
    EagleDraft.kind: EagleDraft,
    Eagle3Draft.kind: Eagle3Draft,
}
