"""What a draft's files could mean instead: the mistakes that load everywhere and cost acceptance.

Each is the same draft read another way, as the row of its kind lists them. If one of them accepts clearly
more than the draft that is written, then that is the mistake (see `metrics/config_diagnosis.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..models.target import Target
from .load import StoredDraft


@dataclass(frozen=True)
class ConfigVariant:
    """Another reading of a stored draft, and what is wrong with the files if it is the right one."""

    cause: str
    draft: StoredDraft


def config_variants(stored: StoredDraft, target: Target) -> Iterator[ConfigVariant]:
    """Every other reading of `stored` that its tensors allow."""
    stored = stored.fitted(target)
    for cause, (config, tensors) in stored.row.config_variants(
        stored.config, stored.tensors, target
    ):
        yield ConfigVariant(cause, dataclasses.replace(stored, config=config, tensors=tensors))
