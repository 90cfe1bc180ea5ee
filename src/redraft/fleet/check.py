"""`redraft fleet check`: what one draft is worth to each of many LoRA adapters of one base, and which of them lost most.

    OUT/NAME/base.jsonl      the base's answers to an adapter's prompts
    OUT/NAME/answers.jsonl   the adapter's own
    OUT/fleet.html           the page

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
from ..core.records import Answer, Prompt, versions
from ..generation.answer_file import about
from ..generation.regenerate import regenerate
from ..metrics import intervals
from ..metrics.acceptance import pooled_tau
from ..metrics.replay import replay
from ..models.target import Target
from ..prompts.clock import continue_time
from ..prompts.prompts import read_prompts
from .member import PER, Member, note_unused_files

LEAST = 4
"""The fewest prompts of an adapter that is measured."""
ANSWERS, STATES, BOTH = "answers", "states", "both"
MOST = 2 / 3
"""The share of a loss that counts as most of it."""


@dataclass(frozen=True)
class MemberCheck:
    """What was measured of an adapter: tau of the draft on it, on the base for the same prompts, and the ratio of the two.

    `lost` are the passes of the target that 1,000 tokens of the adapter cost more than with the base's tau; `of_fleet` is the
    same for 1,000 tokens of the whole fleet's traffic. `changed` is whether the interval of the ratio leaves out 1.
    `base_states` is tau on the adapter's answers as the base reads them; None where that was not measured.
    """

    name: str
    prompts: int
    tau: Interval
    on_base: Interval
    retention: Interval
    lost: float
    of_fleet: float
    changed: bool
    base_states: float | None = None

    @property
    def needs(self) -> bool:
        """Whether it lost acceptance, beyond its interval."""
        return self.changed and self.lost > 0

    @property
    def cause(self) -> str:
        """Where most of the loss comes from: what the adapter says, the states that the draft reads, or both.

        Empty where nothing was lost, and where it is not known.
        """
        if not self.needs or self.base_states is None:
            return ""
        by_answers = (PER / self.base_states - PER / self.on_base[0]) / self.lost
        return ANSWERS if by_answers > MOST else STATES if by_answers < 1 - MOST else BOTH


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
    note_unused_files(base, members)
    stored.build(base)  # refuses a draft that does not fit, before anything is answered
    asked = {member.name: _prompts(base, member, most) for member in members}
    total = sum(member.share for member in members)
    found = []
    for member in members:
        say(f"{member.name}: {len(asked[member.name])} prompts")
        folder, prompts = out / member.name, asked[member.name]
        folder.mkdir(parents=True, exist_ok=True)
        own, _ = _counts(base, stored, prompts, folder / "base.jsonl", k, answering)
        on_base, states = own, None
        if member.adapter is not None:
            with member.on(base) as target:
                file = folder / "answers.jsonl"
                own, answers = _counts(target, stored, prompts, file, k, answering)
            read = replay(base, stored.build(base), [a for a in answers if a.id in on_base], k)
            states = pooled_tau([trace for trace in read if trace.accepted])
        share = member.share / total
        found.append(checked(member.name, own, on_base, k, share, states))
    return FleetCheck(base.name, str(stored.folder), k, ordered(found))


def ordered(found: Sequence[MemberCheck]) -> tuple[MemberCheck, ...]:
    """Those that lost most of the fleet's passes first."""
    return tuple(sorted(found, key=lambda one: -one.of_fleet))


def _prompts(base: Target, member: Member, most: int) -> list[Prompt]:
    prompts = list(read_prompts(member.prompts, base, most).prompts)
    if len(prompts) < LEAST:
        raise UserError(
            f"adapter {member.name}: {len(prompts)} prompts in {member.prompts}; {LEAST} are needed, 16 are better"
        )
    return prompts


Counts = dict[str, tuple[float, float]]
"""(accepted, steps) by prompt, or by group of prompts."""


def _counts(
    target: Target,
    stored: StoredDraft,
    prompts: Sequence[Prompt],
    file: Path,
    k: int,
    answering: RegenerateConfig,
) -> tuple[Counts, list[Answer]]:
    """What was counted of each prompt whose answer has a step, and the answers."""
    answers = [a for a in regenerate(target, prompts, file, answering, lookahead=k) if a.length > 1]
    traces = replay(target, stored.build(target), answers, k)
    counted = {
        a.id: (float(t.gained), float(t.steps))
        for a, t in zip(answers, traces, strict=True)
        if t.accepted
    }
    if len(counted) < LEAST:
        raise UserError(
            f"{target.name} answers {len(counted)} of {len(prompts)} prompts with more than a token, so there is next to nothing to "
            "draft; leave it out of the fleet"
        )
    return counted, answers


def checked(
    name: str,
    own: Counts,
    on_base: Counts,
    k: int,
    share: float,
    base_states: float | None = None,
    prompts: int | None = None,
) -> MemberCheck:
    """What was counted of an adapter says, and of the base on the same prompts; `share` is that of the fleet's traffic.

    Only prompts, or groups of `prompts`, that both have a step of are compared. Raises UserError where these are too few.
    """
    both = [prompt for prompt in own if prompt in on_base]
    if len(both) < LEAST:
        raise UserError(
            f"{name}: {len(both)} prompts are answered with more than a token by both the base and the adapter; {LEAST} are needed: "
            "give it more prompts"
        )
    pair = [[own[prompt] for prompt in both]], [[on_base[prompt] for prompt in both]]
    tau, theirs = (intervals.tau(each, k) for each in pair)
    kept = intervals.paired_ratio(*pair, k)
    lost = PER / tau.value - PER / theirs.value
    return MemberCheck(
        name=name,
        prompts=len(both) if prompts is None else prompts,
        tau=_ends(tau),
        on_base=_ends(theirs),
        retention=_ends(kept),
        lost=lost,
        of_fleet=lost * share,
        changed=not kept.low <= 1.0 <= kept.high,
        base_states=base_states,
    )


def _ends(found: intervals.Interval) -> Interval:
    return found.value, found.low, found.high
