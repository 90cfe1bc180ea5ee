"""Guarding other traffic: from the trained tensors back towards the unadapted draft, until nothing is lost there.

Between weights that share a beginning, the way is smooth: part of it keeps most of what training brought, and loses
less on what was not trained on. Source: weight-space ensembles (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..adapters.adapter import attached
from ..core.console import say
from ..core.records import Answer
from ..drafts.base import Draft
from ..metrics.acceptance import pooled_tau
from ..metrics.replay import check_lookahead, replay_each
from ..models.target import Target
from .adapter_run import AdapterRun

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the way from the unadapted draft to the best step."""


@dataclass(frozen=True)
class Guard:
    """Held-out answers to other prompts, by name, of each of whose taus no more than the share `tolerance` may be lost.

    `reference` are taus, by name, of which it may not be lost, in place of those that training started with. So a draft that is
    adapted again and again does not lose the tolerance each time. Nothing is asked that was lost before.
    """

    answers: Mapping[str, Sequence[Answer]]
    tolerance: float
    reference: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str, start: float) -> float:
        """The tau that is held against."""
        return self.reference.get(name, start)

    def floor(self, name: str, start: float) -> float:
        """The least tau that is allowed."""
        return min(self.of(name, start) * (1 - self.tolerance), start)


def usable(guard: Guard, k: int) -> Guard | None:
    """The guard without answers of one token, which nothing is drafted for; None with a line where no others are left.

    Raises UserError for answers without the lookahead that K needs.
    """
    longer = {name: [a for a in some if a.length > 1] for name, some in guard.answers.items()}
    found = {name: some for name, some in longer.items() if some}
    for some in found.values():
        check_lookahead(some, k)
    if not found:
        say(
            "no guard: the answers that would guard are single tokens, which nothing is drafted for"
        )
        return None
    return Guard(found, guard.tolerance, guard.reference)


def go_back(
    target: Target, run: AdapterRun, heldout: Sequence[Answer], k: int, guard: Guard
) -> None:
    """Keep the share of the way with the best held-out tau among those that the guard allows.

    Of the guard's answers, those that keep the least of their tau decide. Nothing of the way, the unadapted draft, is
    always allowed. A run whose best step is its start has no way to go back,
    and one from scratch did not start at the unadapted draft.
    """
    began, state = time.monotonic(), run.state
    if not state.best_step or run.method.fresh:
        return
    ends = [between(run.start, state.best, share) for share in SHARES]
    drafts = [attached(run.draft, tensors) for tensors in ends]
    own, *others = _taus(target, drafts, [heldout, *guard.answers.values()], k)
    guarding = dict(zip(guard.answers, others, strict=True))
    kept_of = [
        {name: taus[at] / guard.of(name, taus[0]) for name, taus in guarding.items()}
        for at in range(len(SHARES))
    ]
    worst = [min(each, key=each.__getitem__) for each in kept_of]
    allowed = [
        at
        for at in range(len(SHARES))
        if all(taus[at] >= guard.floor(name, taus[0]) for name, taus in guarding.items())
    ]
    kept = max(allowed, key=lambda at: own[at])
    state.way = [(share, own[at], guarding[worst[at]][at]) for at, share in enumerate(SHARES)]
    state.best, state.share = ends[kept], SHARES[kept]
    state.evaluation_seconds += time.monotonic() - began
    held = {worst[at] for at in range(kept + 1, len(SHARES)) if at not in allowed}
    say(
        f"guard: {state.share:.0%} of the way from the unadapted draft to step {state.best_step} is kept"
        + (f"; further on {', '.join(sorted(held))} would lose" if held else "")
    )


def between(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Tensors so far on the way; those that are no floats are the end's."""
    return {
        name: start[name].lerp(tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


def _taus(
    target: Target, drafts: Sequence[Draft], groups: Sequence[Sequence[Answer]], k: int
) -> list[list[float]]:
    """The tau of each draft on each group; an answer that several groups hold is read once."""
    every = list(dict.fromkeys(answer for group in groups for answer in group))
    found = [
        dict(zip(every, traces, strict=True)) for traces in replay_each(target, drafts, every, k)
    ]
    return [
        [pooled_tau([t for t in map(of.__getitem__, group) if t.accepted]) for of in found]
        for group in groups
    ]
