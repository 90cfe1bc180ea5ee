"""Why a draft accepts so little: other readings of its files, scored by replay.

A wrong export never crashes; it only accepts less. So every plausible misreading is tried on the
target's own answers, and one that accepts clearly more is named.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..formats.load import StoredDraft
from ..formats.misreadings import misreadings
from ..records import Answer
from ..target import Target
from .acceptance import pooled_tau
from .replay import replay

CLEARLY = 0.15
"""A reading must raise tau by this much to be named."""


def suspects(target: Target, stored: StoredDraft, answers: Sequence[Answer], k: int) -> list[str]:
    """Sentences naming what is wrong with the files, best supported first; none if all is well.

    `answers` are the target's own, with K-1 tokens of overrun.
    """

    def tau(draft: StoredDraft) -> float:
        traces = replay(target, draft.build(target), answers, k)
        return pooled_tau([trace for trace in traces if trace.accepted])

    written = tau(stored)
    scored = [(tau(other.draft), other.cause) for other in misreadings(stored, target)]
    return [
        f"{cause} (tau {found:.2f} that way, {written:.2f} as written, {len(answers)} prompts)"
        for found, cause in sorted(scored, reverse=True)
        if found > written + CLEARLY
    ]
