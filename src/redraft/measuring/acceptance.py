"""From verification steps to figures: tau, its interval, per-position acceptance, loop rate.

tau = 1 + accepted draft tokens / verification steps, pooled over prompts (sum over sum), every
step counted in full; the prefill's own token belongs to no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..decode.modes import Decoding
from ..errors import UserError
from ..records import Acceptance, Answer, ExpectedSteps, StepTrace

Steps = StepTrace | ExpectedSteps

RESAMPLES = 2000
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
) -> Acceptance:
    """Pool the steps of all prompts. Raises UserError when no prompt has a step."""
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
        ci=bootstrap_tau(used),
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


def resampled_tau(traces: Sequence[Steps], seed: int = 0) -> Any:
    """Tau under RESAMPLES draws of the prompts, float64 [RESAMPLES]. Equal seeds draw equal prompts."""
    accepted = np.array([t.gained for t in traces], dtype=float)
    steps = np.array([t.steps for t in traces], dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(traces), (RESAMPLES, len(traces)))
    return 1 + accepted[draws].sum(1) / steps[draws].sum(1)


def bootstrap_tau(traces: Sequence[Steps], seed: int = 0) -> tuple[float, float]:
    """95 % interval of tau when prompts are resampled, numerator and denominator together."""
    low, high = np.percentile(resampled_tau(traces, seed), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_difference(
    one: Sequence[Steps], other: Sequence[Steps], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of tau(one) - tau(other) over the same resampled prompts."""
    differences = resampled_tau(one, seed) - resampled_tau(other, seed)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_recovery(
    adapted: Sequence[Steps],
    reused: Sequence[Steps],
    dedicated: Sequence[Steps],
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % interval of (adapted - reused) / (dedicated - reused) over the same resampled prompts.

    None when the denominator's interval reaches 0 or it does not exceed 0.15 tau: then only the
    difference in tau may be reported.
    """
    # All three walk the same prompts, so the same draws resample numerator and denominator.
    a, r, d = (resampled_tau(t, seed) for t in (adapted, reused, dedicated))
    gap = d - r
    if np.percentile(gap, 2.5) <= 0 or pooled_tau(dedicated) - pooled_tau(reused) <= 0.15:
        return None
    low, high = np.percentile((a - r) / gap, [2.5, 97.5])
    return float(low), float(high)


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
