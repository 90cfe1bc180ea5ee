"""What a few requests show of a draft: acceptance now, on the base, with the states put back, and refreshed.

Prompts are answered batch by batch, until the interval of tau is narrow enough or the prompts are used
up. Answers lie in a folder; a check that is run again there asks only for what is missing. Each batch is a look
at the interval, so all intervals and draws of a check of several batches have the level that covers 95 % under
this rule (`intervals.level_of`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.load import StoredDraft
from ..config import RegenerateConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.files import write_text
from ..core.folders import read_json
from ..core.records import Acceptance, Answer, Prompt, StepTrace
from ..drafts.base import Draft
from ..generation.on_policy import cost
from ..generation.regenerate import regenerate
from ..metrics import intervals
from ..metrics.acceptance import pooled_tau, prompt_counts, summarise
from ..metrics.config_diagnosis import better_variants
from ..metrics.replay import decoding_of, replay, replay_each
from ..models.target import Target
from ..pipeline.stages import merge_draft, train_adapter
from ..prompts.clock import continue_time
from ..prompts.prompts import read_prompts
from ..training.preconditions import check_fits
from .attribution import Causes, find_causes
from .base_check import Changes, compare
from .cost_estimate import TRAINING
from .prediction import KEEP, REFRESH

LEAST = 8
"""Prompts below which chance decides."""
BATCH = 16
"""Prompts answered at a time; the first batch is the default's whole cost."""
RATE = "rate.json"
"""Tokens answered and the seconds that took, in the folder of a check."""
NARROW = 0.05
"""Half the interval of tau, as a share of tau, at which no further prompt is asked."""
REFRESHING = "relay+refresh+expert"
ANSWERING = RegenerateConfig(max_new_tokens=128)
"""How prompts are answered where nothing else is said: greedily."""


Interval = tuple[float, float, float]
"""A figure and its 95 % interval."""


@dataclass(frozen=True)
class Refreshed:
    """A repair in closed form: fitted on one half of the answers, measured on the other, next to reuse."""

    method: str
    tau: float
    reused: float
    difference: tuple[float, float]
    prompts: int
    seconds: float


@dataclass(frozen=True)
class Evidence:
    """All that was measured of a draft on its target. What needs a base is None without one.

    `retention` is tau over `native`'s tau, with a 95 % interval over prompts. `entropy` is the target's, in nats
    per token along its answers; `answer_rate` is in tokens per second, `cut` counts the answers that were cut by their length. `suspects` say what may be
    wrong with the draft's files.
    """

    prompts: int
    reused: Acceptance
    entropy: float
    answer_tokens: int
    answer_rate: float
    suspects: tuple[str, ...]
    cut: int
    native: Acceptance | None = None
    retention: Interval | None = None
    changes: Changes | None = None
    causes: Causes | None = None
    refreshed: Refreshed | None = None

    def signs(self) -> dict[str, float]:
        """What the outlook is predicted from."""
        found = {"reused": self.reused.tau, "entropy": self.entropy}
        if self.native:
            found["native"] = self.native.tau
        if self.causes:
            found["words"] = self.causes.words
        if self.refreshed:
            rise = self.refreshed.tau - self.refreshed.reused
            found["refreshed"] = self.reused.tau + rise
        return found


@dataclass(frozen=True)
class Gathered:
    """Evidence with the answers behind it, and tau as draws by action that was tried."""

    evidence: Evidence
    answers: list[Answer]
    draws: dict[str, Any]


def gather(
    target: Target,
    stored: StoredDraft,
    source: str,
    out: Path,
    *,
    base: Target | None = None,
    k: int = 4,
    most: int = 64,
    answering: RegenerateConfig = ANSWERING,
) -> Gathered:
    """Measure on up to `most` prompts of the file `source`, with answers in the folder `out`.

    `answering` says how the answers are sampled, which is how drafts are then scored.

    Raises UserError for a draft of another family, a base that is not the target's parent, and for
    too few prompts.
    """
    draft = stored.build(target)
    on_its_base = stored.build(base) if base is not None else None
    continue_time(target, sorted(out.glob("*.about.json")))
    read = read_prompts(source, target, most, "last")
    say(read.summary())
    found = list(read.prompts)
    if base is not None:
        _render_alike(base, target)
    theirs = list(read_prompts(source, base, most, "last").prompts) if base else []
    changes = compare(target, base, found, theirs) if base else None
    level = intervals.level_of(-(-len(found) // BATCH))
    answers, traces, rate = _answer(target, draft, found, out, k, answering, level)
    draws = {KEEP: intervals.tau_draws(prompt_counts(traces), k, level)}
    evidence = Evidence(
        prompts=len(traces),
        reused=_summary(traces, answers, k, level),
        entropy=cost(target, answers).entropy,
        answer_tokens=sum(answer.length for answer in answers),
        answer_rate=rate,
        suspects=tuple(better_variants(target, stored, answers, k)),
        cut=sum(answer.finish == "length" for answer in answers),
    )
    if base is None or on_its_base is None:
        return Gathered(evidence, answers, draws)
    asked = {answer.id for answer in answers}
    mine = [p for p in theirs if p.id in asked]
    native = [
        answer
        for at in range(0, len(mine), BATCH)
        for answer in _answered(
            base, mine[at : at + BATCH], out / f"native-{_span(mine, at)}.jsonl", k, answering
        )
    ]
    on_base = _walked(replay(base, on_its_base, native, k)) if native else []
    if len(on_base) < LEAST:
        raise UserError(
            f"the base {base.name} answers {len(on_base)} of {len(asked)} prompts with more than a token, too "
            "few to compare with; leave --base out"
        )
    refreshed, rise = _refresh(target, base, stored.fitted(target), answers, k, level)
    if refreshed:
        draws[REFRESH] = draws[KEEP] + rise
    evidence = dataclasses.replace(
        evidence,
        native=_summary(on_base, native, k, level),
        retention=_retention(traces, on_base, k, level),
        changes=changes,
        causes=find_causes(target, base, stored, answers, native, k),
        refreshed=refreshed,
    )
    return Gathered(evidence, answers, draws)


def _answer(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    out: Path,
    k: int,
    answering: RegenerateConfig,
    level: float,
) -> tuple[list[Answer], list[StepTrace], float]:
    """Answers and steps of as many prompts as it takes, and the rate of answering in tokens/s.

    `level` is the nominal level of the interval that has to be narrow.
    """
    answers: list[Answer] = []
    traces: list[StepTrace] = []
    spent = read_json(out / RATE) if (out / RATE).is_file() else {"tokens": 0, "seconds": 0.0}
    for at in range(0, len(prompts), BATCH):
        some = prompts[at : at + BATCH]
        file = out / f"answers-{_span(prompts, at)}.jsonl"
        fresh, began = not file.exists(), time.monotonic()
        found = _answered(target, some, file, k, answering)
        answers += found
        if fresh:  # what was there already says nothing of the rate
            spent["tokens"] += sum(answer.length for answer in found)
            spent["seconds"] += time.monotonic() - began
            write_text(out / RATE, json.dumps(spent) + "\n")
        traces = _walked(replay(target, draft, answers, k)) if answers else []
        if len(traces) >= BATCH // 2 and _narrow(traces, k, level):
            break
    if len(traces) < LEAST:
        raise UserError(
            f"{len(traces)} prompts with an answer to draft for are too few for any verdict: expected "
            f"{LEAST} at least, {BATCH} or more are better; {len(prompts)} prompts were read"
        )
    return answers, traces, spent["tokens"] / max(spent["seconds"], 1e-9)


def _render_alike(base: Target, target: Target) -> None:
    """Have the base asked as the target is: at the same time, with the same template variables."""
    if not base.template_text:
        base.template = target.template_text or None
        say(f"{base.name} has no chat template: it is asked with the target's")
    base.rendered_at = target.rendered_at
    args = target.template_args.items()
    base.template_args = {name: value for name, value in args if name in base.template_text}


def _span(prompts: Sequence[Prompt], at: int) -> str:
    """The numbers of the first and the last prompt of a batch."""
    return f"{at + 1}-{min(at + BATCH, len(prompts))}"


def _answered(
    target: Target, prompts: Sequence[Prompt], file: Path, k: int, answering: RegenerateConfig
) -> list[Answer]:
    return [a for a in regenerate(target, prompts, file, answering, lookahead=k) if a.length >= 2]


def _narrow(traces: Sequence[StepTrace], k: int, level: float) -> bool:
    found = intervals.tau(prompt_counts(traces), k, level)
    return (found.high - found.low) / 2 <= NARROW * found.value


def _walked(traces: Sequence[StepTrace]) -> list[StepTrace]:
    return [trace for trace in traces if trace.accepted]


def _summary(
    traces: Sequence[StepTrace], answers: Sequence[Answer], k: int, level: float
) -> Acceptance:
    decoding = decoding_of(answers)
    return summarise(
        traces, answers, k=k, mode="replay", seconds=0.0, decoding=decoding, level=level
    )


def _retention(
    ours: Sequence[StepTrace], native: Sequence[StepTrace], k: int, level: float
) -> Interval:
    """Not in pairs, which is a little wider: the two may leave out other prompts."""
    found = intervals.ratio(prompt_counts(ours), prompt_counts(native), k, level)
    return found.value, found.low, found.high


def _refresh(
    target: Target,
    base: Target,
    stored: StoredDraft,
    answers: Sequence[Answer],
    k: int,
    level: float,
) -> tuple[Refreshed | None, Any]:
    """What closed forms bring, and the rise in tau as draws; None for a draft that has none.

    Fitted with the known cases' settings, whatever a repair would train with: it is a sign.
    """
    config = dataclasses.replace(TRAINING, method=REFRESHING, epochs=0.0)
    try:
        check_fits(stored.build(target), config, target, base)
    except UserError as problem:
        say(f"refresh was not tried: {problem}")
        return None, None
    half = len(answers) // 2
    began = time.monotonic()
    part = train_adapter(target, stored, answers[:half], answers[half:], config, k, base=base)
    seconds = time.monotonic() - began
    drafts = [stored.build(target), merge_draft(stored, part, target).build(target)]
    was, now = map(_walked, replay_each(target, drafts, answers[half:], k))
    pair = prompt_counts(now), prompt_counts(was)
    # A seed of its own: the draws of tau come from another set of prompts.
    rise = intervals.difference_draws(*pair, k, level, seed=1)
    interval = intervals.difference(*pair, k, level).ends
    return Refreshed(
        REFRESHING, pooled_tau(now), pooled_tau(was), interval, len(now), seconds
    ), rise
