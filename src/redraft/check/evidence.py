"""What a few requests show of a draft: acceptance now, on the base, with the states put back, in closed form.

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
from ..metrics.acceptance import prompt_counts, summarise
from ..metrics.config_diagnosis import better_variants
from ..metrics.replay import decoding_of, replay
from ..models.target import Target
from ..prompts.clock import continue_time
from ..prompts.prompts import read_prompts
from ..training.preconditions import check_fits
from .attribution import Causes, find_causes
from .base_check import Changes, compare
from .calibration_runs import CLOSED_FORM, KEEP
from .cost_estimate import TRAINING
from .trial import Trial, tried, walked

LEAST = 8
"""Prompts below which chance decides."""
BATCH = 16
"""Prompts answered at a time; the first batch is the default's whole cost."""
ANSWERS = "answers"
"""How the names of the target's answers begin, in the folder of a check."""
RATE = "rate.json"
"""Tokens answered and the seconds that took, in the folder of a check."""
NARROW = 0.05
"""Half the interval of tau, as a share of tau, at which no further prompt is asked."""
CLOSED_FORM_METHOD = "feature-map+weight-sync+expert"
ANSWERING = RegenerateConfig(max_new_tokens=128)
"""How prompts are answered where nothing else is said: greedily."""


Interval = tuple[float, float, float]
"""A figure and its 95 % interval."""


@dataclass(frozen=True)
class Evidence:
    """All that was measured of a draft on its target. What needs a base is None without one.

    `retention` is tau over `on_base`'s tau, with a 95 % interval over prompts. `entropy` is the target's, in nats
    per token along its answers; `answer_rate` is in tokens per second. `cut` counts the answers that were cut
    by their length. `diagnosis` lists what may be wrong with the draft's files.
    """

    prompts: int
    unadapted: Acceptance
    entropy: float
    answer_tokens: int
    answer_rate: float
    diagnosis: tuple[str, ...]
    cut: int
    on_base: Acceptance | None = None
    retention: Interval | None = None
    changes: Changes | None = None
    causes: Causes | None = None
    closed_form: Trial | None = None

    def predictors(self) -> dict[str, float]:
        """What a calibration run keeps of this (`calibration_runs.Checked`)."""
        found = {"unadapted": self.unadapted.tau, "entropy": self.entropy}
        if self.on_base:
            found["on_base"] = self.on_base.tau
        if self.causes:
            found["base_states"] = self.causes.base_states
        if self.closed_form:
            rise = self.closed_form.tau - self.closed_form.unadapted
            found["closed_form"] = self.unadapted.tau + rise
        return found


@dataclass(frozen=True)
class Gathered:
    """Evidence with the answers behind it, and tau as draws by action that was tried; `level` is its intervals' nominal one."""

    evidence: Evidence
    answers: list[Answer]
    draws: dict[str, Any]
    level: float


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
    prompts = list(read.prompts)
    if base is not None:
        _render_alike(base, target)
    theirs = list(read_prompts(source, base, most, "last").prompts) if base else []
    changes = compare(target, base, prompts, theirs) if base else None
    level = intervals.level_of(-(-len(prompts) // BATCH))
    answers, traces, rate = _answer(target, draft, prompts, out, k, answering, level)
    evidence = Evidence(
        prompts=len(traces),
        unadapted=_summary(traces, answers, k, level),
        entropy=cost(target, answers).entropy,
        answer_tokens=sum(answer.length for answer in answers),
        answer_rate=rate,
        diagnosis=tuple(better_variants(target, stored, answers, k)),
        cut=sum(answer.finish == "length" for answer in answers),
        changes=changes,
    )
    draws = {KEEP: intervals.tau_draws(prompt_counts(traces), k, level)}
    if base is None or on_its_base is None:
        return Gathered(evidence, answers, draws, level)
    asked = {answer.id for answer in answers}
    prompts = [prompt for prompt in theirs if prompt.id in asked]
    native, native_traces = _answer_on_base(base, on_its_base, prompts, out, k, answering)
    closed_form, rise = _try_closed_form(target, base, stored.fitted(target), answers, k, level)
    if closed_form:
        draws[CLOSED_FORM] = draws[KEEP] + rise
    evidence = dataclasses.replace(
        evidence,
        on_base=_summary(native_traces, native, k, level),
        retention=_retention(traces, native_traces, k, level),
        causes=find_causes(target, base, stored, answers, native, k),
        closed_form=closed_form,
    )
    return Gathered(evidence, answers, draws, level)


def answer_all_of(
    target: Target, source: str, out: Path, most: int, k: int, answering: RegenerateConfig
) -> list[Answer]:
    """The answers to `most` prompts of `source`: those that `gather` asked for in `out`, and the rest."""
    prompts = list(read_prompts(source, target, most, "last").prompts)
    return _in_batches(target, prompts, out, ANSWERS, k, answering)


def _in_batches(
    target: Target,
    prompts: Sequence[Prompt],
    out: Path,
    name: str,
    k: int,
    answering: RegenerateConfig,
) -> list[Answer]:
    """The answers to all prompts, in files whose names begin with `name`."""
    return [
        answer
        for at in range(0, len(prompts), BATCH)
        for answer in _answered(
            target,
            prompts[at : at + BATCH],
            out / f"{name}-{_span(prompts, at)}.jsonl",
            k,
            answering,
        )
    ]


def _answer_on_base(
    base: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    out: Path,
    k: int,
    answering: RegenerateConfig,
) -> tuple[list[Answer], list[StepTrace]]:
    """The base's own answers to the prompts that the target answered, and the steps of its draft on them."""
    answers = _in_batches(base, prompts, out, "native", k, answering)
    traces = walked(replay(base, draft, answers, k)) if answers else []
    if len(traces) < LEAST:
        raise UserError(
            f"the base {base.name} answers {len(traces)} of {len(prompts)} prompts with more than a token, too "
            "few to compare with; leave --base out"
        )
    return answers, traces


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
        file = out / f"{ANSWERS}-{_span(prompts, at)}.jsonl"
        fresh, began = not file.exists(), time.monotonic()
        found = _answered(target, some, file, k, answering)
        answers += found
        if fresh:  # what was there already says nothing of the rate
            spent["tokens"] += sum(answer.length for answer in found)
            spent["seconds"] += time.monotonic() - began
            write_text(out / RATE, json.dumps(spent) + "\n")
        traces = walked(replay(target, draft, answers, k)) if answers else []
        if len(traces) >= BATCH // 2 and _narrow(traces, k, level):
            break
    if len(traces) < LEAST:
        raise UserError(
            f"{len(traces)} prompts with an answer to draft for are too few for any recommendation: expected "
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


def _summary(
    traces: Sequence[StepTrace], answers: Sequence[Answer], k: int, level: float
) -> Acceptance:
    decoding = decoding_of(answers)
    return summarise(
        traces, answers, k=k, mode="replay", seconds=0.0, decoding=decoding, level=level
    )


def _retention(
    ours: Sequence[StepTrace], on_base: Sequence[StepTrace], k: int, level: float
) -> Interval:
    """Not in pairs, which is a little wider: the two may leave out other prompts."""
    found = intervals.ratio(prompt_counts(ours), prompt_counts(on_base), k, level)
    return found.value, found.low, found.high


def _try_closed_form(
    target: Target,
    base: Target,
    stored: StoredDraft,
    answers: Sequence[Answer],
    k: int,
    level: float,
) -> tuple[Trial | None, Any]:
    """What closed forms bring, and the rise in tau as draws; None for a draft that has none.

    Fitted with the settings of the calibration runs, whatever adapting would train with: it is a predictor.
    """
    config = dataclasses.replace(TRAINING, method=CLOSED_FORM_METHOD, epochs=0.0)
    try:
        check_fits(stored.build(target), config, target, base)
    except UserError as problem:
        say(f"the closed form was not tried: {problem}")
        return None, None
    return tried(target, stored, answers, config, k, level, base, seed=1)
