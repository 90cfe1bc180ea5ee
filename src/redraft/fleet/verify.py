"""`redraft fleet verify`: a base, all its adapters and one draft in one running engine, each member against redraft's own counts.

One request at a time, so that steps can be counted: the counters are read after each answer. In half precision an answer may part
from redraft's at a near-tie, after which the steps are of other tokens; so steps are compared of equal answers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..checkpoints.load import StoredDraft
from ..core.console import Progress, say
from ..core.records import EngineAcceptance, Lossless, Prompt, versions
from ..metrics.lossless import compare
from ..metrics.measure import own_steps
from ..models.target import Target
from ..prompts.prompts import read_prompts
from ..serving.counters import Counters, added
from ..serving.engine import TARGET, RunningEngine, Speculation
from ..serving.environment import Environment
from ..serving.judgement import STRICT_DTYPE, tolerance
from ..serving.own_count import Limits, count_own
from ..serving.verify import Request, fitting, method_of, serving_of
from .member import Member, note_unused_files


@dataclass(frozen=True)
class MemberServed:
    """A member in the engine: outputs with the draft against those without, the latter against redraft's own decoding.

    Of the `compared` answers that are redraft's too: the engine's counters, and redraft's steps as the engine counts them.
    `problem` is empty where all is as it should be.
    """

    name: str
    outputs: Lossless
    against_redraft: Lossless
    compared: int
    counted: EngineAcceptance
    own: EngineAcceptance
    problem: str


@dataclass(frozen=True)
class FleetServed:
    """A fleet in one engine."""

    base: str
    draft: str
    adapters: int
    engine_version: str
    dtype: str
    k: int
    max_new_tokens: int
    members: tuple[MemberServed, ...]
    good: bool
    conclusion: str
    versions: dict[str, str] = field(default_factory=versions)


@dataclass(frozen=True)
class _Asked:
    """Answers of a member, and what was counted while each was given."""

    answers: list[list[int]]
    counted: list[Counters]


def verify_fleet(
    environment: Environment,
    base: Target,
    stored: StoredDraft,
    members: Sequence[Member],
    request: Request,
    *,
    most: int = 8,
) -> FleetServed:
    """Serve all members with and without the draft, and compare up to `most` prompts of each with redraft's own decoding.

    Raises UserError where draft and base do not fit, and where the engine cannot be run.
    """
    method = method_of(stored, request.engine)
    stored.build(base)  # refuses a draft that does not fit, before anything is started
    note_unused_files(base, members)
    asked = {
        member.name: fitting(read_prompts(member.prompts, base, most).prompts, base, request)
        for member in members
    }
    speculation = Speculation(method, str(stored.folder), request.k)
    plain, drafted = (
        _serve(environment, base, members, asked, request, how, what)
        for how, what in (("plain", None), ("draft", speculation))
    )
    say("redraft's own loop on the same token ids")
    if torch.cuda.is_available():  # the servers are gone
        base.model.to("cuda")
    found = []
    with Progress("comparing", len(members), "members") as progress:
        for member in members:
            given = plain[member.name], drafted[member.name]
            found.append(_compared(base, stored, member, asked[member.name], given, request))
            progress.advance(1)
    wrong = [row for row in found if row.problem]
    return FleetServed(
        base=base.name,
        draft=str(stored.folder),
        adapters=sum(member.adapter is not None for member in members),
        engine_version=environment.version,
        dtype=_dtype(base),
        k=request.k,
        max_new_tokens=request.max_new_tokens,
        members=tuple(found),
        good=not wrong,
        conclusion="; ".join(f"{row.name}: {row.problem}" for row in wrong)
        or "every member is served as redraft counts it",
    )


def _serve(
    environment: Environment,
    base: Target,
    members: Sequence[Member],
    asked: Mapping[str, Sequence[Prompt]],
    request: Request,
    how: str,
    speculation: Speculation | None,
) -> dict[str, _Asked]:
    """All members in one server, asked one after another."""
    every = [prompt for some in asked.values() for prompt in some]
    names = {member.name: f"adapter-{member.name}" for member in members if member.adapter}
    what = dataclasses.replace(
        serving_of(base, every, request),
        fleet=tuple((names[m.name], m.adapter) for m in members if m.adapter),
        speculation=speculation,
    )
    with request.engine.serve(environment, what, request.logs / f"{how}.log") as running:
        return {
            name: _ask(running, names.get(name, TARGET), prompts, base, request)
            for name, prompts in asked.items()
        }


def _ask(
    running: RunningEngine, model: str, prompts: Sequence[Prompt], base: Target, request: Request
) -> _Asked:
    engine = dataclasses.replace(running, model=model)
    found, before = _Asked([], []), engine.counters()
    with Progress(model, len(prompts), "prompts") as progress:
        for prompt in prompts:
            answer = engine.complete(prompt.tokens, request.max_new_tokens, base.stop_ids)
            found.answers.append(answer)
            now = engine.counters()
            found.counted.append(now.since(before))
            before = now
            progress.advance(1)
    return found


def _compared(
    base: Target,
    stored: StoredDraft,
    member: Member,
    prompts: Sequence[Prompt],
    given: tuple[_Asked, _Asked],
    request: Request,
) -> MemberServed:
    plain, drafted = given
    with member.on(base) as target:
        draft = stored.build(target)
        traces, answers = own_steps(target, draft, prompts, request.k, request.max_new_tokens)
        outputs = compare(target, prompts, plain.answers, drafted.answers)
        own_answers = [answer.answer for answer in answers]
        against = compare(target, prompts, own_answers, plain.answers)
    limits = Limits(request.k, request.max_new_tokens, base.stop_ids)
    same = [i for i, own in enumerate(own_answers) if list(own) == list(drafted.answers[i])]
    steps = count_own(
        [traces[i] for i in same], [answers[i] for i in same], limits, request.engine.cut
    )
    own, counted = steps.acceptance(), added(drafted.counted[i] for i in same).acceptance()
    return MemberServed(
        member.name,
        outputs,
        against,
        len(same),
        counted,
        own,
        _problem(outputs, against, counted, own, _dtype(base), request.engine_args),
    )


def _problem(
    outputs: Lossless,
    against: Lossless,
    counted: EngineAcceptance,
    own: EngineAcceptance,
    dtype: str,
    engine_args: Sequence[str],
) -> str:
    """What is wrong with a member in the engine; empty where nothing is. The user's own flags may change its answers."""
    if not outputs.holds:
        return f"with the draft {outputs.problem()} from those without it"
    if engine_args and not against.holds:
        return ""
    if dtype == STRICT_DTYPE and not against.holds:
        return f"even without a draft {against.problem('answers')} from redraft's"
    if own.drafts and not counted.drafts:
        return "the engine drafted nothing"
    if abs(counted.tau - own.tau) > tolerance(dtype) * own.tau:
        return f"the engine counts tau {counted.tau:.3f}, redraft {own.tau:.3f}"
    return ""


def _dtype(base: Target) -> str:
    return str(base.dtype).removeprefix("torch.")
