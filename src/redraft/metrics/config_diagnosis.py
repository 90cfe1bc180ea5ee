"""Why a draft accepts so little: other readings of its files, scored by replay.

A wrong export never crashes; it only accepts less. So every plausible variant of the config is tried on the
target's own answers, and one that accepts clearly more is named.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoints.config_variants import config_variants
from ..checkpoints.load import StoredDraft
from ..core.records import Answer, StepTrace
from ..models.target import Target
from . import intervals
from .acceptance import pooled_tau, prompt_counts
from .replay import replay

FEWEST = 8
"""Below this many prompts chance finds variants."""
CLEARLY = 0.15
"""A reading must raise tau by this much to be named, and its interval must exclude 0."""


def better_variants(
    target: Target, stored: StoredDraft, answers: Sequence[Answer], k: int
) -> list[str]:
    """Sentences naming what is wrong with the files, best supported first; none if all is well.

    `answers` are the target's own, with K-1 tokens of lookahead; fewer than FEWEST name nothing.
    """

    def traces(draft: StoredDraft) -> list[StepTrace]:
        return [t for t in replay(target, draft.build(target), answers, k) if t.accepted]

    written = traces(stored)
    if len(written) < FEWEST:
        return []
    named = []
    for other in config_variants(stored, target):
        found = traces(other.draft)
        tau, base = pooled_tau(found), pooled_tau(written)
        rise = intervals.difference(prompt_counts(found), prompt_counts(written), k)
        if rise.value > CLEARLY and rise.low > 0:
            figures = f"tau {tau:.2f} that way, {base:.2f} as written, {len(written)} prompts"
            named.append((tau, f"{other.cause} ({figures})"))
    return [cause for _, cause in sorted(named, reverse=True)]
