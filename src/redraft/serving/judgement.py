"""The judgement of a draft that was tried in an engine. Pure: a record in, sentences out."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.records import Acceptance, EngineSpeed, Verification

STRICT_DTYPE = "float32"
TOLERANCE = 0.01
HALF_TOLERANCE = 0.03
"""In half precision the engine's kernels and ours round differently, so that now and then another
token is the draft's most likely; in fp32 the two count the same steps."""


def tolerance(dtype: str, *, inside: bool = False, rounded: bool = False) -> float:
    """How far the engine's tau may lie from redraft's own, as a share of it.

    `inside` is whether a draft is served from its target's checkpoint by an engine with `Engine.inside`: llama.cpp begins
    a request with the state that the one before left in its slot. `rounded` is whether the engine stores the target's
    weights rounded: then it rounds the states that it multiplies by them too.
    """
    exact = dtype == STRICT_DTYPE and not inside and not rounded
    return TOLERANCE if exact else HALF_TOLERANCE


def judge(found: Verification) -> list[str]:
    """Why the draft should not be served; empty when it is good."""
    reasons = []
    for at in found.speed:
        if not at.outputs.holds:
            reasons.append(
                f"with the draft {at.outputs.problem()} from those without it "
                f"({at.concurrency} at a time)"
            )
    if found.own.steps and not found.tau.drafts:
        reasons.append("the engine drafted nothing; its log (draft.log) tells why")
    elif engine_disagrees(found):
        reasons.append(
            f"the engine counts tau {found.tau.tau:.3f} where redraft counts {found.own_count.tau:.3f} "
            f"on the same prompts; they may differ by {found.tolerance:.0%} in {found.dtype}"
        )
    if strict(found) and not found.against_redraft.holds:
        reasons.append(other_target(found))
    if below_record(found) and found.recorded is not None:
        low, high = found.recorded.ci
        reasons.append(
            f"tau {found.tau.tau:.2f} in the engine lies below the run's record "
            f"{found.recorded.tau:.2f} [{low:.2f}, {high:.2f}]"
        )
    return [*reasons, *found.findings]


def conclusion(found: Verification, reasons: Sequence[str]) -> str:
    """The judgement in a sentence, which follows the measured speeds where there are no other reasons."""
    if reasons:
        return "do not serve it: " + "; ".join(reasons)
    slower = slower_at(found)
    if not slower:
        return "serve it"
    if slower_everywhere(found):
        return f"do not serve it on this machine: slower than without a draft at {_ratios(slower)}"
    faster = [at for at in found.speed if at not in slower]
    return (
        f"serve it where it gains: {_ratios(faster)}; it is slower than without a draft at "
        f"{_ratios(slower)}"
    )


def slower_at(found: Verification) -> list[EngineSpeed]:
    """Where the engine is slower with the draft than without it."""
    return [at for at in found.speed if at.ratio < 1]


def slower_everywhere(found: Verification) -> bool:
    return len(slower_at(found)) == len(found.speed)


def _ratios(speeds: Sequence[EngineSpeed]) -> str:
    """Concurrencies with their ratios, in words."""
    shown = ", ".join(f"{at.concurrency} ({at.ratio:.2f}x)" for at in speeds)
    single = len(speeds) == 1 and speeds[0].concurrency == 1
    return f"{shown} {'request' if single else 'requests'} at a time"


def strict(found: Verification) -> bool:
    """Whether the engine's target has to answer as redraft's does, token for token."""
    return found.dtype == STRICT_DTYPE and not found.engine_args and not found.outtype


def notes_on(found: Verification) -> list[str]:
    """What is worth knowing whatever the judgement."""
    notes = []
    if found.unread:
        notes.append(
            f"only the engine with the draft was compared with the engine without it: redraft could not load the target in "
            f"{found.outtype}, and counted on the target unrounded ({found.unread})"
        )
    elif not found.against_redraft.holds and not strict(found):
        rounding = f"in {found.outtype or found.dtype} rounding"
        why = rounding if not found.engine_args else "these --engine-args"
        notes.append(other_target(found) + f"; {why} can do that")
    if other_answers(found) and not found.unread:
        notes.append("so its tau is not compared with redraft's, which is of other answers")
    if found.recorded is not None and not _comparable(found.recorded, found.k):
        notes.append(
            f"the run's record is at K={found.recorded.k} and temperature {found.recorded.temperature:g}, this at "
            f"K={found.k} and greedy: not compared"
        )
    return notes


def engine_disagrees(found: Verification) -> bool:
    """Whether the engine's tau is farther from redraft's own than the tolerance."""
    own = found.own_count.tau
    return not other_answers(found) and abs(found.tau.tau - own) > found.tolerance * own


def other_answers(found: Verification) -> bool:
    """Whether the engine's steps are of other answers than redraft's: its target is another, or answers otherwise under the
    user's own flags."""
    if found.outtype:
        return bool(found.unread)
    return bool(found.engine_args) and not found.against_redraft.holds


def _comparable(recorded: Acceptance, k: int) -> bool:
    """Whether a record is of what is asked of engines: greedy decoding at K."""
    return recorded.k == k and recorded.temperature == 0


def below_record(found: Verification) -> bool:
    """Whether the engine's tau lies below the run's record by more than the two intervals."""
    if found.recorded is None or not _comparable(found.recorded, found.k):
        return False
    spread = found.own.ci[1] - found.own.tau
    cut = found.own.tau - found.own_count.tau  # the record is of whole steps
    return found.tau.tau + cut + spread < found.recorded.ci[0]


def other_target(found: Verification) -> str:
    """That the engine's target is not the one redraft reads."""
    seen = found.against_redraft.problem("answers")
    return f"even without a draft {seen} between the engine and redraft with the same target"
