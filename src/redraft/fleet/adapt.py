"""`redraft fleet adapt`: one draft adapted for all adapters of a base, and for the base.

    answers/NAME/heldout.jsonl   a member's answers to the prompts that stop the training and guard what is kept
    answers/NAME/eval.jsonl      to those that are measured
    answers/NAME/adapt.jsonl     to those trained on
    answers/base/...             the base's, to prompts of all members
    needs.json                   the passes that each member lost, by which the budget is split
    adapter/, draft/, measure/   as in a run of `redraft adapt`; measure/NAME.json by member
    fleet.json                   the report

The stages are those of `redraft adapt`. Answers are given with one adapter on the base at a time. Training reads one stream
of batches, in which each row has its own adapter on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ..check.evidence import Interval
from ..checkpoints.load import load_draft, read_draft
from ..config import AdaptConfig, Resolved
from ..core.console import say
from ..core.errors import UserError
from ..core.folders import read_json
from ..core.records import Prompt, StepTrace, to_json, versions
from ..core.remote import address_of
from ..generation.answer_file import read_answers
from ..metrics import intervals
from ..metrics.acceptance import pooled_tau, prompt_counts
from ..metrics.replay import replay
from ..models.target import Target
from ..models.target_adapters import BASE, fleet_on
from ..pipeline.job import Job, check_job, record_job
from ..pipeline.job_prompts import apart
from ..pipeline.run_folder import RunFolder
from ..pipeline.stages import answer, certify, export, measure_file, train
from ..prompts.clock import continue_time
from ..prompts.prompts import PromptSet, read_prompts, split_prompts
from ..selection.select import most_kept
from .check import LEAST
from .member import PER, Member, note_unused_files
from .split import split_budget

NEEDS, REPORT = "needs.json", "fleet.json"
REFERENCE = 16
"""Held-out prompts of each adapter that the base answers too: what its loss is measured against."""


@dataclass(frozen=True)
class MemberAdapted:
    """A member before and after: tau of the unadapted and the adapted draft on the same answers, and the difference.

    `lost` are the passes of the target per 1,000 tokens that it lost against the base before, by which the budget was
    split; `trained_on` its answers that were trained on; `share` its part of the traffic, None for a base that has none.
    """

    name: str
    prompts: int
    trained_on: int
    lost: float
    share: float | None
    before: Interval
    after: Interval
    change: Interval

    @property
    def lost_by_it(self) -> bool:
        """Whether the adapted draft is worse for it, beyond its interval."""
        return self.change[2] < 0


@dataclass(frozen=True)
class FleetAdapted:
    """One draft for a fleet. `passes` are those of the target per 1,000 tokens of the fleet's traffic, before and after."""

    base: str
    unadapted: str
    draft: str
    k: int
    members: tuple[MemberAdapted, ...]
    passes: tuple[float, float]
    versions: dict[str, str] = field(default_factory=versions)


@dataclass(frozen=True)
class MemberPrompts:
    """The prompts of a member."""

    adapt: Sequence[Prompt]
    heldout: Sequence[Prompt]
    measured: Sequence[Prompt]


def adapt_fleet(
    base: Target,
    draft: str,
    members: Sequence[Member],
    out: str | Path,
    config: Resolved,
    source: str = "",
) -> FleetAdapted:
    """Adapt one draft for all members into the run folder `out`; continues what an interrupted run left.

    `source` names the file of the members in the run's record. Raises UserError, which names the member, for an
    adapter that cannot be read row by row with others and for fewer than 8 prompts; and for settings that a fleet does
    not take.
    """
    c, stored = config.config, read_draft(draft).fitted(base)
    _check_settings(c)
    check_job(base, stored, None, c)
    note_unused_files(base, members)
    continue_time(base, [Path(out) / "run.json"])
    parts = fleet_prompts(base, members, c)
    asked = [m for m in members if m.adapter is not None]
    everyone = [*asked, Member(BASE, None, "", 1.0)]
    adapters = {member.name: str(member.adapter) for member in asked}
    with fleet_on(base, adapters):
        pass  # refuses what does not fit, before anything is answered
    with RunFolder.open(out) as run:
        job = Job(run, base, stored, None, c)
        record_job(job, PromptSet(source, (), ()), config)
        aside = _answer_aside(job, everyone, parts)
        _check_something_to_draft(job, aside)
        needs = _needs(job, asked, aside)
        counts = _split(job, members, parts, needs)
        answered = _answer_adapt(job, everyone, parts, counts)
        keys = [*answered.values(), *aside.values()]
        held = {member.name: f"{member.name}/heldout" for member in everyone}
        with fleet_on(base, adapters) as fleet:
            trained = train(
                dataclasses.replace(job, target=fleet),
                list(answered),
                keys,
                heldout=list(held.values()),
                guarded_by=held,
            )
        exported = export(job, trained)
        for member in everyone:
            _measure(job, member, exported, aside[f"{member.name}/eval"])
        certify(job, exported, [*parts[BASE].measured, *parts[BASE].heldout])
        return _report(job, members, everyone, counts, needs)


def _check_settings(c: AdaptConfig) -> None:
    """Raise UserError for settings of `adapt` that mean nothing here."""
    wrong = {
        "answers of endpoints": bool(c.regenerate.endpoints),
        "regenerate.answers=original": c.regenerate.answers != "regenerate",
        f"select.select={c.select.select}": c.select.select != "random",
        f"--budget {c.select.budget}": c.select.budget_value.kind not in ("count", "share"),
        f"--method {c.train.method}": c.train.method_value.closed_form
        or c.train.method_value.fresh,
        "select.by=prompts": c.select.by != "answers",
        "select.coverage": bool(c.select.coverage),
        "general.guard=off": c.general.guard == "off",
        "general.share": bool(c.general.share),
        "general.prompts": bool(c.general.prompts),
    }
    found = [name for name, there in wrong.items() if there]
    if found:
        raise UserError(
            f"fleet adapt does not take {', '.join(found)}: each adapter answers its own prompts in this process, of which a "
            "budget (500, 0.5) is split by need; the draft is trained by gradient steps from what it is, and guarded by what is held "
            "out of every member"
        )


def fleet_prompts(
    base: Target, members: Sequence[Member], c: AdaptConfig
) -> dict[str, MemberPrompts]:
    """Each member's prompts, and the base's: its own if the fleet has such a row, and some of every adapter's."""
    parts = {member.name: _parts_of(base, member, c) for member in members}
    aside = [some for found in parts.values() for some in (found.heldout, found.measured)]
    parts = {  # members may share prompts
        name: dataclasses.replace(found, adapt=apart(found.adapt, aside))
        for name, found in parts.items()
    }
    others = [found for name, found in parts.items() if name != BASE]
    own = parts.get(BASE, MemberPrompts((), (), ()))
    reference = [found.heldout[:REFERENCE] for found in others]
    measured = own.measured or _of_base(_once(_in_turn([found.measured for found in others])))
    measured = measured[: c.measure.eval_limit]
    parts[BASE] = MemberPrompts(
        own.adapt or _of_base(_once(_in_turn([found.adapt for found in others]))),
        apart(_once([*own.heldout, *_of_base(chain.from_iterable(reference))]), [measured]),
        measured,
    )
    return parts


def _parts_of(base: Target, member: Member, c: AdaptConfig) -> MemberPrompts:
    found = read_prompts(member.prompts, base, None, c.regenerate.turns)
    say(f"{member.name}: {found.summary()}")
    named = [dataclasses.replace(p, id=f"{member.name}/{p.id}") for p in found.prompts]
    try:
        split = split_prompts(named, c.measure.eval_limit, c.measure.heldout, c.regenerate.seed)
    except UserError as problem:
        raise UserError(f"{member.name}, {member.prompts}: {problem}") from None
    return MemberPrompts(*split)


def _in_turn(lists: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """The first of each, then the second of each."""
    return [prompt for row in zip_longest(*lists) for prompt in row if prompt is not None]


def _once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once, though members share it."""
    return list({prompt.tokens: prompt for prompt in reversed(prompts)}.values())[::-1]


def _of_base(prompts: Any) -> list[Prompt]:
    return [dataclasses.replace(prompt, id=f"{BASE}/{prompt.id}") for prompt in prompts]


def _answer_aside(
    job: Job, everyone: Sequence[Member], parts: Mapping[str, MemberPrompts]
) -> dict[str, str]:
    """Every member answers the prompts that stop training and those measured; the stage key of each file."""
    c = job.config
    measured = dataclasses.replace(
        c.regenerate,
        temperature=c.measure.temperature,
        greedy_share=0.0,
        max_new_tokens=c.measure.eval_new_tokens,
    )
    keys = {}
    for member in everyone:
        say(f"{member.name}:")
        with member.on(job.target) as target:
            there = dataclasses.replace(job, target=target)
            for what, prompts in (
                ("heldout", parts[member.name].heldout),
                ("eval", parts[member.name].measured),
            ):
                name = f"{member.name}/{what}"
                keys[name] = answer(there, name, prompts, measured, job.k)
    return keys


def _answer_adapt(
    job: Job,
    everyone: Sequence[Member],
    parts: Mapping[str, MemberPrompts],
    counts: Mapping[str, int],
) -> dict[str, str]:
    """Every member answers as many of its prompts as it was given; the stage key of each file."""
    keys = {}
    for member in everyone:
        if counts[member.name]:
            say(f"{member.name}:")
            with member.on(job.target) as target:
                there = dataclasses.replace(job, target=target)
                name, some = f"{member.name}/adapt", parts[member.name].adapt
                keys[name] = answer(there, name, some[: counts[member.name]], job.config.regenerate)
    return keys


def _check_something_to_draft(job: Job, aside: Mapping[str, str]) -> None:
    """Raise UserError for a member whose answers are single tokens, which come from the prefill."""
    for name in aside:
        answers = read_answers(job.answers(name))
        longer = sum(answer.length > 1 for answer in answers)
        if longer < min(LEAST, len(answers)):
            raise UserError(
                f"{name.partition('/')[0]} answers {longer} of {len(answers)} prompts with more than a token, so there is next "
                "to nothing to draft; leave it out of the fleet"
            )


def _needs(job: Job, asked: Sequence[Member], aside: Mapping[str, str]) -> dict[str, float]:
    """The passes per 1,000 tokens that the unadapted draft costs each adapter more than it costs the base."""
    held = {name: key for name, key in aside.items() if name.endswith("/heldout")}

    def work() -> None:
        draft = job.draft.build(job.target)
        asked_of_base = _heldout(job, BASE)
        traces = replay(job.target, draft, asked_of_base, job.k)
        base = {a.prompt: trace for a, trace in zip(asked_of_base, traces, strict=True)}
        found = {BASE: 0.0}
        for member in asked:
            answers = _heldout(job, member.name)
            both = [answer for answer in answers if answer.prompt in base]
            theirs = [base[answer.prompt] for answer in both] or list(base.values())
            with member.on(job.target) as target:
                own = replay(target, job.draft.build(target), both or answers, job.k)
            found[member.name] = _passes(own) - _passes(theirs)
        job.run.write_json(NEEDS, found)

    inputs = {"answers": held, "draft": job.draft.hash(), "k": job.k}
    job.run.stage("needs", inputs, [NEEDS], work)
    return {name: float(lost) for name, lost in read_json(job.run.path / NEEDS).items()}


def _heldout(job: Job, name: str) -> list[Any]:
    return [a for a in read_answers(job.answers(f"{name}/heldout")) if a.length > 1]


def _passes(traces: Sequence[StepTrace]) -> float:
    """Passes of the target per 1,000 tokens."""
    return PER / pooled_tau([trace for trace in traces if trace.accepted])


def _split(
    job: Job,
    members: Sequence[Member],
    parts: Mapping[str, MemberPrompts],
    needs: Mapping[str, float],
) -> dict[str, int]:
    """The budget over members, by the passes that they lost and their shares of the traffic."""
    shares = {member.name: member.share for member in members}
    wanted = {name: max(lost, 0.0) * shares.get(name, 0.0) for name, lost in needs.items()}
    available = {name: len(parts[name].adapt) for name in needs}
    pool = sum(len(parts[member.name].adapt) for member in members)
    found = split_budget(most_kept(pool, job.config.select.budget_value), wanted, available)
    say("prompts trained on: " + ", ".join(f"{name} {count}" for name, count in found.items()))
    return found


def _measure(job: Job, member: Member, exported: str, answered: str) -> None:
    """The steps of the unadapted and the adapted draft on a member's answers, into measure/NAME.json."""
    file = f"measure/{member.name}.json"

    def work() -> None:
        with member.on(job.target) as target:
            steps = {}
            for when, folder in (("before", job.draft.folder), ("after", job.run.path / "draft")):
                draft = load_draft(str(folder), target)
                found = measure_file(target, draft, job.answers(f"{member.name}/eval"), job.k)
                steps[when] = prompt_counts([t for t in found.traces if t.steps])[0]
        job.run.write_json(file, steps)

    inputs = {"exported": exported, "answers": answered, "k": job.k}
    job.run.stage(f"measure {member.name}", inputs, [file], work)


def _report(
    job: Job,
    members: Sequence[Member],
    everyone: Sequence[Member],
    counts: Mapping[str, int],
    needs: Mapping[str, float],
) -> FleetAdapted:
    total = sum(member.share for member in members)
    shares = {member.name: member.share / total for member in members}
    found = []
    for member in everyone:
        steps = read_json(job.run.path / f"measure/{member.name}.json")
        before, after = [steps["before"]], [steps["after"]]
        found.append(
            MemberAdapted(
                name=member.name,
                prompts=len(steps["before"]),
                trained_on=counts[member.name],
                lost=needs[member.name],
                share=shares.get(member.name),
                before=_ends(intervals.tau(before, job.k)),
                after=_ends(intervals.tau(after, job.k)),
                change=_ends(intervals.difference(after, before, job.k)),
            )
        )
    ordered = sorted(found, key=lambda one: -one.change[0])
    passes = [
        sum((one.share or 0.0) * PER / figure[0] for one, figure in zip(found, taus, strict=True))
        for taus in ([one.before for one in found], [one.after for one in found])
    ]
    record = FleetAdapted(
        address_of(job.target.name),
        address_of(job.draft.folder),
        address_of(job.run.path / "draft"),
        job.k,
        tuple(ordered),
        (passes[0], passes[1]),
    )
    job.run.write_json(REPORT, to_json(record))
    return record


def _ends(found: intervals.Interval) -> Interval:
    return found.value, found.low, found.high
