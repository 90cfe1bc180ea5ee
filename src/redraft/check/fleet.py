"""`redraft fleet check`: what one draft is worth to each of many LoRA adapters of one base, and which of them lost most.

    OUT/NAME/base.jsonl      the base's answers to an adapter's prompts
    OUT/NAME/answers.jsonl   the adapter's own

The base is loaded once and the adapters are put on it one after another. Answers are kept, so that a check goes on where
it stopped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints.load import StoredDraft
from ..config import RegenerateConfig, read_yaml
from ..core.config_values import ConfigValues
from ..core.console import say
from ..core.errors import UserError
from ..core.records import Prompt, versions
from ..drafts.base import Draft
from ..generation.regenerate import regenerate
from ..metrics import intervals
from ..metrics.acceptance import prompt_counts
from ..metrics.replay import replay
from ..models.loading import adapter_on
from ..models.target import Target, weights_hash
from ..prompts.prompts import read_prompts
from .evidence import ANSWERING, Interval

LEAST = 4
"""The fewest prompts of an adapter that is measured."""
NAME = re.compile(r"\w[\w.-]*")
PER = 1000
"""Tokens that passes of the target are counted for."""


@dataclass(frozen=True)
class Member:
    """An adapter of the fleet: its folder, its prompts, and its share of the traffic (of the sum of all shares)."""

    name: str
    adapter: str
    prompts: str
    share: float = 1.0


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


def read_fleet(path: Path) -> list[Member]:
    """The members that a YAML file names: NAME: {adapter: FOLDER, prompts: FILE, share: 2}; paths are relative to the file.

    Raises UserError for anything else, and for two members with the same weights.
    """
    members: list[Member] = []
    for name, row in read_yaml(path).items():
        where = f"{path}, {name}"
        if not isinstance(row, dict) or not set(row) <= {"adapter", "prompts", "share"}:
            raise UserError(f"{where}: expected adapter, prompts and perhaps share, got {row}")
        values = ConfigValues(row, where)
        share = values.number("share", 1.0)
        missing = [key for key in ("adapter", "prompts") if not values.given(key)]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing, a path")
        adapter, prompts = (str(path.parent / values.text(k, "")) for k in ("adapter", "prompts"))
        if not NAME.fullmatch(str(name)) or str(name) in {one.name for one in members}:
            raise UserError(
                f"{where}: a name of letters, digits, dots, dashes and underscores is expected, each once"
            )
        members.append(Member(str(name), adapter, prompts, share))
    if not members:
        raise UserError(f"{path} names no adapters")
    _check_different(members)
    return members


def _check_different(members: Sequence[Member]) -> None:
    seen: dict[str, str] = {}
    for member in members:
        if not Path(member.adapter).is_dir():
            raise UserError(f"adapter {member.name}: {member.adapter} is no folder")
        settings = Path(member.adapter) / "adapter_config.json"
        scaled = settings.read_text(encoding="utf-8") if settings.is_file() else ""
        key = f"{weights_hash(member.adapter)} {scaled} {member.prompts}"
        first = seen.setdefault(key, member.name)
        if first != member.name:
            raise UserError(
                f"{first} and {member.name} are the same adapter, with the same prompts; leave one out"
            )


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
    draft = stored.build(base)  # refuses a draft that does not fit, before anything is answered
    asked = {member.name: _prompts(base, member, most) for member in members}
    total = sum(member.share for member in members)
    found = []
    for member in members:
        say(f"{member.name}: {len(asked[member.name])} prompts")
        folder, prompts = out / member.name, asked[member.name]
        folder.mkdir(parents=True, exist_ok=True)
        on_base = _counts(base, draft, prompts, folder / "base.jsonl", k, answering)
        with adapter_on(base, member.adapter) as target:
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
            f"{target.name} answers {len(traces)} of {len(prompts)} prompts with more than a token, too few"
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
