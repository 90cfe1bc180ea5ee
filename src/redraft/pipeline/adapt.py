"""The main job, in the order it happens.

    prompts -> answers -> select -> train -> merge and export -> measure before/after -> report

Each step is one function of `stages.py` and one stage of the run folder; each is also a command of its own.
What is measured as "after" is the exported folder, read back as an engine would read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.load import StoredDraft, read_draft
from ..config import Resolved, resolve
from ..core.console import say
from ..core.errors import UserError
from ..core.records import Acceptance, Prompt, Safety
from ..core.report_record import AdaptReport
from ..drafts.base import Draft
from ..generation.answer_file import prompts_hash, read_answers
from ..models.target import Target
from ..prompts.clock import continue_time
from ..selection.scoring import as_samples
from ..selection.select import kept_prompts
from .auto_budget import train_in_rounds
from .general import (
    GENERAL,
    GENERAL_HELDOUT,
    GUARDED_BY,
    OFF_GENERAL,
    answering,
    general_prompts,
)
from .job import Job, check_job, record_job
from .job_prompts import JobPrompts, Sources, read_job_prompts
from .run_folder import RunFolder
from .safety import OFF, measure_safety
from .stages import SELECTION, answer, certify, export, measure, select, train
from .start import begin_with, check_previous, folder_of_run
from .summary import report_of

WHOLE = 1 << 30
"""As `max_new_tokens`: answers are as long as they are, within the target's context."""


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` returns: the report, and the merged draft as it was exported."""

    report: AdaptReport
    merged: StoredDraft
    run: Path
    worked: bool  # False when every stage was done already

    @property
    def before(self) -> Acceptance:
        return self.report.before

    @property
    def after(self) -> Acceptance:
        return self.report.after


def adapt(
    target: Target,
    draft: Draft | str,
    prompts: str | None = None,
    *,
    answers: str | None = None,
    out: str | Path = "redraft-run",
    method: str | None = None,
    config: Resolved | None = None,
    limit: int | None = None,
    eval_prompts: str | None = None,
    off_domain: dict[str, str] | None = None,
    safety_prompts: str | None = None,
    base: Target | None = None,
    previous: str | None = None,
) -> AdaptResult:
    """Re-align a draft with `target` on `prompts`, in the run folder `out`.

    `answers` is a file of prompts with answers that are trained on unchanged, in place of `prompts`; whether
    they are the target's own is measured and reported. `draft` is a folder, a Hub id, or what
    `load_draft` returned. The mean acceptance length tau is measured before and after on `eval_prompts`, or on
    prompts kept aside from `prompts`. `off_domain` names further files (label -> path) that are measured
    but never trained on. `safety_prompts` is one more: on it the target's answers with the exported
    draft are compared with those without any. `base` is the model that the target was fine-tuned from,
    for the methods that compare the two (feature-map, weight-sync). `previous` is the draft of the model's version before (or the
    run folder that it came from), which training begins with if the target accepts it more often than `draft` (see `start.py`).
    Running again in the same folder does
    only what is missing. Raises UserError for bad input, for a folder that another process works in,
    and when the disk refuses a write.
    """
    if config is not None and method is not None:
        raise UserError(
            "name the method in the configuration (train.method) or as method=, not both"
        )
    resolved = config or resolve([("argument", {"train.method": method} if method else {})])
    file, resolved = _source(prompts, answers, resolved)
    sources = Sources(file, limit, eval_prompts, off_domain, safety_prompts)
    unadapted = read_draft(_folder_of(draft)).fitted(target)
    last = None
    if previous is not None:
        last = read_draft(folder_of_run(previous)).fitted(target)
        check_previous(last, unadapted, Path(out), resolved.config.train)
    for stored in [unadapted] if last is None else [unadapted, last]:
        check_job(target, stored, base, resolved.config)  # before anything is generated
    continue_time(target, [Path(out) / "run.json"])
    asked = read_job_prompts(target, sources, resolved.config)
    with RunFolder.open(out) as run:
        job = Job(run, target, unadapted, base, resolved.config, last)
        record_job(job, asked.whole, resolved)
        begun, safety = _run_stages(job, asked)
        report = report_of(run, target, begun, asked.whole, resolved, safety)
        return AdaptResult(report, read_draft(str(run.path / "draft")), run.path, run.worked)


def _run_stages(job: Job, asked: JobPrompts) -> tuple[StoredDraft, Safety | None]:
    """Every stage that is not done yet; returns the draft that training began with, and what was found on safety prompts, if there
    are any."""
    general = general_prompts(job, asked)
    stopping, measured = {"heldout": asked.heldout}, dict(asked.measured)
    if general:
        stopping[GENERAL_HELDOUT], measured[OFF_GENERAL] = general.heldout, general.measured
    aside = _answer_aside(job, stopping | measured, asked.safety is not None)
    until = [aside[name] for name in stopping]
    job = begin_with(job, aside)
    if job.config.select.budget_value.auto:
        trained = train_in_rounds(job, asked.adapt, until, general)
    else:
        chosen = _answer_and_select(job, asked)
        selection = job.run.path / SELECTION if job.config.select.by == "answers" else None
        files = {}
        if general and general.trained:
            files[GENERAL] = answer(job, GENERAL, general.trained, answering(job.config.regenerate))
        trained = train(
            job,
            ["adapt"],
            [chosen, *files.values(), *until],
            general=list(files),
            guarded_by=GUARDED_BY if general else None,
            selection=selection,
        )
    exported = export(job, trained)
    measure(job, exported, {name: aside[name] for name in measured})
    certify(job, exported, [*asked.measured["eval"], *asked.heldout])
    if asked.safety is None:
        return job.draft, None
    return job.draft, measure_safety(job, asked.safety, asked.whole.prompts, exported, aside[OFF])


def _source(prompts: str | None, answers: str | None, resolved: Resolved) -> tuple[str, Resolved]:
    """The file that is adapted on, and the settings; given answers are taken unchanged."""
    if (prompts is None) == (answers is None):
        raise UserError(
            "name either prompts, which the target answers, or answers that are used unchanged "
            "(--prompts FILE or --answers FILE)"
        )
    if answers is None:
        return str(prompts), resolved
    changed: dict[str, Any] = {"answers": "original"}
    if resolved.origins["regenerate.max_new_tokens"] == "default":
        changed["max_new_tokens"] = WHOLE  # as long as they are
    config = dataclasses.replace(
        resolved.config, regenerate=dataclasses.replace(resolved.config.regenerate, **changed)
    )
    origins = {f"regenerate.{name}": "--answers" for name in changed}
    return answers, Resolved(config, {**resolved.origins, **origins})


def _folder_of(draft: Draft | str) -> str:
    if isinstance(draft, str):
        return draft
    if draft.source is None:
        raise UserError("this draft was made in memory; save it to a folder before adapting it")
    return draft.source


def _answer_aside(
    job: Job, asked: Mapping[str, Sequence[Prompt]], with_safety: bool
) -> dict[str, str]:
    """The target answers the prompts that stop training and those measured; the stage key of each file.

    They are answered at `measure.temperature`, with K lookahead tokens, and in this process unless
    `measure.answers` says otherwise: the texts of endpoints part from the target's at near-ties. Safety
    prompts are answered greedily and here, to be compared with greedy decoding.
    """
    c = job.config
    there = c.measure.answers == "endpoints"
    if c.regenerate.endpoints and not there:
        say("the answers to adapt on come from the endpoints; those measured on, from this process")
    measured = dataclasses.replace(
        c.regenerate,
        answers="regenerate",
        endpoints=c.regenerate.endpoints if there else "",
        temperature=c.measure.temperature,
        greedy_share=0.0,
        max_new_tokens=c.measure.eval_new_tokens,
    )
    greedy = dataclasses.replace(measured, temperature=0.0, endpoints="")
    is_safety = {OFF} if with_safety else set()
    return {
        name: answer(job, name, prompts, greedy if name in is_safety else measured, job.k)
        for name, prompts in asked.items()
    }


def _answer_and_select(job: Job, asked: JobPrompts) -> str:
    """Answers, then the choice among them; or a choice among the prompts, then only their answers.

    Returns the key of what is trained on.
    """
    config, pool = job.config.regenerate, asked.adapt
    if job.config.select.by == "prompts":
        select(job, lambda: as_samples(pool), prompts_hash(pool))
        return answer(job, "adapt", kept_prompts(pool, job.run.path / SELECTION), config)
    answered = answer(job, "adapt", pool, config)
    return select(job, lambda: read_answers(job.answers("adapt")), answered)
