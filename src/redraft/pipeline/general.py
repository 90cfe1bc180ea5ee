"""The general prompts of a job: those trained on, those that guard what is kept, those measured.

general.jsonl                        the questions, made up by the target or taken from a file
answers/general.jsonl                trained on, next to the answers to the job's own prompts, where a share is wanted
answers/general-heldout.jsonl        on these the adapter that is kept must not lose
answers/off-general.jsonl            measured before and after
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import RegenerateConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.files import write_text
from ..core.records import Prompt
from ..generation.general_prompts import WAY_OUT, TooFewError, made_up_questions
from ..prompts.prompts import read_prompts
from ..selection.select import most_kept
from .job import Job
from .job_prompts import JobPrompts, apart

FILE = "general.jsonl"
GENERAL, GENERAL_HELDOUT, OFF_GENERAL = "general", "general-heldout", "off-general"
"""The names of their answers files."""
GUARDED_BY = {"general prompts": GENERAL_HELDOUT}
"""As the stage `train` is told."""
FEWEST = 8
"""Prompts of a file, at least, for each of the three parts."""
LONGEST = 256
"""The longest answer that is trained on, in tokens, where the job's own answers are given and have no limit."""


@dataclass(frozen=True)
class GeneralPrompts:
    """Disjoint, in three parts."""

    trained: Sequence[Prompt]
    heldout: Sequence[Prompt]
    measured: Sequence[Prompt]


def general_prompts(job: Job, asked: JobPrompts) -> GeneralPrompts | None:
    """The general prompts of a job that asks these; None where no guard and no share is wanted.

    None of them is asked already. Raises UserError for a set of this name, and where there are too few; where the
    guard is 'auto' and nothing else wants them, a target that does not make them up leaves the job unguarded.
    """
    c = job.config.general
    if not c.share and c.guard == "off":
        return None
    if OFF_GENERAL in asked.measured:
        raise UserError(
            "off-domain name 'general' is that of the general prompts, which are measured as well; choose another, or "
            "say --guard off"
        )
    try:
        return _in_three_parts(job, asked)
    except TooFewError as problem:
        if c.share or c.prompts or c.guard == "on":
            raise
        say(f"no guard for other traffic: {problem}")
        return None


def _in_three_parts(job: Job, asked: JobPrompts) -> GeneralPrompts:
    c = job.config.general
    kept = most_kept(len(asked.adapt), job.config.select.budget_value)
    trained, aside = max(round(c.share * kept), 1) if c.share else 0, c.aside
    if not c.prompts:
        _make_up(job, max(trained + 2 * aside, 3 * FEWEST))
    source = c.prompts or str(job.run.path / FILE)
    others = [asked.adapt, asked.heldout, *asked.measured.values()]
    most = trained + 2 * aside + sum(map(len, others))
    found = apart(read_prompts(source, job.target, most, "last").prompts, others)
    if len(found) < 3 * FEWEST:
        raise TooFewError(
            f"{source} holds {len(found)} general prompts that are not asked already, {3 * FEWEST} are the least: "
            f"{WAY_OUT}"
        )
    if len(found) < trained + 2 * aside:
        aside = min(aside, len(found) // 3)
    return GeneralPrompts(
        found[2 * aside : 2 * aside + trained], found[:aside], found[aside : 2 * aside]
    )


def answering(config: RegenerateConfig) -> RegenerateConfig:
    """How the general prompts that are trained on are answered: as the job's own, and always by the target."""
    longest = config.max_new_tokens if config.answers == "regenerate" else LONGEST
    return dataclasses.replace(config, answers="regenerate", max_new_tokens=longest)


def _make_up(job: Job, count: int) -> None:
    def work() -> None:
        questions = made_up_questions(job.target, count, job.config.general.seed)
        rows = [
            {"id": f"general-{i}", "messages": [{"role": "user", "content": text}]}
            for i, text in enumerate(questions)
        ]
        write_text(job.run.path / FILE, "".join(json.dumps(row) + "\n" for row in rows))

    inputs = {"target": job.target.fingerprint(), "count": count, "seed": job.config.general.seed}
    job.run.stage("general prompts", inputs, [FILE], work)
    made_up = (job.run.path / FILE).read_text(encoding="utf-8").count("\n")
    if made_up < 3 * FEWEST:
        raise TooFewError(
            f"target {job.target.name} made up {made_up} different questions of {count}, {3 * FEWEST} are the least: "
            f"{WAY_OUT}"
        )
