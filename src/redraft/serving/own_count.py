"""redraft's own verification steps, counted as an engine counts them.

redraft counts whole steps: all K drafted tokens, and all that agree, also past the answer's end. An engine
may cut the last step of an answer. Its row has the `Cut` that does the same; the rules stand in
`certificate_check.py`, which has to work without redraft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.records import Answer, StepTrace
from .certificate_check import Cut
from .counters import Counters


@dataclass(frozen=True)
class Limits:
    """What ends an answer, and how many tokens a step drafts."""

    k: int
    max_new_tokens: int
    stop_ids: Sequence[int]


def count_own(
    traces: Sequence[StepTrace], answers: Sequence[Answer], limits: Limits, cut: Cut
) -> Counters:
    """The counters that an engine would have after redraft's steps."""
    steps = [
        step
        for trace, answer in zip(traces, answers, strict=True)
        for step in cut(
            trace.accepted, answer.tokens, limits.stop_ids, limits.k, limits.max_new_tokens
        )
    ]
    accepted = [count for _, count in steps]
    return Counters(
        drafts=len(steps),
        drafted=sum(drafted for drafted, _ in steps),
        accepted=sum(accepted),
        per_position=tuple(sum(n > at for n in accepted) for at in range(limits.k)),
    )
