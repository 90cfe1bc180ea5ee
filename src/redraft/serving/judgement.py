"""The judgement of a draft that was tried in an engine. Pure: a record in, sentences out."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.records import Acceptance, Verification

STRICT_DTYPE = "float32"
TOLERANCE = 0.01
HALF_TOLERANCE = 0.03
"""In half precision the engine's kernels and ours round differently, so that now and then another
token is the draft's most likely; in fp32 the two count the same steps."""


def tolerance(dtype: str) -> float:
    """How far the engine's tau may lie from redraft's own, as a share of it."""
    return TOLERANCE if dtype == STRICT_DTYPE else HALF_TOLERANCE


def judge(found: Verification) -> list[str]:
    """Why the draft should not be served; empty when it is good."""
    reasons = []
    for at in found.speed:
        if not at.outputs.holds:
            reasons.append(
                f"with the draft {at.outputs.problem()} from those without it "
                f"({at.concurrency} at a time)"
            )
    if engine_disagrees(found):
        reasons.append(
            f"the engine counts tau {found.tau.tau:.3f} where redraft counts {found.own.tau:.3f} on "
            f"the same prompts; they may differ by {found.tolerance:.0%} in {found.dtype}"
        )
    if found.dtype == STRICT_DTYPE and not found.against_redraft.holds:
        reasons.append(other_target(found))
    if below_record(found) and found.recorded is not None:
        low, high = found.recorded.ci
        reasons.append(
            f"tau {found.tau.tau:.2f} in the engine lies below the run's record "
            f"{found.recorded.tau:.2f} [{low:.2f}, {high:.2f}]"
        )
    return [*reasons, *found.findings]


def conclusion(reasons: Sequence[str]) -> str:
    """The judgement in a sentence."""
    return "do not serve it: " + "; ".join(reasons) if reasons else "serve it"


def notes_on(found: Verification) -> list[str]:
    """What is worth knowing whatever the judgement."""
    notes = []
    slower = [str(at.concurrency) for at in found.speed if at.ratio < 1]
    if slower:
        notes.append(
            f"slower than without a draft on this machine at {', '.join(slower)} requests at a time"
        )
    if found.dtype != STRICT_DTYPE and not found.against_redraft.holds:
        notes.append(other_target(found) + f"; in {found.dtype} rounding can do that")
    if found.recorded is not None and not _comparable(found.recorded, found.k):
        notes.append(
            f"the run's record is at K={found.recorded.k} and temperature {found.recorded.temperature:g}, this at "
            f"K={found.k} and greedy: not compared"
        )
    return notes


def engine_disagrees(found: Verification) -> bool:
    """Whether the engine's tau is farther from redraft's own than the tolerance."""
    return abs(found.tau.tau - found.own.tau) > found.tolerance * found.own.tau


def _comparable(recorded: Acceptance, k: int) -> bool:
    """Whether a record is of what is asked of engines: greedy decoding at K."""
    return recorded.k == k and recorded.temperature == 0


def below_record(found: Verification) -> bool:
    """Whether the engine's tau lies below the run's record by more than the two intervals."""
    if found.recorded is None or not _comparable(found.recorded, found.k):
        return False
    spread = found.own.ci[1] - found.own.tau
    return found.tau.tau + spread < found.recorded.ci[0]


def other_target(found: Verification) -> str:
    """That the engine's target is not the one redraft reads."""
    seen = found.against_redraft.problem("answers")
    return f"even without a draft {seen} between the engine and redraft with the same target"
