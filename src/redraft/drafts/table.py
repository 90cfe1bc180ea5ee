"""The draft kinds redraft knows. A new kind is one file and one row."""

from __future__ import annotations

from .base import Draft
from .eagle3 import Eagle3Draft

DRAFTS: dict[str, type[Draft]] = {
    Eagle3Draft.kind: Eagle3Draft,
}
