"""From verification steps to figures: tau, its interval, per-position acceptance, loop rate.

tau = 1 + accepted draft tokens / verification steps, pooled over prompts (sum over sum), every
step counted in full; the prefill's own token belongs to no step. Intervals are in `intervals.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.records import Acceptance, Answer, ExpectedSteps, StepTrace
from ..decoding.acceptance_modes import Decoding
from . import intervals

Steps = StepTrace | ExpectedSteps

LOOP_WINDOW = 48
LONGEST_PERIOD = 12


def summarise(
    traces: Sequence[Steps],
    answers: Sequence[Answer],
    *,
    k: int,
    mode: str,
    seconds: float,
    decoding: Decoding | None = None,
    provenance: dict[str, Any] | None = None,
    level: float = intervals.LEVEL,
) -> Acceptance:
    """Pool the steps of all prompts. Raises UserError when no prompt has a step.

    `level` is the interval's nominal level, above 95 % where prompts were asked until it was narrow.
    """
    decoding = decoding or Decoding()
    used = [trace for trace in traces if trace.steps]
    if not used:
        raise UserError(
            f"none of the {len(traces)} prompts has a verification step: every answer is a single "
            "token, so there is nothing to draft; measure on prompts with longer answers"
        )
    looping = {a.id for a in answers if is_loop(a.answer)}
    straight = [trace for trace in used if trace.id not in looping]
    accepted = sum(trace.gained for trace in used)
    steps = sum(trace.steps for trace in used)
    return Acceptance(
        tau=1 + accepted / steps,
        ci=intervals.tau(prompt_counts(used), k, level).ends,
        accepted=accepted,
        steps=steps,
        prompts=len(used),
        excluded=len(traces) - len(used),
        k=k,
        temperature=decoding.sampling.temperature,
        per_position=per_position(used, k),
        loop_rate=len(looping) / max(len(answers), 1),
        mode=mode,
        seconds=seconds,
        tau_without_loops=pooled_tau(straight) if straight else None,
        draft_token=decoding.draft_token,
        acceptance=decoding.mode,
        provenance=provenance or {},
    )


def pooled_tau(traces: Sequence[Steps]) -> float:
    return 1 + sum(t.gained for t in traces) / sum(t.steps for t in traces)


def prompt_counts(traces: Sequence[Steps]) -> list[list[tuple[float, float]]]:
    """(accepted, steps) of each prompt, in one list as of one seed: what intervals are made from."""
    return [[(trace.gained, trace.steps) for trace in traces]]


def per_position(traces: Sequence[Steps], k: int) -> tuple[float, ...]:
    """Of the steps that reached position j, the share that accepted it; 0 where none reached it."""
    counts = np.sum([t.counts(k) for t in traces], axis=0)
    reached = counts[::-1].cumsum()[::-1]
    return tuple(float(reached[j + 1] / reached[j]) if reached[j] else 0.0 for j in range(k))


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether the last 48 tokens repeat with a period of at most 12."""
    tail = list(tokens[-LOOP_WINDOW:])
    if len(tail) < LOOP_WINDOW:
        return False
    return any(
        all(tail[i] == tail[i - period] for i in range(period, LOOP_WINDOW))
        for period in range(1, LONGEST_PERIOD + 1)
    )
