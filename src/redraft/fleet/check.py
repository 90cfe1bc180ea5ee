"""`redraft fleet check`: what one draft is worth to each of many LoRA adapters of one base, and which of them lost most.

    OUT/NAME/base.jsonl      the base's answers to an adapter's prompts
    OUT/NAME/answers.jsonl   the adapter's own

The base is loaded once and the adapters are put on it one after another. Answers are kept, so that a check goes on where
it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..check.evidence import ANSWERING, Interval
from ..checkpoints.load import StoredDraft
from ..config import RegenerateConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.records import Prompt, versions
from ..drafts.base import Draft
from ..generation.answer_file import about
from ..generation.regenerate import regenerate
from ..metrics import intervals
from ..metrics.acceptance import prompt_counts
from ..metrics.replay import replay
from ..models.target import Target
from ..prompts.clock import continue_time
from ..prompts.prompts import read_prompts
from .member import PER, Member

LEAST = 4
"""The fewest prompts of an adapter that is measured."""


@dataclass(frozen=True)
class MemberCheck:
    """What was measured of an adapter: tau of the draft on it, on the base for the same prompts, and the ratio of the two.

    `lost` are the passes of the target that 1,000 tokens of the adapter cost more than with the base's tau; `of_fleet` is the
    same for 1,000 tokens of the whole fleet's traffic. `changed` is whether the interval of the ratio leaves out 1.
    """

    name: str
    prompts: int
    tau: Interval
    on_base: Interval
    retention: Interval
    lost: float
    of_fleet: float
    changed: bool


@dataclass(frozen=True)
class FleetCheck:
    """A draft and its adapters, those that lost most of the fleet's passes first."""

    base: str
    draft: str
    k: int
    members: tuple[MemberCheck, ...]
    versions: dict[str, str] = field(default_factory=versions)


def check_fleet(
    base: Target,
    stored: StoredDraft,
    members: Sequence[Member],
    out: Path,
    *,
    k: int = 4,
    most: int = 16,
    answering: RegenerateConfig = ANSWERING,
) -> FleetCheck:
    """Measure a draft on every adapter, on up to `most` prompts of each; answers are kept in the folder `out`.

    Raises UserError, which names the adapter, for one that does not fit the base and for too few prompts.
    """
    files = [about(out / member.name / "base.jsonl") for member in members]
    continue_time(base, files)
    draft = stored.build(base)  # refuses a draft that does not fit, before anything is answered
    asked = {member.name: _prompts(base, member, most) for member in members}
    total = sum(member.share for member in members)
    found = []
    for member in members:
        say(f"{member.name}: {len(asked[member.name])} prompts")
        folder, prompts = out / member.name, asked[member.name]
        folder.mkdir(parents=True, exist_ok=True)
        counts = on_base = _counts(base, draft, prompts, folder / "base.jsonl", k, answering)
        if member.adapter is not None:
            with member.on(base) as target:
                tuned = stored.build(target)
                counts = _counts(target, tuned, prompts, folder / "answers.jsonl", k, answering)
        found.append(_checked(member, counts, on_base, k, member.share / total))
    ordered = sorted(found, key=lambda one: -one.of_fleet)
    return FleetCheck(base.name, str(stored.folder), k, tuple(ordered))


def _prompts(base: Target, member: Member, most: int) -> list[Prompt]:
    prompts = list(read_prompts(member.prompts, base, most).prompts)
    if len(prompts) < LEAST:
        raise UserError(
            f"adapter {member.name}: {len(prompts)} prompts in {member.prompts}; {LEAST} are needed, 16 are better"
        )
    return prompts


Counts = list[list[tuple[float, float]]]


def _counts(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    file: Path,
    k: int,
    answering: RegenerateConfig,
) -> Counts:
    """Accepted tokens and steps of each prompt."""
    answers = [a for a in regenerate(target, prompts, file, answering, lookahead=k) if a.length > 1]
    traces = [trace for trace in replay(target, draft, answers, k) if trace.accepted]
    if len(traces) < LEAST:
        raise UserError(
            f"{target.name} answers {len(traces)} of {len(prompts)} prompts with more than a token, so there is next to nothing to "
            "draft; leave it out of the fleet"
        )
    return prompt_counts(traces)


def _checked(member: Member, counts: Counts, on_base: Counts, k: int, share: float) -> MemberCheck:
    tau, theirs = intervals.tau(counts, k), intervals.tau(on_base, k)
    kept = intervals.ratio(counts, on_base, k)
    lost = PER / tau.value - PER / theirs.value
    return MemberCheck(
        name=member.name,
        prompts=len(counts[0]),
        tau=_ends(tau),
        on_base=_ends(theirs),
        retention=_ends(kept),
        lost=lost,
        of_fleet=lost * share,
        changed=not kept.low <= 1.0 <= kept.high,
    )


def _ends(found: intervals.Interval) -> Interval:
    return found.value, found.low, found.high


def advice(found: MemberCheck) -> str:
    """In a word: what to do about it."""
    return "adapt" if found.changed and found.lost > 0 else "keep"
