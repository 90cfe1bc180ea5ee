"""Which draft an adaptation begins with, where the model had a version before: the named one, or the one adapted to that version.

    start.json    the tau of both on held-out answers, and what guards hold against

The draft that the target accepts more often is taken. Whichever it is, other traffic is guarded against the loss of what the named
draft has there, so that a draft that follows a model from version to version does not lose a little each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..checkpoints.load import StoredDraft
from ..config import TrainConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.files import remove
from ..core.folders import read_json
from ..core.records import Answer
from ..core.report_record import Start
from ..generation.answer_file import read_answers
from ..metrics.acceptance import pooled_tau
from ..metrics.replay import replay
from .general import GUARDED_BY
from .job import Job

FILE = "start.json"
REFERENCE = "reference"


def folder_of_run(folder: str) -> str:
    """A draft's folder, which may be named by the run that wrote it."""
    inner = Path(folder) / "draft"
    return str(inner) if (inner / "config.json").is_file() else folder


def check_previous(
    previous: StoredDraft, draft: StoredDraft, out: Path, config: TrainConfig
) -> None:
    """Raise UserError for a draft that this job would write over, and for methods that would do again what was done to it."""
    if previous.folder.resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"--previous {previous.folder} lies in --out {out}, which this job writes; name another folder with --out"
        )
    if config.method_value.closed_form:
        raise UserError(
            f"--method {config.method} with --previous: its closed form goes from the base to the target, and {previous.folder} has gone "
            "a part of that way already; leave --previous out, or train (--method body)"
        )
    wide, narrow = (getattr(each.config, "intermediate_size", 0) for each in (previous, draft))
    if wide > narrow and config.method_value.reads("width"):
        raise UserError(
            f"--method {config.method} with --previous: {previous.folder} was widened for its own version already ({wide} FFN neurons, "
            f"{draft.folder} has {narrow}) and would be again; train what is there (--method body), or leave --previous out"
        )


def begin_with(job: Job, answered: Mapping[str, str]) -> Job:
    """The job with the better of its two drafts as the unadapted one; unchanged without `previous`.

    `answered` are the stage keys of the held-out answers by name.
    """
    if job.previous is None:
        remove(job.run.path / FILE)  # of a run that had one
        return job
    previous = job.previous
    guarding = {name: file for name, file in GUARDED_BY.items() if file in answered}

    def work() -> None:
        before, now = _tau(job, job.draft, "heldout"), _tau(job, previous, "heldout")
        prompts = len(read_answers(job.answers("heldout")))
        found = Start(str(job.draft.folder), str(previous.folder), before, now, prompts)
        reference = {
            name: _tau(job, job.draft, file)
            for name, file in guarding.items()
            if _drafted(job, file)
        }
        job.run.write_json(FILE, {**asdict(found), REFERENCE: reference})

    inputs = {
        "answers": {name: answered[name] for name in ("heldout", *guarding.values())},
        "draft": job.draft.hash(),
        "previous": previous.hash(),
        "k": job.k,
    }
    job.run.stage("start", inputs, [FILE], work)
    found, reference = read_start(job.run.path / FILE)
    say(found.in_words())
    begun = previous if found.chosen == found.previous else job.draft
    return dataclasses.replace(job, draft=begun, reference=reference)


def read_start(path: Path) -> tuple[Start, dict[str, float]]:
    """The two drafts, and the taus that guards hold against."""
    row = read_json(path)
    reference = row.pop(REFERENCE)
    return Start(**row), reference


def _drafted(job: Job, file: str) -> list[Answer]:
    """The answers of a file that anything is drafted for."""
    return [answer for answer in read_answers(job.answers(file)) if answer.length > 1]


def _tau(job: Job, stored: StoredDraft, file: str) -> float:
    answers = _drafted(job, file)
    if not answers:
        return 1.0
    traces = replay(job.target, stored.build(job.target), answers, job.k)
    steps = [trace for trace in traces if trace.accepted]
    return pooled_tau(steps) if steps else 1.0
